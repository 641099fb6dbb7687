"""The service manager keeps a duplicate of each listener (sd_pid_notify_with_fds, `FileDescriptorStoreMax=`), so that new
connections wait, and none is refused, even while neither an agent nor a proxy is there. The next agent finds them among its own
descriptors (`takeover.take`). Nothing of this where there is no such manager."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Mapping, MutableMapping

from nodeagent.datapath_api import OpenListener

FIRST_FD = 3  # SD_LISTEN_FDS_START
NAME_CHARS_MAX = 255


class FdStore:
    """Reads NOTIFY_SOCKET, takes LISTEN_* out of ``environ``: before `mesh.notify.Notify`."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        count, pid = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
        names = environ.pop("LISTEN_FDNAMES", "").split(":")
        self._kept: dict[str, int] = {}  # name -> inode
        self._inherited: list[int] = []
        self._seen: Mapping[str, object] | None = None  # what was kept last, whole
        if pid == str(os.getpid()) and count.isdigit():
            self._inherited = list(range(FIRST_FD, FIRST_FD + int(count)))
            for fd, name in zip(self._inherited, names, strict=False):
                os.set_inheritable(fd, False)
                self._kept[name] = os.fstat(fd).st_ino

    def keep(self, listeners: Mapping[str, OpenListener], *, settled: bool) -> None:
        """``listeners``: by id, another mapping whenever they are others. ``settled``: these are all, so what
        was inherited and is not among them goes."""
        if not self._address or (listeners is self._seen and not (settled and self._inherited)):
            return
        wanted = {key.replace(":", ".")[:NAME_CHARS_MAX]: fd for key, (_, fd) in listeners.items()}
        whole = all(self._store(name, fd) for name, fd in wanted.items())
        if settled:
            for name in self._kept.keys() - wanted.keys():
                if self._send(f"FDSTOREREMOVE=1\nFDNAME={name}"):
                    del self._kept[name]
                else:
                    whole = False
            for fd in self._inherited:  # those that are wanted have been duplicated
                os.close(fd)
            self._inherited = []
        self._seen = listeners if whole else None

    def _store(self, name: str, fd: int) -> bool:
        try:
            inode = os.fstat(fd).st_ino
        except OSError:  # closed meanwhile: another mapping comes
            return True
        if self._kept.get(name) == inode:
            return True
        if name in self._kept and not self._send(f"FDSTOREREMOVE=1\nFDNAME={name}"):
            return False
        self._kept.pop(name, None)
        if not self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd):
            return False
        self._kept[name] = inode
        return True

    def _send(self, text: str, *fds: int) -> bool:
        """False: the manager does not read just now; tried again."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sock.sendmsg([text.encode()], rights, 0, self._address)
            except OSError:
                return False
        return True
