"""TLS on a socket we own, on the event loop: memory BIOs around one recv_into and one send a turn.

Why not the loop's own TLS: one read of 256 KiB feeds sixteen records, the buffers are shared by all channels
of the process, and the caller sees back-pressure as a plain flag.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import deque
from itertools import islice
from socket import (
    IPPROTO_TCP,
    SO_KEEPALIVE,
    SOL_SOCKET,
    TCP_KEEPCNT,
    TCP_KEEPIDLE,
    TCP_KEEPINTVL,
    TCP_NODELAY,
    TCP_USER_TIMEOUT,
    socket,
)
from time import perf_counter
from typing import Protocol

from l7proxy.budget import Account
from l7proxy.handshakes import handshakes
from l7proxy.seal import CHUNK_BYTES, seal
from l7proxy.transport import drop, unwatched

READ_BYTES = 256 << 10
RECORD_BYTES_MAX = 16 << 10  # TLS plaintext record
WIRE_BYTES_MAX = RECORD_BYTES_MAX + 261  # the same encrypted (RFC 8446, 5.2)
# A node that vanished is noticed within 30 s, busy or idle.
_OPTIONS = (
    (IPPROTO_TCP, TCP_NODELAY, 1),
    (SOL_SOCKET, SO_KEEPALIVE, 1),
    (IPPROTO_TCP, TCP_KEEPIDLE, 15),
    (IPPROTO_TCP, TCP_KEEPINTVL, 5),
    (IPPROTO_TCP, TCP_KEEPCNT, 3),
    (IPPROTO_TCP, TCP_USER_TIMEOUT, 30_000),
)
FEED_BYTES = CHUNK_BYTES - RECORD_BYTES_MAX  # what is left in there is less than a record
PIECES_MAX = 256  # for one system call
PIECE_BYTES_MIN = 256  # of what one read brought, handed on between two looks at the clock


class _Buffers(threading.local):
    """One of each for a loop: a read is used up before the next begins."""

    def __init__(self) -> None:
        self.cipher = memoryview(bytearray(READ_BYTES))
        self.plain = memoryview(bytearray(READ_BYTES))


_buffers = _Buffers()


class ChannelHandler(Protocol):
    def channel_open(self) -> None:
        """The handshake is done."""

    def channel_data(self, data: memoryview) -> None:
        """Plaintext; the view is valid during the call only."""

    def channel_held(self, size: int) -> bool:
        """So many encrypted bytes more (negative: fewer) wait for the kernel. False: too many, the channel is ended."""

    def channel_drained(self) -> None:
        """What `send` could not hand to the kernel has gone."""

    def channel_lost(self, error: Exception | None) -> None:
        """Once, last. None: the peer closed."""


class TlsChannel:
    """``sock``: connected and non-blocking; owned. Callbacks come from the loop, never from within a call of ours,
    except `channel_lost`, which `send` and `abort` defer with call_soon.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket,
        context: ssl.SSLContext,
        handler: ChannelHandler,
        *,
        server_side: bool,
        server_name: str | None = None,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._handler = handler
        self._cipher, self._plain = _buffers.cipher, _buffers.plain
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_side=server_side, server_hostname=server_name)
        self.meter: Account | None = None  # whose time reading costs
        self.open = self.closed = False
        self.blocked = False  # the kernel's buffer is full; `channel_drained` follows
        self._closing = self._aborted = self._reading = False
        self._shaking = False  # a step of the handshake is under way: TLS is another thread's
        self._since = 0.0  # what was read since then is not on the meter yet
        self._piece = PIECE_BYTES_MIN  # while another identity is at work
        self._more = False  # what was read is not all handed on: its meter's turn was over
        self._unfed = memoryview(b"")  # read, and not yet given to TLS
        self._rest: deque[bytes | memoryview] = deque()  # encrypted, and not yet taken by the kernel
        self.kept = 0  # bytes in it
        for level, option, value in _OPTIONS:
            sock.setsockopt(level, option, value)
        if server_side:
            self.resume()
        else:
            loop.call_soon(self._shake)

    # ---- reading

    def resume(self) -> None:
        if not (self._reading or self._shaking or self.closed):
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def proceed(self) -> None:
        """The meter's next turn."""
        if self.closed or self._closing:
            return
        if self._more:
            self._more, self._since = False, perf_counter()
            self._decrypt()
            self._charge()
        if not self._more:
            self.resume()

    def _readable(self) -> None:
        meter = self.meter
        if meter is not None and meter.spent > meter.limit and meter.over():
            self.pause()
            meter.defer(self)
            return
        self._since = perf_counter()
        self._read()
        self._charge()

    def _charge(self) -> float:
        """Seconds that go onto the meter."""
        since, self._since = self._since, perf_counter()
        if self.meter is not None:
            self.meter.spent += self._since - since
        return self._since - since

    def _turn_is_over(self, meter: Account) -> bool:
        """After a piece. Pieces grow while they are cheap: bytes cost little, frames of a few bytes much."""
        cost = self._charge()
        if cost > meter.quota / 2:
            self._piece = max(self._piece // 2, PIECE_BYTES_MIN)
        elif cost < meter.quota / 8:
            self._piece = min(self._piece * 2, READ_BYTES)
        return meter.spent > meter.limit and meter.over()

    def _read(self) -> None:
        try:
            size = self._sock.recv_into(self._cipher)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if size == 0:
            self._lose(None if self.open else ConnectionResetError("the peer closed during the TLS handshake"))
            return
        if unwatched(self._sock):
            self._loop.call_soon(self._readable)
        self._unfed = self._cipher[:size]
        if self.open:
            self._decrypt()
        else:
            self._feed()
            self._shake()
        if self._unfed:  # put off; the buffer is everybody's
            self._unfed = memoryview(bytes(self._unfed))

    def _feed(self) -> bool:
        """The next of what was read goes to TLS. False: there is no more."""
        unfed = self._unfed
        if not unfed:
            return False
        self._in.write(unfed[:FEED_BYTES])
        self._unfed = unfed[FEED_BYTES:]
        return True

    def _decrypt(self) -> None:
        tls, incoming, plain, meter = self.tls, self._in, self._plain, self.meter
        filled, ended = 0, False
        most = self._piece if meter is not None and meter.crowded else READ_BYTES
        try:
            while not ended and not self.closed and not self._aborted:
                if self._unfed and incoming.pending < WIRE_BYTES_MAX:  # or a record's end is missing, and that costs an exception
                    self._feed()
                try:
                    got = tls.read(min(most - filled, RECORD_BYTES_MAX), plain[filled:])
                except ssl.SSLWantReadError:
                    if self._feed():
                        continue
                    break
                if not got:
                    ended = True
                filled += int(got)  # an int when a buffer is given
                if filled >= most or READ_BYTES - filled < RECORD_BYTES_MAX:
                    self._handler.channel_data(plain[:filled])
                    filled = 0
                    if meter is not None and meter.crowded and not self.closed and not self._closing:
                        if self._turn_is_over(meter):
                            self._more = True
                            self.pause()
                            meter.defer(self)
                            break
                        most = self._piece
                if not incoming.pending and not tls.pending() and not self._feed():
                    break
        except ssl.SSLZeroReturnError:
            ended = True
        except (ssl.SSLError, OSError) as error:
            if filled and not self.closed:
                self._handler.channel_data(plain[:filled])
            self._lose(error)
            return
        if filled and not (self.closed or self._aborted):
            self._handler.channel_data(plain[:filled])
        if self._aborted:  # the reason follows
            return
        if ended:
            self._lose(None)
        elif self._out.pending:
            self._push()  # a key update's answer

    # ---- the handshake

    def _shake(self) -> None:
        """Its next step, with the bytes that TLS was fed."""
        if self.closed:
            return
        self._shaking = True
        self.pause()
        handshakes(self._loop).ask(self)

    def stepped(self, error: Exception | None) -> None:
        """See `Shaking`."""
        self._shaking, self._since = False, perf_counter()
        if isinstance(error, ssl.SSLWantReadError):
            self._push()
            self._shake() if self._feed() else self.resume()
        elif error is not None:
            self._push()  # the alert
            self._lose(error)
        else:
            self.open = True
            self._handler.channel_open()  # its first bytes leave with the handshake's last
            self._push()
            if self._in.pending or self._unfed:
                self._decrypt()
            if not (self._more or self._closing or self._aborted):
                self.resume()
        self._charge()

    # ---- writing

    def send(self, pieces: list[bytes | memoryview]) -> None:
        """Encrypt and send. What the kernel does not take now is kept: look at ``blocked`` before sending more."""
        if self.closed or self._closing:
            return
        try:
            sealed = seal(self.tls, self._out, pieces)
        except (ssl.SSLError, OSError) as error:
            self._loop.call_soon(self._lose, error)
            return
        self._give(sealed)

    def send_whole(self, data: bytes) -> None:
        """The same for what is one small piece already: nearly all that is sent."""
        if self.closed or self._closing or self.blocked or len(data) > CHUNK_BYTES:
            self.send([data])
            return
        try:
            self.tls.write(data)
            sealed = self._out.read()
        except (ssl.SSLError, OSError) as error:
            self._loop.call_soon(self._lose, error)
            return
        try:
            sent = self._sock.send(sealed)
        except OSError:
            sent = 0  # the next try tells why
        if sent < len(sealed):
            self._give([sealed[sent:]])

    def _push(self) -> None:
        """What TLS has to say for itself."""
        if data := self._out.read():
            self._give([data])

    def _give(self, sealed: list[bytes]) -> None:
        """To the kernel, as far as it takes it."""
        if self.closed or not sealed:
            return
        total, sent = sum(map(len, sealed)), 0
        if not self.blocked:
            try:
                sent = self._sock.send(sealed[0]) if len(sealed) == 1 else self._sock.sendmsg(sealed[:PIECES_MAX])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self._loop.call_soon(self._lose, error)
                return
            if sent == total:
                return
            self.blocked = True
            self._loop.add_writer(self._fd, self._writable)
        self._rest += sealed
        self.kept += total
        self._took(sent)
        if not self._handler.channel_held(total - sent):
            self.abort(ConnectionAbortedError("too much waits for a peer that does not read"))

    def _took(self, sent: int) -> None:
        self.kept -= sent
        drop(self._rest, sent)

    def _writable(self) -> None:
        try:
            sent = self._sock.sendmsg(islice(self._rest, PIECES_MAX))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        self._took(sent)
        self._handler.channel_held(-sent)
        if not self._rest:
            self.blocked = False
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._lose(None)
            else:
                self._handler.channel_drained()

    # ---- the end

    def close(self) -> None:
        """Send what is kept and close_notify, then close. `channel_lost` follows."""
        if self.closed or self._closing:
            return
        if self.open:
            try:
                self.tls.unwrap()
            except (ssl.SSLError, OSError):
                pass  # the peer's close_notify is not waited for
            self._push()
        self._closing = True
        self.pause()
        if not self.blocked:
            self._loop.call_soon(self._lose, None)

    def abort(self, error: Exception | None = None) -> None:
        """Close now, dropping what is kept. `channel_lost` follows."""
        self._aborted = True
        self._loop.call_soon(self._lose, error)

    def _lose(self, error: Exception | None) -> None:
        if self.closed:
            return
        self.closed = True
        self.pause()
        if self.blocked:
            self._loop.remove_writer(self._fd)
        self._rest.clear()
        if self.kept:
            self._handler.channel_held(-self.kept)
            self.kept = 0
        self._sock.close()
        handler = self._handler
        del self._handler  # each knows the other: else TLS and its buffers would stay until the collector comes, all at once
        handler.channel_lost(error)
