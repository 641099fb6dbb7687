"""What the service manager is told (sd_notify): that this process is ready, alive, about to stop. Nothing where there is none."""

from __future__ import annotations

import os
import socket


class Notify:
    """Takes NOTIFY_SOCKET and WATCHDOG_USEC out of the environment: children are not to speak for us."""

    def __init__(self) -> None:
        path, usec = os.environ.pop("NOTIFY_SOCKET", ""), os.environ.pop("WATCHDOG_USEC", "")
        self._sock: socket.socket | None = None
        self.interval_s = float("inf")  # between two signs of life
        if not path:
            return
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._sock.connect("\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            self._sock.close()
            self._sock = None
            return
        if usec.isdigit() and int(usec):
            self.interval_s = int(usec) / 1e6 / 3

    def tell(self, **fields: str | int) -> None:
        """For example ``READY=1, STATUS="…"``. Lost if the manager does not read."""
        if self._sock is None:
            return
        try:
            self._sock.send("\n".join(f"{name}={value}" for name, value in fields.items()).encode())
        except OSError:
            pass  # its restart; the next sign of life comes soon
