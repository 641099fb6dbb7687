"""A TLS listener that knows of its handshakes and sources. asyncio's own server counts a connection when its handshake is done,
so peers that never end theirs would take descriptors without limit; here they have a limit, in all and for each source. And no
source may hold all the connections there are."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

import structlog

ACCEPT_PAUSE_S = 0.2  # after the kernel refused one, for lack of descriptors or memory
SHUTDOWN_TIMEOUT_S = 2.0  # for the peer's close_notify
SOURCES_KEPT = 8192  # past it those without a connection are forgotten

log = structlog.get_logger()


@dataclass(frozen=True)
class Limits:
    timeout_s: float  # of a handshake
    in_all_max: int  # handshakes at a time
    per_source_max: int  # of one address
    open_per_source_max: int  # connections of one address


class TlsListener:
    """Serves from the moment it is made, inside a running loop. ``full``: whether there is no room for one more."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        protocol: Callable[[], asyncio.Protocol],
        full: Callable[[], bool],
        limits: Limits,
        on_turned_away: Callable[[], None] = lambda: None,
    ) -> None:
        self._sock, self._context, self._protocol, self._full, self._limits = sock, context, protocol, full, limits
        self._sock.setblocking(False)
        self._tasks: set[asyncio.Task[None]] = set()
        self._sources: Counter[str] = Counter()  # of handshakes
        self._open: dict[str, WeakSet[asyncio.BaseTransport]] = {}  # by source; some may be closed by now
        self.turned_away, self._on_turned_away = 0, on_turned_away
        self._accepting = asyncio.create_task(self._accept())

    @property
    def address(self) -> tuple[str, int]:
        host, port, *_ = self._sock.getsockname()
        return host, port

    @property
    def handshakes(self) -> int:
        return len(self._tasks)

    def close(self) -> None:
        """Accepts no more and ends what has not shaken hands; connections stay."""
        for task in (self._accepting, *self._tasks):
            task.cancel()
        self._sock.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(self._sock)
            except OSError as error:
                if error.errno != errno.ECONNABORTED:  # that one has left by itself
                    log.error("cannot accept; trying again", error=str(error), in_s=ACCEPT_PAUSE_S)
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            source, limits = str(peer[0]), self._limits
            crowded = len(self._tasks) >= limits.in_all_max or self._sources[source] >= limits.per_source_max
            if self._full() or crowded or self._holds(source) >= limits.open_per_source_max:
                self.turned_away += 1
                self._on_turned_away()
                sock.close()
                continue
            self._sources[source] += 1
            task = asyncio.create_task(self._handshake(sock, source))
            self._tasks.add(task)
            task.add_done_callback(lambda done, source=source: self._done(done, source))  # type: ignore[misc]  # bound now

    def _holds(self, source: str) -> int:
        """Connections of a source, or a few more: exact where it matters."""
        known = self._open.get(source)
        if known is None or len(known) < self._limits.open_per_source_max:
            return len(known or ())
        self._open[source] = WeakSet(transport for transport in known if not transport.is_closing())
        return len(self._open[source])

    async def _handshake(self, sock: socket.socket, source: str) -> None:
        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol,
                sock,
                ssl=self._context,
                ssl_handshake_timeout=self._limits.timeout_s,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            )
        except OSError as error:  # TLS errors and timeouts among them: the peer's doing
            log.debug("no handshake", error=str(error))
            return
        self._open.setdefault(source, WeakSet()).add(transport)
        if len(self._open) > SOURCES_KEPT:
            self._open = {name: known for name, known in self._open.items() if any(not each.is_closing() for each in known)}

    def _done(self, task: asyncio.Task[None], source: str) -> None:
        self._tasks.discard(task)
        self._sources[source] -= 1
        if self._sources[source] <= 0:
            del self._sources[source]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("handshake failed", exc_info=error)
