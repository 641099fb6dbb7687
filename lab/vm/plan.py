"""What a VM is: its names, numbers and files. Data alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

RUN_ROOT = Path("/run/pillion/vm")
VM_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
LAB_NAME = re.compile(r"[a-z][a-z0-9]{0,11}")
VMS_MAX = 16
MEMORY_MIB = 2048
LIMIT_S = 3600
OUTSIDE_CARD = "eth1"


class Kind(Enum):
    QUICK = "quick"  # this machine's root, read-only below a tmpfs; no systemd; gone at its end
    MACHINE = "machine"  # systemd on a disk of its own, which lasts until the lab is down


@dataclass(frozen=True)
class Vm:
    name: str
    number: int  # from 1; its addresses end in 10 + number
    kind: Kind
    image: Path
    modules: Path
    cpus: int = 1
    memory_mib: int = MEMORY_MIB
    limit_s: int = LIMIT_S
    network: bool = True
    outside: bool = False  # a second card, behind which is what this machine reaches
    disk: Path | None = None
    modules_disk: Path | None = None
    shown: tuple[Path, ...] = ()
    project: Path = Path()  # what a quick VM sees in the project's place: `snapshot`
    snapshot: Path = Path()

    @property
    def addresses(self) -> tuple[str, ...]:
        """With prefix lengths; empty without a network."""
        return (f"10.78.0.{10 + self.number}/24", f"fd78::{10 + self.number}/64") if self.network else ()

    @property
    def mac(self) -> str:
        return f"52:54:00:50:4c:{self.number:02x}"
