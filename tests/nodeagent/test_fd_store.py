"""What the service manager is asked to keep, and what of it is found again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.fd_store import FdStore

ROOT = Path(__file__).resolve().parents[2]
Listeners = dict[str, tuple[object, int]]


class Manager:
    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": str(path)}
        self.kept: dict[str, int] = {}  # name -> inode

    def hear(self) -> int:
        """How much was said."""
        count = 0
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 4096, 8)
            except BlockingIOError:
                return count
            count += 1
            fields = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "FDSTOREREMOVE" in fields:
                del self.kept[fields["FDNAME"]]
                continue
            assert fields["FDSTORE"] == "1" and fields["FDPOLL"] == "0" and ":" not in fields["FDNAME"]
            (fd,) = fds
            self.kept[fields["FDNAME"]] = os.fstat(fd).st_ino
            os.close(fd)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.sock.close()


@pytest.fixture
def socks() -> Iterator[list[socket.socket]]:
    made = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    yield made
    for sock in made:
        sock.close()


def of(*socks: socket.socket) -> Listeners:
    return {f"7/outbound/::{number}": (None, sock.fileno()) for number, sock in enumerate(socks)}


def inodes(*socks: socket.socket) -> dict[str, int]:
    return {f"7/outbound/..{number}": os.fstat(sock.fileno()).st_ino for number, sock in enumerate(socks)}


def test_listeners_are_kept_and_those_that_go_are_let_go(manager: Manager, socks: list[socket.socket]) -> None:
    store, listeners = FdStore(manager.environ), of(*socks[:2])
    store.keep(listeners, settled=False)
    assert manager.hear() == 2 and manager.kept == inodes(*socks[:2])
    store.keep(listeners, settled=True)
    assert manager.hear() == 0, "the same ones"
    store.keep(of(socks[0], socks[2]), settled=True)  # the second was opened anew
    manager.hear()
    assert manager.kept == inodes(socks[0], socks[2])
    store.keep(of(socks[0]), settled=True)
    manager.hear()
    assert manager.kept == inodes(socks[0])


def test_a_manager_that_does_not_read_is_told_later(manager: Manager, socks: list[socket.socket], tmp_path: Path) -> None:
    store, listeners = FdStore(manager.environ), of(*socks)
    (tmp_path / "notify").rename(tmp_path / "away")
    store.keep(listeners, settled=True)
    (tmp_path / "away").rename(tmp_path / "notify")
    store.keep(listeners, settled=True)
    manager.hear()
    assert manager.kept == inodes(*socks)


def test_without_a_manager_nothing_is_done(socks: list[socket.socket]) -> None:
    FdStore({}).keep(of(*socks), settled=True)


INHERITS = """
import os, sys
from nodeagent.fd_store import FdStore
count = int(sys.argv[1])
environ = dict(os.environ, LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES=":".join(sys.argv[2:]))
store = FdStore(environ)
assert not {name for name in environ if name.startswith("LISTEN_")} and not os.get_inheritable(3)
wanted = {"7/outbound/::0": (None, os.dup(3))}  # as takeover.take does
store.keep(wanted, settled=False)
os.fstat(4)
store.keep(wanted, settled=True)
for fd in range(3, 3 + count):
    try:
        os.fstat(fd)
    except OSError:
        continue
    raise AssertionError(f"{fd} is still open")
"""


def test_what_was_kept_is_found_and_what_nobody_wants_is_let_go(manager: Manager, socks: list[socket.socket]) -> None:
    """In a process of its own, whose descriptors from 3 on are the manager's."""
    manager.kept = inodes(*socks)

    def give() -> None:
        for number, sock in enumerate(socks):
            os.dup2(sock.fileno(), 100 + number)
        for number in range(len(socks)):
            os.dup2(100 + number, 3 + number)

    argv = [sys.executable, "-c", INHERITS, str(len(socks)), *manager.kept]
    environ = {**os.environ, **manager.environ}
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env=environ,
        preexec_fn=give,
        pass_fds=range(3, 6),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert manager.hear() == 2
    assert manager.kept == inodes(socks[0])
