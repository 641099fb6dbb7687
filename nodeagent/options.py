"""What the command line says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """One agent's; paths are absolute."""

    node: str
    addresses: tuple[str, ...]
    state_dir: Path
    run_dir: Path
    cgroup: Path
    proxy_dir: Path
    workloads: Path | None = None
    join_token_file: Path | None = None
    controllers: tuple[str, ...] = ()
    proxy_cgroup: Path | None = None  # None: <cgroup>/proxy, made by the agent
    express: bool = True  # False: HTTP takes the proxy, always
