"""What a service manager is told of a process (sd_notify): that it is ready, alive, about to stop. Nothing where there is none.
Which socket that goes through is the process's own business."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Protocol


class Socket(Protocol):
    """A Unix datagram socket; each raises OSError."""

    def setblocking(self, flag: bool, /) -> object: ...

    def connect(self, address: str, /) -> object: ...

    def send(self, data: bytes, /) -> object: ...

    def close(self) -> object: ...


class Notify:
    """Takes NOTIFY_SOCKET and WATCHDOG_USEC out of ``environ``: children are not to speak for us. ``make``: asked for a
    socket only where there is somebody to tell."""

    def __init__(self, environ: MutableMapping[str, str], make: Callable[[], Socket]) -> None:
        path, usec = environ.pop("NOTIFY_SOCKET", ""), environ.pop("WATCHDOG_USEC", "")
        self.interval_s = float("inf")  # between two signs of life
        self._socket: Socket | None = None
        if not path:
            return
        sock = make()
        sock.setblocking(False)
        try:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            sock.close()
            return
        self._socket = sock
        if usec.isdigit() and int(usec):
            self.interval_s = int(usec) / 1e6 / 3

    def tell(self, **fields: str | int) -> None:
        """For example ``READY=1, STATUS="…"``. Lost if the manager does not read."""
        if self._socket is None:
            return
        try:
            self._socket.send("\n".join(f"{name}={value}" for name, value in fields.items()).encode())
        except OSError:
            pass  # its restart; the next sign of life comes soon
