"""Small files that must never be half written: temporary name, fsync, rename, fsync of the directory. As nodeagent/files.py has
it: the processes share no code that touches a disk, and a test holds the two to one text."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_numbers = itertools.count()  # writers in several threads must not share a temporary file


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """After return the file holds ``data`` whole, also after a power cut; before it, the former content. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        try:
            os.fchmod(fd, mode)  # the umask, or a leftover of an earlier crash
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def private_directory(path: Path) -> Path:
    """Make it if absent, root's alone, and free of what a crash left half written. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    for leftover in path.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return path
