"""A dial to an endpoint of this node: a socket of its namespace, in the caller's name."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from l7proxy.target import DialError, Target

if TYPE_CHECKING:
    from l7proxy.worker import Worker


class LocalDial:
    """From the stock of the endpoint's netns, as the caller, to the endpoint's address."""

    __slots__ = ("failed", "protocol", "target", "task", "worker")

    def __init__(self, worker: Worker, target: Target, protocol: asyncio.Protocol, failed: Callable[[DialError], None]) -> None:
        self.worker, self.target, self.protocol, self.failed = worker, target, protocol, failed
        self.task: asyncio.Task[None] = worker.loop.create_task(self._run())

    def cancel(self) -> None:
        self.task.cancel()

    async def _run(self) -> None:
        sock: socket.socket | None = None
        try:
            sock = await self._socket()
            async with asyncio.timeout(self.worker.config.mesh.connect_timeout_s):
                self.worker.kernel.set_caller(sock, self.target.caller)
                await self.worker.loop.sock_connect(sock, (self.target.address, self.target.port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self.worker.loop.create_connection(lambda: self.protocol, sock=sock)
            return
        except DialError as error:
            outcome = error
        except TimeoutError:
            outcome = DialError("connect_timeout", f"{self._where()} did not answer")
        except ConnectionRefusedError:
            outcome = DialError("connect_refused", f"{self._where()} refused the connection")
        except PermissionError:
            over = self.worker.lease.over(self.worker.config.mesh.policy_lease_s)  # the kernel looks at the same clock
            outcome = DialError("lease_expired") if over else DialError("dial_denied", f"{self._where()} may not be dialled")
        except OSError as error:
            outcome = DialError("connect_reset", f"{self._where()}: {error.strerror or error}")
        except asyncio.CancelledError:
            if sock is not None:
                sock.close()
            raise
        if sock is not None:
            sock.close()
        self.failed(outcome)

    async def _socket(self) -> socket.socket:
        worker, target = self.worker, self.target
        key = f"Workload/{target.workload.namespace}/{target.workload.name}"
        local = worker.config.local.get(key)
        if local is None:
            raise DialError("no_endpoints", f"{key} left this node")
        family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
        sock = worker.stock.take(local.netns, family)
        if sock is None:
            waiter: asyncio.Future[socket.socket | None] = worker.loop.create_future()
            worker.stock.wait(local.netns, family, lambda found: _give(waiter, found), worker.config.mesh.connect_timeout_s)
            sock = await waiter
        if sock is None:
            raise DialError("no_stock", f"no socket for {key}", elsewhere=True)
        return sock

    def _where(self) -> str:
        workload = self.target.workload
        return f"Workload {workload.namespace}/{workload.name} port {self.target.port}"


def _give(waiter: asyncio.Future[socket.socket | None], sock: socket.socket | None) -> None:
    if not waiter.done():
        waiter.set_result(sock)
    elif sock is not None:
        sock.close()
