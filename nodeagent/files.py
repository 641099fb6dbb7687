"""Small files that must never be half written: temporary name, fsync, rename, fsync of the directory. And what to make of one
that was damaged all the same."""

from __future__ import annotations

import itertools
import os
import resource
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")

DESCRIPTORS_MAX = 1 << 20

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


class Damaged(ValueError):
    """The file can not be read, or is none of this version's."""


def read_json(path: Path, kind: type[T]) -> T:
    """What a file of ours says. Raises FileNotFoundError, Damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Damaged(f"{path}: {error}") from error


def private_directory(path: Path) -> Path:
    """Make it if absent, root's alone, and free of what a crash left half written. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    for leftover in path.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return path


def many_descriptors() -> None:
    """As many as this process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, DESCRIPTORS_MAX)), hard))
