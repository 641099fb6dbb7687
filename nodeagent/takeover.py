"""Getting back a listener a former agent had handed to the proxy. The proxy serves it on while agents come and go; the
new agent needs its own descriptor, to hand out again when the proxy dies. The kernel copies it (pidfd_getfd). Or the service
manager has kept it (`fd_store`), and it is among our own."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Set
from pathlib import Path

from mesh.link import Listener
from nodeagent import cgroups
from nodeagent.libbpf import libc
from nodeagent.sockdiag import ANY_STATE, TCP, UDP, SockDiag, State

SYS_PIDFD_GETFD = 438  # the same number on every architecture


def take(diag: SockDiag, wanted: Listener, holders: Path) -> int | None:
    """A descriptor of the socket bound to ``wanted``'s address and port, our own or from a process of the cgroup ``holders``;
    None if none of them has it (then it is a stranger's). Needs CAP_SYS_PTRACE."""
    udp = wanted.kind == "dns-udp"
    inodes = {
        sock.inode
        for sock in diag.dump(ANY_STATE, (UDP if udp else TCP,))
        if (sock.local, sock.local_port) == (wanted.address, wanted.port) and (udp or sock.state == State.LISTEN)
    }
    return next((fd for pid in (os.getpid(), *cgroups.pids(holders)) if (fd := _copied(pid, inodes)) is not None), None)


def _copied(pid: int, inodes: Set[int]) -> int | None:
    """Our own descriptor of a socket with one of these inodes that a process has open. It opens and closes others meanwhile."""
    names = {f"socket:[{inode}]" for inode in inodes}
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return None  # it exited
    for number in numbers:
        try:
            if os.readlink(f"/proc/{pid}/fd/{number}") not in names:
                continue
            fd = copy_fd(pid, int(number))
        except OSError:
            continue  # closed
        if os.fstat(fd).st_ino in inodes:
            return fd
        os.close(fd)  # another one has its number by now
    return None


def copy_fd(pid: int, fd: int) -> int:
    """Our own descriptor (close-on-exec) of what another process has open. Raises OSError."""
    process = os.pidfd_open(pid)
    try:
        copied = int(libc.syscall(SYS_PIDFD_GETFD, process, fd, 0))
    finally:
        os.close(process)
    if copied < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"descriptor {fd} of process {pid}: {os.strerror(code)}")
    return copied
