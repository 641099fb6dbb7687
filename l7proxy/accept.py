"""Accepting on a socket that the agent has made listen, which this process may not do itself."""

from __future__ import annotations

import socket
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

from l7proxy.budget import Account

if TYPE_CHECKING:
    from l7proxy.worker import Worker

ACCEPTS_PER_TURN = 16  # of one listener; of one identity, what its share of the turn has room for
BEGIN_S = 0.00002  # of the worker's time, about: what the loop does for a new connection later, where nobody measures
PAUSE_S = 0.2  # out of descriptors or memory: a reader left in place would spin


class Acceptor:
    """Owns ``sock``. ``begin``: gets each connection, non-blocking, and its peer's address; owns it from then on. It says
    on whose account that was: when this one's turn is over, what comes next waits in the backlog."""

    def __init__(
        self, worker: Worker, sock: socket.socket, name: str, begin: Callable[[socket.socket, str], Account | None]
    ) -> None:
        self._worker, self._sock, self._name, self._begin = worker, sock, name, begin
        self._fd = sock.fileno()
        self.closed = self._paused = False
        sock.setblocking(False)
        worker.loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Accepts no more; what is open stays. What waits in the backlog is for whoever else holds the socket."""
        if not self.closed:
            self.closed = True
            self._worker.loop.remove_reader(self._fd)
            self._sock.close()

    def _readable(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            if self.closed or self._paused:  # by what `begin` set off
                return
            started = perf_counter()
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # that one left before its turn
                continue
            except OSError as error:  # what is open goes on, the rest waits
                self._worker.log.warning("accept failed", listener=self._name, error=str(error), pause_s=PAUSE_S)
                self._worker.metrics.count("accept_paused")
                self._worker.loop.remove_reader(self._fd)
                self._worker.loop.call_later(PAUSE_S, self._again)
                return
            sock.setblocking(False)
            try:
                account = self._begin(sock, str(address[0]) if address else "")
            except Exception:  # one connection's failure is not the listener's
                sock.close()
                self._worker.log.exception("a new connection failed", listener=self._name)
                self._worker.metrics.count("accept_failed")
                continue
            if account is not None:
                account.spent += perf_counter() - started + BEGIN_S
                if account.spent > account.limit and account.over():
                    self.pause()
                    account.defer(self)

    def pause(self) -> None:
        """What comes next waits in the backlog until `proceed`."""
        if not self.closed and not self._paused:
            self._paused = True
            self._worker.loop.remove_reader(self._fd)

    def proceed(self) -> None:
        self._paused = False
        self._again()

    def _again(self) -> None:
        if not self.closed:
            self._worker.loop.add_reader(self._fd, self._readable)
