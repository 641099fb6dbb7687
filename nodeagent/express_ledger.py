"""Who held how many pairs, in a small file beside the pins: when agent and proxy are killed at once, nobody is left who held
their sockets, and the next agent counts what was lost. The kernel's records say how many there were, the file whose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from nodeagent.files import Damaged, read_json, write_atomically

log = structlog.get_logger()

OWNERS_MAX = 1024


class Owner(msgspec.Struct, frozen=True):
    """A worker. ``started``: tells it from another process with its number (clock ticks since boot)."""

    pid: int
    started: int
    pairs: int


class Ledger:
    """Blocking."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[int, int] = {}

    def keep(self, pairs: Mapping[int, int]) -> None:
        """Process -> how many it has now. Written when that has changed; what can not be written is not counted later."""
        if pairs == self._kept:
            return
        self._kept = dict(pairs)
        owners = [Owner(pid, started(pid), count) for pid, count in list(pairs.items())[:OWNERS_MAX]]
        try:
            write_atomically(self._path, msgspec.json.encode(owners))
        except OSError as error:
            log.warning("pairs_not_noted", error=str(error))

    def orphans(self, paired: int) -> tuple[int, bool]:
        """Of so many pairs that a former agent left in the kernel: how many were of workers that are no more, and whether
        some other lives that had any."""
        try:
            owners = read_json(self._path, list[Owner])
        except (FileNotFoundError, Damaged):
            return 0, True
        living = [owner for owner in owners if owner.pairs and started(owner.pid) == owner.started]
        gone = sum(owner.pairs for owner in owners) - sum(owner.pairs for owner in living)
        if not gone:
            return 0, bool(living) or bool(paired)
        return min(gone, paired) if living else paired, bool(living)


def started(pid: int) -> int:
    """-1: no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
