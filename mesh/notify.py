"""What a service manager is told of a process (sd_notify): that it is ready, alive, about to stop. Nothing where there is none.
Which socket that goes through is the process's own business."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

Send = Callable[[bytes], object]  # raises OSError


class Notify:
    """Takes NOTIFY_SOCKET and WATCHDOG_USEC out of ``environ``: children are not to speak for us. ``connect``: a datagram
    socket's address to how to send there; raises OSError."""

    def __init__(self, environ: MutableMapping[str, str], connect: Callable[[str], Send]) -> None:
        path, usec = environ.pop("NOTIFY_SOCKET", ""), environ.pop("WATCHDOG_USEC", "")
        self.interval_s = float("inf")  # between two signs of life
        self._send: Send | None = None
        if not path:
            return
        try:
            self._send = connect("\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            return
        if usec.isdigit() and int(usec):
            self.interval_s = int(usec) / 1e6 / 3

    def tell(self, **fields: str | int) -> None:
        """For example ``READY=1, STATUS="…"``. Lost if the manager does not read."""
        if self._send is None:
            return
        try:
            self._send("\n".join(f"{name}={value}" for name, value in fields.items()).encode())
        except OSError:
            pass  # its restart; the next sign of life comes soon
