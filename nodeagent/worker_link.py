"""One connection to a worker of the proxy: frames of mesh.link both ways, with their descriptors. What a worker sends is
untrusted: bounded, and closed when it does not keep to the framing."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable

from mesh import link

READ_BYTES = 256 << 10
FDS_PER_READ = 253  # what the kernel puts into one message
READS_PER_TURN_MAX = 4
OUT_BYTES_MAX = 256 << 20  # several whole states; past it the worker is not reading
STOCK_ASK_MAX = 4096
STOCK_RATE = 20_000.0  # sockets per second for one worker, and as many at once


class WorkerLink:
    """One connection. Frames leave in order; descriptors ride with the first byte of theirs."""

    def __init__(self, name: str, sock: socket.socket, on_message: Callable[[WorkerLink, link.Message, list[int]], None]) -> None:
        self.name, self._sock, self._on_message = name, sock, on_message
        self._loop = asyncio.get_running_loop()
        self._decoder = link.Decoder()
        self._out: deque[tuple[memoryview, list[int], list[int]]] = deque()  # bytes, descriptors, those of them to close
        self._out_bytes = 0
        self._writing = False
        self.closed: asyncio.Future[str] = self._loop.create_future()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.pid = 0
        self.index, self.generation = -1, 0
        self.leaving = self.drains = self.hurries = False  # it ends by plan; takes nothing new any more; has no time left
        self.leaves_s = 0.0  # how long it may go on with what is open
        self.broke = False  # the framing, and was hung up on
        self.acked_revision = self.leased_ns = 0
        self.equipped = False
        self.listeners: set[str] = set()
        self.svids: dict[str, str] = {}  # spiffe -> serial sent
        self.stocked: set[tuple[int, int]] = set()
        self.forwards: frozenset[int] = frozenset()
        self.scrape: asyncio.Future[str] | None = None
        self._allowance, self._allowed_at = STOCK_RATE, time.monotonic()
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def close(self, reason: str) -> None:
        """Once; `closed` then has the reason."""
        if self.closed.done():
            return
        self._loop.remove_reader(self._sock)
        if self._writing:
            self._loop.remove_writer(self._sock)
        for _, _, owned in self._out:
            close_all(owned)
        self._out.clear()
        close_all(self._decoder.take_fds())
        self._sock.close()
        if self.scrape is not None and not self.scrape.done():
            self.scrape.set_result("")
        self.closed.set_result(reason)

    def send(self, message: link.Message, fds: Iterable[int] = (), owned: bool = False) -> None:
        """Queues a frame. ``owned``: the descriptors are closed when they are sent, or never will be."""
        fds = list(fds)
        if self.closed.done():
            close_all(fds if owned else [])
            return
        try:
            data = link.encode(message, len(fds))
        except link.LinkError as error:
            close_all(fds if owned else [])
            self.close(str(error))
            return
        self._out.append((memoryview(data), fds, fds if owned else []))
        self._out_bytes += len(data)
        if self._out_bytes > OUT_BYTES_MAX:
            self.close(f"the worker does not read: {self._out_bytes} bytes wait")
        elif not self._writing:
            self._write()

    def _write(self) -> None:
        while self._out:
            data, fds, owned = self._out[0]
            try:
                control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self._sock.sendmsg([data], control, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self.close(f"send: {error}")
                return
            close_all(owned)
            self._out_bytes -= sent
            if sent < len(data):
                self._out[0] = (data[sent:], [], [])
            else:
                self._out.popleft()
        if bool(self._out) != self._writing:
            self._writing = bool(self._out)
            if self._writing:
                self._loop.add_writer(self._sock, self._write)
            else:
                self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        for _ in range(READS_PER_TURN_MAX):
            try:
                data, fds, flags, _ = socket.recv_fds(self._sock, READ_BYTES, FDS_PER_READ, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self.close(f"receive: {error}")
                return
            if not data or flags & socket.MSG_CTRUNC:
                close_all(fds)
                self.broke = bool(data)
                self.close("descriptors were lost on the way" if data else "closed by the worker")
                return
            try:
                messages = self._decoder.feed(data, fds)
            except link.LinkError as error:
                self.broke = True
                self.close(f"broke the framing: {error}")
                return
            if self._decoder.fds_waiting > link.FRAME_FDS_MAX:
                self.broke = True
                self.close("sends descriptors that belong to no frame")
                return
            for message, its_fds in messages:
                if self.closed.done():
                    close_all(its_fds)
                elif isinstance(message, (link.Pair, link.Leg)):
                    self._on_message(self, message, its_fds)
                else:
                    close_all(its_fds)  # a worker has no others to give
                    self._on_message(self, message, [])
            if self.closed.done():
                return

    def allow_stock(self, count: int) -> int:
        """How many of ``count`` sockets the worker may have now."""
        now = time.monotonic()
        self._allowance = min(STOCK_RATE, self._allowance + (now - self._allowed_at) * STOCK_RATE)
        self._allowed_at = now
        granted = max(0, min(count, STOCK_ASK_MAX, int(self._allowance)))
        self._allowance -= granted
        return granted


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass  # closed before: nothing to do about it


def duplicates(fds: Iterable[int]) -> list[int]:
    """All or none: raises OSError."""
    own: list[int] = []
    try:
        own += (os.dup(fd) for fd in fds)
    except OSError:
        close_all(own)
        raise
    return own
