"""Network namespaces by name, through `ip`; and threads that step into one. Nothing here touches the host's own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from lab.state import LabError
from lab.topology import NETNS_ROOT

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def _ip(*arguments: str, lines: Iterable[str] | None = None) -> str:
    text = None if lines is None else "".join(line + "\n" for line in lines)
    done = subprocess.run(["ip", *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        what = " ".join(arguments)
        raise LabError(f"ip {what}: {done.stderr.strip() or done.stdout.strip()}", "see `ip -batch` line numbers; is this root?")
    return done.stdout


def names(prefix: str) -> list[str]:
    """Existing namespaces whose name starts with `prefix`, also half-made ones."""
    if not NETNS_ROOT.is_dir():
        return []
    return sorted(entry.name for entry in NETNS_ROOT.iterdir() if entry.name.startswith(prefix))


def add(name: str, sysctls: Mapping[str, str]) -> None:
    """Make a namespace and set its own sysctls before it has a link."""
    _ip("netns", "add", name)
    run_inside(NETNS_ROOT / name, lambda: _write_sysctls(sysctls))


def _write_sysctls(sysctls: Mapping[str, str]) -> None:
    for key, value in sysctls.items():
        Path("/proc/sys", key).write_text(value)


def delete(name: str) -> None:
    """Remove a namespace's name; a leftover of a crashed `ip netns add` (a plain file) too."""
    try:
        _ip("netns", "delete", name)
    except LabError:
        (NETNS_ROOT / name).unlink(missing_ok=True)


def batch(name: str, lines: Iterable[str]) -> None:
    """Run `ip` lines inside a namespace, stopping at the first that fails."""
    _ip("-n", name, "-batch", "-", lines=lines)


def enter(path: Path) -> None:
    """Move the calling thread into a namespace; it stays there."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)


def run_inside(path: Path, function: Callable[[], T]) -> T:
    """Call `function` in a thread of its own inside the namespace. Sockets it returns stay there."""
    result: list[T] = []
    error: list[BaseException] = []

    def body() -> None:
        try:
            enter(path)
            result.append(function())
        except BaseException as caught:  # handed to the caller below
            error.append(caught)

    thread = threading.Thread(target=body, name=f"in-{path.name}")
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return result[0]
