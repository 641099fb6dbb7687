"""What a lab remembers between commands: state.json, replaced atomically, under a lock for each lab."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from lab.topology import RUN_ROOT, Paths


class LabError(RuntimeError):
    """Something the person at the keyboard can act on: what happened, and what to do next."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  {self.remedy}" if self.remedy else self.what


class WorkloadState(msgspec.Struct, frozen=True):
    name: str
    namespace: str
    service_account: str
    node: str
    index: int
    labels: dict[str, str] = {}


class NodeState(msgspec.Struct, frozen=True):
    name: str
    agent: str  # unix:// address of the agent's local API
    netns: str
    cgroup: str


class LabState(msgspec.Struct, frozen=True):
    """state.json. The CLI reads `controller` and `nodes[].agent` of a running lab from here."""

    name: str
    mesh: bool
    workers: int
    controller: str  # unix:// address of the operator API
    nodes: tuple[NodeState, ...]
    workloads: dict[str, WorkloadState] = {}
    granted: tuple[str, ...] = ()  # "<node>/<namespace>" whose grants the lab applied
    built: bool = False  # the network is complete
    checkout: str = ""  # whose lab it is


CHECKOUT = str(Path(__file__).resolve().parents[1])


def checkout_of(name: str) -> str:
    """The checkout that a lab was brought up from; "" if nothing tells."""
    try:
        current = load(name)
    except LabError:
        return ""
    return current.checkout if current else ""


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Readers see the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    temporary.replace(path)


def load(name: str) -> LabState | None:
    """The lab's state, or None if it is not up (or was taken down half-way)."""
    try:
        return msgspec.json.decode(Paths(name).state_file.read_bytes(), type=LabState)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise LabError(f"{Paths(name).state_file} is damaged: {error}", f"run: pillion lab down --name {name}") from error


def save(state: LabState) -> None:
    write_atomic(Paths(state.name).state_file, msgspec.json.format(msgspec.json.encode(state), indent=2))


def running() -> list[str]:
    """Names of the labs that have a state file."""
    if not RUN_ROOT.is_dir():
        return []
    return sorted(path.parent.name for path in RUN_ROOT.glob("*/state.json"))


@contextmanager
def locked(name: str, say: Callable[[str], None] = lambda _text: None) -> Iterator[None]:
    """One command at a time for each lab; `say` hears of a wait. The holder may unlink the lock file (see `forget`)."""
    path = lock_path(name)
    while True:
        try:
            RUN_ROOT.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # another lab's `forget` took the folder away, or the one above
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another command on the lab {name!r}")
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            current = path.stat()
        except FileNotFoundError:
            os.close(fd)
            continue
        if (current.st_dev, current.st_ino) == (os.fstat(fd).st_dev, os.fstat(fd).st_ino):
            break
        os.close(fd)
    try:
        yield
    finally:
        os.close(fd)


def lock_path(name: str) -> Path:
    return RUN_ROOT / f"{name}.lock"


def forget(name: str) -> None:
    """Last step of `down`, with the lock held: no lock file, no empty folders."""
    lock_path(name).unlink(missing_ok=True)
    remove_empty(RUN_ROOT)


def remove_empty(folder: Path) -> None:
    """A folder for runs and the one above, unless somebody else is in them."""
    for each in (folder, folder.parent):
        try:
            each.rmdir()
        except OSError:
            return
