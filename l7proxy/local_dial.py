"""A dial to an endpoint of this node: a socket of its namespace, in the caller's name."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

from l7proxy.target import DialError, Target
from l7proxy.transport import SocketTransport

if TYPE_CHECKING:
    from l7proxy.worker import Worker


class LocalDial:
    """From the stock of the endpoint's netns, as the caller, to the endpoint's address. ``protocol`` hears connection_made, or
    ``failed`` is called; neither from within the constructor."""

    __slots__ = ("_failed", "_next", "_protocol", "_sock", "_target", "_worker", "_writing")

    def __init__(self, worker: Worker, target: Target, protocol: asyncio.Protocol, failed: Callable[[DialError], None]) -> None:
        self._worker, self._target, self._protocol = worker, target, protocol
        self._failed: Callable[[DialError], None] | None = failed  # None: given up
        self._sock: socket.socket | None = None
        self._next: asyncio.Handle | None = None  # what comes by itself
        self._writing = False
        key = _key(target)
        local = worker.config.local.get(key)
        if local is None:
            self._next = worker.loop.call_soon(self._fail, DialError("no_endpoints", f"{key} left this node"))
            return
        family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
        sock = worker.stock.take(local.netns, family)
        if sock is not None:
            self._connect(sock)
        else:
            worker.stock.wait(local.netns, family, self._stocked, worker.config.mesh.connect_timeout_s)

    def cancel(self) -> None:
        """Neither outcome is wanted any more."""
        self._failed = None
        sock = self._release()
        if sock is not None:
            sock.close()

    def _stocked(self, sock: socket.socket | None) -> None:
        if self._failed is None:
            if sock is not None:
                sock.close()
        elif sock is None:
            self._fail(DialError("no_stock", f"no socket for {_key(self._target)}"))
        else:
            started = perf_counter()
            self._connect(sock)
            self._spend(perf_counter() - started)

    def _connect(self, sock: socket.socket) -> None:
        worker, target = self._worker, self._target
        loop = worker.loop
        self._sock = sock
        try:
            worker.kernel.set_caller(sock, target.caller)
            code = sock.connect_ex((target.address, target.port))
            if code == errno.EINPROGRESS:  # within one kernel the handshake is over by now: asking is less than waiting
                code = sock.connect_ex((target.address, target.port))
        except OSError as error:
            self._next = loop.call_soon(self._refused, error)
            return
        if not code:
            self._next = loop.call_soon(self._made)
        elif code in (errno.EINPROGRESS, errno.EALREADY):
            self._writing = True
            loop.add_writer(sock.fileno(), self._writable)
            self._next = loop.call_later(worker.config.mesh.connect_timeout_s, self._late)
        else:
            self._next = loop.call_soon(self._refused, OSError(code, os.strerror(code)))

    def _writable(self) -> None:
        if self._sock is None:
            return
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._refused(OSError(code, os.strerror(code)))
        else:
            self._made()

    def _made(self) -> None:
        started = perf_counter()
        sock = self._release()
        if sock is None:
            return
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            sock.close()
            self._fail(self._reason(error))
            return
        SocketTransport(self._worker.loop, sock, self._protocol)
        self._spend(perf_counter() - started)

    def _spend(self, seconds: float) -> None:
        caller = self._target.caller
        self._worker.budgets.of(caller.identity, caller.spiffe).spent += seconds

    # ---- failures

    def _late(self) -> None:
        self._end(DialError("connect_timeout", f"{self._where()} did not answer"))

    def _refused(self, error: OSError) -> None:
        self._end(self._reason(error))

    def _reason(self, error: OSError) -> DialError:
        if isinstance(error, ConnectionRefusedError):
            return DialError("connect_refused", f"{self._where()} refused the connection")
        if isinstance(error, PermissionError):
            over = self._worker.lease.over(self._worker.config.mesh.policy_lease_s)  # the kernel looks at the same clock
            return DialError("lease_expired") if over else DialError("dial_denied", f"{self._where()} may not be dialled")
        if isinstance(error, TimeoutError):
            return DialError("connect_timeout", f"{self._where()} did not answer")
        return DialError("connect_reset", f"{self._where()}: {error.strerror or error}")

    def _end(self, error: DialError) -> None:
        sock = self._release()
        if sock is not None:
            sock.close()
        self._fail(error)

    def _fail(self, error: DialError) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            failed(error)

    def _release(self) -> socket.socket | None:
        """The socket, which nobody waits for any more."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        sock, self._sock = self._sock, None
        if sock is not None and self._writing:
            self._worker.loop.remove_writer(sock.fileno())
        return sock

    def _where(self) -> str:
        workload = self._target.workload
        return f"Workload {workload.namespace}/{workload.name} port {self._target.port}"


def _key(target: Target) -> str:
    return f"Workload/{target.workload.namespace}/{target.workload.name}"
