"""What a session does about its identity's budget, whatever it carries."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from l7proxy.budget import Account

if TYPE_CHECKING:
    from l7proxy.worker import Worker

PARKED_S = 0.1  # how long a connection is not read after a 429
READ_BYTES = 256_000  # what the loop reads at once, and keeps until its last byte is written
LOST_S = 0.00001  # of the worker's time, about: what the loop does to end a connection


class Late(Protocol):
    """Who reads for an identity whose turn is over. ``late``: what came since, for `proceed` at the next turn."""

    late: bytes | None
    transport: asyncio.Transport

    def proceed(self) -> None: ...


def put_off(reader: Late, account: Account, data: bytes) -> None:
    """Keeps the data, and reads no more until the account's next turn."""
    if reader.late is None:
        reader.late = data
        reader.transport.pause_reading()
        account.defer(reader)
    else:
        reader.late += data


def waiting(full: asyncio.Transport) -> int:
    """Bytes that are kept for a transport which takes no more for now."""
    return max(full.get_write_buffer_size(), READ_BYTES)


class Budgeted:
    """Mixed into a session, whose slots these are. ``sockets``: counted as its own, None once given back.
    ``holds``: bytes kept for it because somebody does not read, or does not finish."""

    if not TYPE_CHECKING:
        __slots__ = ()  # the attributes below are the session's slots

    account: Account
    worker: Worker
    sockets: int | None
    holds: int
    metered: bool

    @property
    def meter(self) -> Account | None:
        """See `SocketTransport`."""
        return self.account if self.metered else None

    def waits(self) -> bool:
        return True

    def cut(self) -> None:
        raise NotImplementedError

    def hold(self, size: int) -> None:
        """So many bytes are kept for this connection now. Ends it, a little later, when its identity has too many."""
        if size != self.holds:
            account = self.account
            account.held += size - self.holds
            grown, self.holds = size > self.holds, size
            if grown and account.held > account.budget.bytes_in_flight:
                self.worker.loop.call_soon(self._overfull)

    def _overfull(self) -> None:
        if self.sockets is not None and self.holds and self.account.overfull:
            self.worker.metrics.denied(self.account.refuse("budget_bytes"))
            self.hold(0)
            self.cut()

    def ended(self) -> None:
        """The connection is no more. Asked once or more often."""
        if self.sockets is not None:
            account = self.account
            account.connections -= 1
            account.descriptors -= self.sockets
            self.sockets = None
        self.hold(0)
