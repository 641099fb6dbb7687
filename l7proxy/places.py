"""Workers' places in the run directory: a socket and a lock each. Generations of workers live side by side while a former one
drains, each worker with a number of its own: a new proxy takes those that nobody lives in."""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path

BACKLOG = 16
PLACES_MAX = 1024


class PlacesError(Exception):
    """There is no room; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """``lock``: held as long as a process has it open, however that ends."""

    index: int
    listen: socket.socket
    lock: int

    def close(self) -> None:
        self.listen.close()
        os.close(self.lock)


def claim(run_dir: Path, count: int) -> list[Place]:
    """The first ``count`` places that are free; sockets of others that are free go. Raises PlacesError, OSError."""
    places: list[Place] = []
    for index in range(PLACES_MAX):
        path = run_dir / f"worker-{index}.sock"
        if len(places) == count and not path.exists():
            continue
        lock = os.open(run_dir / f"worker-{index}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if len(places) < count:
            places.append(Place(index, worker_socket(path), lock))
        else:
            path.unlink(missing_ok=True)
            os.close(lock)
    if len(places) < count:
        raise PlacesError(f"{run_dir} has no {count} places: {PLACES_MAX} workers of former generations still drain")
    return places


def worker_socket(path: Path) -> socket.socket:
    """``worker-<i>.sock``, for root alone; it listens before it has its name."""
    made = path.with_name(f".{path.name}")
    made.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(made))
    finally:
        os.umask(before)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    made.replace(path)
    return sock
