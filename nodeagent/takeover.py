"""Getting back a listener a former agent had handed to the proxy. The proxy serves it on while agents come and go; the
new agent needs its own descriptor, to hand out again when the proxy dies. The kernel copies it (pidfd_getfd). Or the service
manager has kept it (`fd_store`), and it is among our own."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from nodeagent import cgroups
from nodeagent.datapath_api import OpenListener
from nodeagent.enrol import PROTOCOLS
from nodeagent.sockdiag import ANY_STATE, SockDiag, State

SYS_PIDFD_GETFD = 438  # the same number on every architecture

_libc = ctypes.CDLL(None, use_errno=True)


def take(diag: SockDiag, wanted: OpenListener, holders: Path) -> int | None:
    """A descriptor of the socket bound to ``wanted``'s address and port, our own or from a process of the cgroup ``holders``;
    None if none of them has it (then it is a stranger's). Needs CAP_SYS_PTRACE."""
    udp = wanted.kind == "dns-udp"
    inodes = {
        sock.inode
        for sock in diag.dump(ANY_STATE, PROTOCOLS[1:] if udp else PROTOCOLS[:1])
        if (sock.local, sock.local_port) == (wanted.address, wanted.port) and (udp or sock.state == State.LISTEN)
    }
    names = {f"socket:[{inode}]" for inode in inodes}
    for pid in (os.getpid(), *cgroups.pids(holders)):
        try:
            for entry in os.scandir(f"/proc/{pid}/fd"):
                if os.readlink(entry.path) in names:
                    return copy_fd(pid, int(entry.name))
        except OSError:
            continue  # it exited, or closed it meanwhile
    return None


def copy_fd(pid: int, fd: int) -> int:
    """Our own descriptor (close-on-exec) of what another process has open. Raises OSError."""
    process = os.pidfd_open(pid)
    try:
        copied = int(_libc.syscall(SYS_PIDFD_GETFD, process, fd, 0))
    finally:
        os.close(process)
    if copied < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"descriptor {fd} of process {pid}: {os.strerror(code)}")
    return copied
