"""The steps of TLS handshakes, beside the loop: one takes OpenSSL up to a millisecond and cannot be put off half way, so a thread
does them, which holds no lock of Python's meanwhile. One at a time, by turns among the identities that pay for them; all but the
step itself happens on the loop."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import OrderedDict, deque
from functools import partial
from queue import SimpleQueue
from time import thread_time
from typing import Protocol

from l7proxy.budget import Account
from l7proxy.scheduling import patient


class Shaking(Protocol):
    """A connection whose handshake is under way."""

    closed: bool
    meter: Account | None
    tls: ssl.SSLObject

    def stepped(self, error: Exception | None) -> None:
        """On the loop: the step is done. None: the handshake, too; SSLWantReadError: it needs more of the peer's bytes."""


class Handshakes:
    """Of one loop. From `ask` until `stepped`, nobody else may touch ``tls`` and its buffers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: OrderedDict[Account | None, deque[Shaking]] = OrderedDict()
        self._busy = False
        self._steps: SimpleQueue[Shaking | None] = SimpleQueue()  # one at most
        self._thread: threading.Thread | None = None

    def ask(self, one: Shaking) -> None:
        """Bounded by what may shake hands at a time."""
        self._waiting.setdefault(one.meter, deque()).append(one)
        if not self._busy:
            self._next()

    def end(self) -> None:
        """The loop is no more."""
        self._steps.put(None)

    def _next(self) -> None:
        while self._waiting:
            meter, theirs = self._waiting.popitem(last=False)
            one = theirs.popleft()
            if theirs:
                self._waiting[meter] = theirs  # after everybody else
            if not one.closed:
                self._busy = True
                if self._thread is None:
                    self._thread = threading.Thread(target=_run, args=(self._steps, self), name="handshakes", daemon=True)
                    self._thread.start()
                self._steps.put(one)
                return

    def done(self, one: Shaking, error: Exception | None, seconds: float) -> None:
        self._busy = False
        self._next()
        if one.meter is None:
            _tell(one, error)
        else:
            one.meter.spent += seconds
            one.meter.when_due(partial(_tell, one, error))


def _tell(one: Shaking, error: Exception | None) -> None:
    if not one.closed:
        one.stepped(error)


def _run(steps: SimpleQueue[Shaking | None], desk: Handshakes) -> None:
    patient()
    while (one := steps.get()) is not None:
        error: Exception | None = None
        started = thread_time()
        try:
            one.tls.do_handshake()
        except Exception as problem:  # the connection's, whatever it is
            error = problem
        try:
            desk.loop.call_soon_threadsafe(desk.done, one, error, thread_time() - started)
        except RuntimeError:  # the loop was closed
            return
        del one, error


class _Here(threading.local):
    desk: Handshakes | None = None


_here = _Here()


def handshakes(loop: asyncio.AbstractEventLoop) -> Handshakes:
    """Those of the loop that runs in this thread."""
    desk = _here.desk
    if desk is None or desk.loop is not loop:
        if desk is not None:
            desk.end()
        desk = _here.desk = Handshakes(loop)
    return desk
