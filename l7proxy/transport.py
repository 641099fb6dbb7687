"""A connected socket as an asyncio transport, on nothing but the loop's readiness: made at once, without task or waiter, so
that a connection of a few requests does not cost more to open than to use. What is written goes to the kernel at once."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from socket import IPPROTO_TCP, SHUT_WR, SO_RCVBUF, SOL_SOCKET, TCP_INFO, socket
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l7proxy.budget import Account

READ_FIRST_BYTES = 16_384  # what is asked for at first: most messages are smaller
READ_BYTES = 256_000  # once that was not enough
HIGH_BYTES, LOW_BYTES = 65_536, 16_384  # kept for a peer that does not read: pause_writing above, resume_writing at the low mark
PIECES_MAX = 256  # for one system call
RECEIVED_BYTES_MAX = 4 << 20  # in the kernel for one socket, where the node's `rmem_max` allows so much
_NOBODY = asyncio.Protocol()
_TCP_CLOSE = b"\x07"


def drop(rest: deque[bytes | memoryview], sent: int) -> None:
    """What the kernel took of the pieces that waited."""
    while sent:
        first = rest.popleft()
        if sent < len(first):
            rest.appendleft(memoryview(first)[sent:])
            break
        sent -= len(first)


def bound(sock: socket) -> None:
    """What a workload sends waits in the workload, past RECEIVED_BYTES_MAX: by itself TCP would keep up to `tcp_rmem` (32 MiB on
    new kernels) for each socket of a proxy that is late, in nobody's account. Connections that ``sock`` accepts have it, too."""
    sock.setsockopt(SOL_SOCKET, SO_RCVBUF, RECEIVED_BYTES_MAX // 2)  # the kernel doubles it


def unwatched(sock: socket) -> bool:
    """Whether it has ended by RST, with bytes before it that may have been read by now: libuv tells of an error once, along
    with those, and watches no more. So whoever read some and needs more to go on asks, or would wait for ever."""
    try:
        return sock.getsockopt(IPPROTO_TCP, TCP_INFO, 1) == _TCP_CLOSE
    except OSError:  # closed here, or not TCP
        return False


class SocketTransport(asyncio.Transport):
    """Owns ``sock``, connected and non-blocking. Its protocol has heard `connection_made` when this returns.

    A protocol with a ``meter`` (the account of an identity) is not read for while that one's turn is over, if it ``waits()``:
    many connections that have something to say at once would be a long turn, even if each was only read and put off."""

    __slots__ = (
        "_blocked", "_closing", "_ended", "_eof", "_fd", "_hear", "_kept", "_loop", "_meter", "_over", "_paused", "_protocol",
        "_put_off", "_read_bytes", "_reading", "_recv", "_rest", "_send", "_sock", "_writing",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket, protocol: asyncio.Protocol) -> None:
        self._loop, self._sock, self._protocol = loop, sock, protocol
        self._fd, self._recv, self._send = sock.fileno(), sock.recv, sock.send
        self._hear = protocol.data_received
        self._read_bytes = READ_FIRST_BYTES
        self._rest: deque[bytes | memoryview] | None = None  # not yet taken by the kernel
        self._kept = 0  # bytes in it
        self._reading = self._writing = False  # the loop watches for it
        self._paused = False  # by the protocol
        self._meter: Account | None = getattr(protocol, "meter", None)
        self._put_off = False  # waits for its identity's next turn
        self._blocked = False  # the protocol was told to pause
        self._ended = False  # FIN has come
        self._eof = False  # FIN is to go, or gone
        self._closing = False
        self._over = False  # `connection_lost` is on its way
        protocol.connection_made(self)
        if not (self._closing or self._paused):
            self._reading = True
            loop.add_reader(self._fd, self._readable)

    # ---- reading

    def _readable(self) -> None:
        if self._paused or self._closing or self._ended:
            self._stop_reading()
            return
        meter = self._meter
        if meter is not None and meter.shut and self._protocol.waits():  # type: ignore[attr-defined]  # who has a meter has it
            self._stop_reading()
            if not self._put_off:
                self._put_off = True
                meter.defer(self)
            return
        size, recv, hear = self._read_bytes, self._recv, self._hear  # called from a local: a method in a slot is looked up dearly
        try:
            data = recv(size)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(error)
            return
        try:
            if data:
                if len(data) == size:
                    self._read_bytes = READ_BYTES
                elif size > READ_FIRST_BYTES >= len(data):
                    self._read_bytes = READ_FIRST_BYTES
                hear(data)
            else:
                self._ended = True
                self._stop_reading()
                if not self._protocol.eof_received():
                    self.close()
        except Exception as error:
            self._broken(error)

    def more(self) -> None:
        """What was read is not all that its protocol needs: see `unwatched`."""
        if self._reading and not self._closing and unwatched(self._sock):
            self._loop.call_soon(self._readable)

    def proceed(self) -> None:
        """Its identity's next turn. What reading costs counts, too."""
        self._put_off = False
        meter = self._meter
        if meter is None or self._paused or self._closing or self._ended:
            return
        before, started = meter.spent, perf_counter()
        self.resume_reading()
        self._readable()
        meter.spent = max(meter.spent, before + perf_counter() - started)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def pause_reading(self) -> None:
        """The loop is told only once there is something to read: most pauses are shorter."""
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        if not (self._reading or self._closing or self._ended):
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def is_reading(self) -> bool:
        return not (self._paused or self._closing or self._ended)

    # ---- writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        sent = 0
        if not (self._rest or self._eof or self._over):  # nearly always
            send = self._send
            try:
                sent = send(data)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self._fail(error)
                return
            if sent == len(data):
                return
        elif self._eof:
            raise RuntimeError("bug: written after write_eof")
        elif self._over or not data:
            return
        if self._rest is None:
            self._rest = deque()
        left: bytes | memoryview = data if isinstance(data, bytes) else bytes(data)  # the caller's buffer may change
        self._rest.append(memoryview(left)[sent:] if sent else left)
        self._kept += len(left) - sent
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._fd, self._writable)
        if self._kept > HIGH_BYTES and not self._blocked:
            self._blocked = True
            self._protocol.pause_writing()

    def _writable(self) -> None:
        rest = self._rest
        if not rest:
            self._stop_writing()
            return
        try:
            sent = self._send(rest[0]) if len(rest) == 1 else self._sock.sendmsg(islice(rest, PIECES_MAX))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(error)
            return
        self._kept -= sent
        drop(rest, sent)
        if not rest:
            self._stop_writing()
        try:
            if self._blocked and self._kept <= LOW_BYTES:
                self._blocked = False
                self._protocol.resume_writing()
        except Exception as error:
            self._broken(error)
            return
        if not rest:
            if self._closing:
                self._end(None)
            elif self._eof:
                self._shut()

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)

    def get_write_buffer_size(self) -> int:
        return self._kept

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """FIN, once all is sent."""
        if not (self._eof or self._closing):
            self._eof = True
            if not self._rest:
                self._shut()

    def _shut(self) -> None:
        try:
            self._sock.shutdown(SHUT_WR)
        except OSError:
            pass  # the peer was faster; reading tells

    # ---- the end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Once all is sent. `connection_lost` follows."""
        if not self._closing:
            self._closing = True
            self._stop_reading()
            if not self._rest:
                self._end(None)

    def abort(self) -> None:
        """At once."""
        self._fail(None)

    def _fail(self, error: Exception | None) -> None:
        if self._over:
            return
        self._closing = True
        self._rest, self._kept = None, 0
        self._stop_reading()
        self._stop_writing()
        self._end(error)

    def _broken(self, error: Exception) -> None:
        """The protocol failed: its connection ends, the others go on."""
        self._loop.call_exception_handler({"message": "a connection's protocol failed", "exception": error, "transport": self})
        self._fail(error)

    def _end(self, error: Exception | None) -> None:
        if not self._over:
            self._over = True
            self._loop.call_soon(self._lost, error)

    def _lost(self, error: Exception | None) -> None:
        protocol = self._protocol
        try:
            protocol.connection_lost(error)
        finally:
            self._sock.close()
            self.set_protocol(_NOBODY)  # no cycle stays for the collector

    # ---- whose it is

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol  # type: ignore[assignment]  # asyncio.Protocol, as in the constructor
        self._hear = protocol.data_received  # type: ignore[attr-defined]  # the same
        self._meter = getattr(protocol, "meter", None)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``socket`` is all there is."""
        return self._sock if name == "socket" else default
