"""Request and response, one exchange after the other, as events in and commands out; no I/O.

Events are the public methods (`client_data`, `upstream_lost`, `timeout`, …); commands are the methods a
subclass gives (`decide`, `to_client`, `to_upstream`, …). On `decide(head)` the subclass answers, at once or
later, with `forward` (an upstream is attached) or `refuse`. Bytes go through as they came. One exchange runs
at a time, so pipelined requests wait in ``pending`` and answers keep their order.

    request side:   IDLE -> WAITING (decide) -> BODY -> SENT -> IDLE …      RAW after a matching 101
    response side:  NONE -> HEAD -> BODY -> NONE …                          CLOSED: only lingering is left
"""

from __future__ import annotations

from collections.abc import Callable

from l7proxy.errors import Reply, reply
from l7proxy.http1.body import BodyError, Chunked
from l7proxy.http1.head import CHUNKED, NO_BODY, UNTIL_CLOSE, HeadError, Heads, RequestHead, ResponseHead, bad_start

IDLE, WAITING, BODY, SENT, RAW, CLOSED = range(6)
NONE, HEAD = IDLE, WAITING  # the response side's names; BODY and RAW are shared

INTERIM_MAX = 16  # 1xx responses before the final one
LINGER_S = 2.0  # how long a closed connection is read and discarded, so that the reply is not lost to a RST
LINGER_BYTES_MAX = 1 << 20
RESPONSE_HEAD_BYTES_MAX = 65536
NEVER = float("inf")


class Clock:
    """Coarse time in seconds, moved on by one sweep per second."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0.0


class Limits:
    """What MeshConfig says of HTTP."""

    __slots__ = ("head_bytes_max", "head_timeout_s", "idle_timeout_s", "request_timeout_s")

    def __init__(
        self,
        head_bytes_max: int = 32768,
        head_timeout_s: float = 10.0,
        idle_timeout_s: float = 3600.0,
        request_timeout_s: float = 15.0,
    ) -> None:
        self.head_bytes_max = head_bytes_max
        self.head_timeout_s = head_timeout_s
        self.idle_timeout_s = idle_timeout_s
        self.request_timeout_s = request_timeout_s


class Cycle:
    """One client connection and the upstream connection of its current exchange."""

    __slots__ = (
        "advancing", "chunks", "client_ended", "client_full", "client_paused", "clock", "deadline", "heads", "interim",
        "left", "limits", "linger_bytes", "pending", "request", "response", "response_bytes", "retried", "reused", "rq", "rs",
        "to_client", "to_upstream", "upchunks", "upleft", "uppending", "upstream_ended",
    )  # fmt: skip

    to_client: Callable[[bytes], None]  # commands too, but set by the subclass to the transport's own write
    to_upstream: Callable[[bytes], None]

    def __init__(self, heads: Heads, limits: Limits, clock: Clock) -> None:
        self.heads, self.limits, self.clock = heads, limits, clock
        self.rq, self.rs = IDLE, NONE
        self.pending, self.uppending = b"", b""
        self.request: RequestHead | None = None
        self.response: ResponseHead | None = None
        self.chunks: Chunked | None = None
        self.upchunks: Chunked | None = None
        self.left = self.upleft = 0  # body bytes still to come; UNTIL_CLOSE upstream
        self.interim = 0
        self.linger_bytes = 0
        self.response_bytes = False  # the client has seen a byte of this exchange's response
        self.reused = self.retried = False
        self.client_ended = self.upstream_ended = False  # FIN has come from there
        self.client_full = False  # it does not read: no further exchange begins
        self.client_paused = False
        self.advancing = False
        self.deadline = clock.now + limits.idle_timeout_s

    # ---- commands, given by the subclass

    def decide(self, head: RequestHead) -> None:
        """A request is here: answer with `forward` or `refuse`."""
        raise NotImplementedError

    def again(self, head: RequestHead) -> None:
        """The reused connection was stale: attach a fresh one and `forward`, or `refuse`."""
        raise NotImplementedError

    def release(self, reusable: bool) -> None:
        """Detach the upstream: back to its pool, or close it."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Detach whatever is attached or being dialled, and reset it."""
        raise NotImplementedError

    def end_client(self) -> None:
        """Send what is queued, then FIN; keep reading."""
        raise NotImplementedError

    def close_client(self) -> None:
        """Send what is queued, then close."""
        raise NotImplementedError

    def reset_client(self) -> None:
        """RST: what the client has is not whole."""
        raise NotImplementedError

    def end_upstream(self) -> None:
        """FIN to the upstream (raw streams only)."""
        raise NotImplementedError

    def pause_client(self) -> None:
        raise NotImplementedError

    def resume_client(self) -> None:
        raise NotImplementedError

    def finished(self, status: int, why: str) -> None:
        """An exchange ended with this status (0: cut off); ``why`` is a reason of the proxy's own or ""."""
        raise NotImplementedError

    # ---- events from the client

    def client_data(self, data: bytes) -> None:
        rq = self.rq
        if rq == IDLE:
            if not self.pending and not self.client_full:
                head = self.heads.requests.get(data)
                if head is not None:  # one whole head seen before, the common case
                    self._begin(head)
                    return
                self.deadline = self.clock.now + self.limits.head_timeout_s
        elif rq == RAW:
            self.deadline = self.clock.now + self.limits.idle_timeout_s
            self.to_upstream(data)
            return
        elif rq == CLOSED:
            self.linger_bytes += len(data)
            if self.linger_bytes > LINGER_BYTES_MAX:
                self.close_client()
            return
        self.pending = self.pending + data if self.pending else data
        if not self.advancing:
            self._advance()

    def client_eof(self) -> None:
        self.client_ended = True
        rq = self.rq
        if rq == RAW:
            if self.upstream_ended:
                self._raw_done()
            else:
                self.end_upstream()
        elif rq in (IDLE, CLOSED):
            self.rq = CLOSED
            self.close_client()
        elif rq == BODY:
            self._cut()
        # WAITING and SENT: the answer is still wanted

    def client_blocked(self) -> None:
        """What was written waits: the client reads slowly."""
        self.client_full = True

    def client_drained(self) -> None:
        """It may be written to again."""
        self.client_full = False
        if self.rq == IDLE and self.pending and not self.advancing:
            self.deadline = self.clock.now + self.limits.head_timeout_s
            if self.client_paused:
                self._resume()
            self._advance()

    def client_lost(self) -> None:
        """The client's connection is gone, whatever the reason."""
        if self.rq not in (IDLE, CLOSED):
            self.abandon()
            self.finished(0, "client_gone")
        self.rq, self.rs, self.deadline = CLOSED, NONE, NEVER

    # ---- answers to decide

    def forward(self, data: bytes, *, reused: bool) -> None:
        """An upstream is attached: ``data`` is the head to send it."""
        head = self.request
        if head is None:
            return
        self.reused = reused
        self.rs = HEAD
        self.to_upstream(data)
        framing = head.framing
        if framing == NO_BODY:
            self.rq = SENT
            self.deadline = self.clock.now + self.limits.request_timeout_s
        else:
            self.rq = BODY
            self.deadline = self.clock.now + self.limits.idle_timeout_s
            if framing == CHUNKED:
                self.chunks = Chunked()
            else:
                self.left = framing
            if self.client_paused:
                self._resume()
            if self.pending and not self.advancing:
                self._advance()

    def refuse(self, answer: Reply) -> None:
        """Answer in the server's place. Only before any byte of a response."""
        head = self.request
        keep = (
            answer.keep
            and head is not None
            and head.keep
            and head.framing == NO_BODY
            and not head.websocket
            and head.version == 11
        )
        self.to_client(answer.encode(close=not keep, head_only=head is not None and head.method == "HEAD"))
        self.finished(answer.status, answer.reason)
        self._next(keep)

    # ---- events from the upstream

    def upstream_data(self, data: bytes) -> None:
        rs = self.rs
        if rs == HEAD:
            if self.uppending:
                data = self.uppending + data
                self.uppending = b""
            self._response(data)
        elif rs == BODY:
            self.deadline = self.clock.now + self.limits.idle_timeout_s
            self._response_body(data, 0)
        elif rs == RAW:
            self.deadline = self.clock.now + self.limits.idle_timeout_s
            self.to_client(data)

    def upstream_eof(self) -> None:
        """The server sent FIN."""
        rs = self.rs
        if rs == RAW:
            self.upstream_ended = True
            if self.client_ended:
                self._raw_done()
            else:
                self.end_client()
        elif rs == BODY and self.upleft == UNTIL_CLOSE:
            self._response_done(clean=False, close=True)
        elif rs != NONE:
            self._upstream_gone()

    def upstream_lost(self, error: Exception | None) -> None:
        """The server's connection is gone."""
        rs = self.rs
        if rs == RAW:
            if error is None:
                self._raw_done()
            else:
                self._cut()
        elif rs == BODY and self.upleft == UNTIL_CLOSE and error is None:
            self._response_done(clean=False, close=True)
        elif rs != NONE:
            self._upstream_gone()

    # ---- time

    def timeout(self) -> None:
        """``deadline`` has passed."""
        self.deadline = NEVER
        if self.rq == CLOSED:
            self.close_client()
        elif self.rq == IDLE:
            if self.pending:
                self.refuse(reply("head_timeout", keep=False))
            else:
                self.rq = CLOSED
                self.close_client()
        elif self.rq in (WAITING, SENT) and not self.response_bytes:
            self.abandon()
            self.rs = NONE
            self.refuse(reply("request_timeout", keep=False))
        else:
            self._cut()

    def end(self) -> None:
        """End politely: now when idle, else after the current exchange."""
        if self.rq == IDLE and not self.pending:
            self.rq = CLOSED
            self.close_client()
        else:
            self.client_ended = True

    def cut(self) -> None:
        """End at once: the decision this connection rests on no longer holds."""
        if self.rq != CLOSED:
            self._cut()

    # ---- request side

    def _begin(self, head: RequestHead) -> None:
        self.request = head
        self.rq = WAITING
        self.retried = self.response_bytes = False
        self.interim = 0
        self.deadline = self.clock.now + self.limits.request_timeout_s
        self.decide(head)

    def _advance(self) -> None:
        self.advancing = True
        try:
            while self.pending:
                if self.rq == IDLE:
                    if self.client_full:
                        break
                    head = self._find_head()
                    if head is None:
                        break
                    self._begin(head)
                elif self.rq == BODY:
                    if not self._request_body():
                        break
                elif self.rq == RAW:
                    data, self.pending = self.pending, b""
                    self.to_upstream(data)
                else:
                    break
        except HeadError as error:
            self.request = None
            self.refuse(Reply(error.status, error.reason, f"Refused: {error.detail}.", keep=False))
        finally:
            self.advancing = False
        waiting = self.rq in (WAITING, SENT) or (self.rq == IDLE and self.client_full)
        if waiting and not self.client_paused and len(self.pending) > self.limits.head_bytes_max:
            self.client_paused = True
            self.pause_client()

    def _find_head(self) -> RequestHead | None:
        pending = self.pending
        if bad_start(pending):
            raise HeadError(400, "bad_request", "this is not an HTTP/1.1 request line")
        end = pending.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(pending) > self.limits.head_bytes_max:
                raise HeadError(431, "head_too_large", f"the head is over {self.limits.head_bytes_max} bytes")
            return None
        if end > self.limits.head_bytes_max:
            raise HeadError(431, "head_too_large", f"the head is over {self.limits.head_bytes_max} bytes")
        head = self.heads.request(pending[:end])
        self.pending = pending[end:]
        return head

    def _request_body(self) -> bool:
        """Forward what the body takes of ``pending``. False when more bytes are needed."""
        pending = self.pending
        chunks = self.chunks
        self.deadline = self.clock.now + self.limits.idle_timeout_s
        if chunks is None:
            if len(pending) <= self.left:
                self.left -= len(pending)
                self.pending = b""
            else:
                pending, self.pending, self.left = pending[: self.left], pending[self.left :], 0
            done = not self.left
        else:
            try:
                at = chunks.feed(pending)
            except BodyError as error:
                self._bad_body(error)
                return False
            self.pending = pending[at:]
            done, pending = chunks.done, pending[:at]
            if not pending:
                return False
        if done:
            self.rq, self.chunks = SENT, None
            self.deadline = self.clock.now + self.limits.request_timeout_s
        self.to_upstream(pending)
        return True

    def _bad_body(self, error: BodyError) -> None:
        self.abandon()
        self.rs = NONE
        if self.response_bytes:
            self._cut()
        else:
            self.refuse(reply("bad_request", f"Refused: {error}.", keep=False))

    def _resume(self) -> None:
        self.client_paused = False
        self.resume_client()

    # ---- response side

    def _response(self, data: bytes) -> None:
        request = self.request
        if request is None:
            return
        while True:
            end = data.find(b"\r\n\r\n") + 4
            if end < 4 or end > RESPONSE_HEAD_BYTES_MAX:
                if len(data) > RESPONSE_HEAD_BYTES_MAX or not data.startswith(b"HTTP/1."[: len(data)]):
                    self._bad_response("the server's response head is too large or malformed")
                else:
                    self.uppending = data
                return
            raw = data[:end]
            try:
                head = self.heads.responses.get(raw) or self.heads.response(raw)
            except HeadError as error:
                self._bad_response(error.detail)
                return
            if head.status >= 200:
                break
            if head.status == 101:
                self._switch(head, data)
                return
            self.interim += 1
            if self.interim > INTERIM_MAX or request.version == 10:
                self._bad_response("the server sends interim responses without end")
                return
            self.response_bytes = True
            self.to_client(raw)
            data = data[end:]
            if not data:
                return
        self.response = head
        framing = head.framing
        if request.method == "HEAD" or head.status == 304 or head.status == 204:
            framing = NO_BODY
        elif framing == CHUNKED and request.version == 10:
            self._bad_response("the server sends chunks to an HTTP/1.0 client")
            return
        self.response_bytes = True
        if framing == len(data) - end:  # head and body in one read, the common case
            self.to_client(data)
            self._response_done(clean=True, close=False)
            return
        self.rs = BODY
        self.upleft = framing
        self.deadline = self.clock.now + self.limits.idle_timeout_s
        self._response_body(data, end)

    def _response_body(self, data: bytes, at: int) -> None:
        """Forward ``data``; what is before ``at`` is the head."""
        left = self.upleft
        if left == UNTIL_CLOSE:
            self.to_client(data)
        elif left == CHUNKED:
            chunks = self.upchunks = self.upchunks or Chunked()
            if self.uppending:
                data = self.uppending + data
            try:
                end = chunks.feed(data, at)
            except BodyError:
                self._cut()
                return
            self.uppending = data[end:]
            if end:
                self.to_client(data[:end] if self.uppending else data)
            if chunks.done:
                clean, self.uppending, self.upchunks = not self.uppending, b"", None
                self._response_done(clean=clean, close=False)
        else:
            size = len(data) - at
            if size < left:
                self.upleft = left - size
                self.to_client(data)
            else:
                clean = size == left
                self.upleft = 0
                self.to_client(data if clean else data[: at + left])
                self._response_done(clean=clean, close=False)

    def _switch(self, head: ResponseHead, data: bytes) -> None:
        request = self.request
        if request is None or not (request.websocket and head.websocket):
            self._bad_response("the server switches protocols unasked")
            return
        self.rq = self.rs = RAW
        self.response = head
        self.response_bytes = True
        self.deadline = self.clock.now + self.limits.idle_timeout_s
        self.to_client(data)
        if self.client_paused:
            self._resume()
        if self.pending and not self.advancing:
            self._advance()
        if self.client_ended:
            self.end_upstream()

    def _response_done(self, *, clean: bool, close: bool) -> None:
        request, response = self.request, self.response
        if request is None or response is None:
            return
        keep = (
            clean
            and not close
            and self.rq == SENT
            and request.keep
            and not response.close
            and not request.websocket
            and (request.version == 11 or response.keep_alive)
        )
        self.rs = NONE
        self.release(keep)
        self.finished(response.status, "")
        self._next(keep)

    def _next(self, keep: bool) -> None:
        """After an exchange: the next request, or the end of the connection."""
        body_unread = self.rq == BODY or (self.rq == WAITING and self.request is not None and self.request.framing != NO_BODY)
        bad = self.request is None
        self.request = self.response = None
        self.chunks = self.upchunks = None
        self.left = 0
        self.uppending = b""
        if keep and not (self.client_ended and not self.pending):
            self.rq = IDLE
            if self.client_paused and not self.client_full:
                self._resume()
            if self.pending and not self.client_full:
                self.deadline = self.clock.now + self.limits.head_timeout_s
                if not self.advancing:
                    self._advance()
            else:
                self.deadline = self.clock.now + self.limits.idle_timeout_s
            return
        linger = (bad or body_unread or self.pending) and not self.client_ended
        self.rq, self.rs, self.pending = CLOSED, NONE, b""
        if linger:
            self.deadline = self.clock.now + LINGER_S
            if self.client_paused:
                self._resume()
            self.end_client()
        else:
            self.close_client()

    def _raw_done(self) -> None:
        """Both sides of an upgraded connection have ended."""
        self.release(False)
        self.finished(101, "")
        self.rq, self.rs, self.deadline = CLOSED, NONE, self.clock.now + LINGER_S
        self.close_client()

    def _bad_response(self, detail: str) -> None:
        self.abandon()
        self.rs = NONE
        if self.response_bytes:
            self._cut()
        else:
            self.refuse(reply("bad_response", f"Refused: {detail}.", keep=False))

    def _upstream_gone(self) -> None:
        """Closed before its response was whole."""
        self.abandon()
        self.rs = NONE
        request = self.request
        if self.response_bytes:
            self._cut()
        elif self.reused and not self.retried and not self.uppending and request is not None and request.safe:
            self.retried = True
            self.rq = WAITING
            self.again(request)
        else:
            self.refuse(reply("upstream_reset", keep=False))

    def _cut(self) -> None:
        """Both sides end by RST: the message is not whole and nobody may think it is."""
        self.abandon()
        if self.rq != IDLE and self.request is not None:
            self.finished(0, "cut")
        self.rq, self.rs, self.pending, self.uppending, self.deadline = CLOSED, NONE, b"", b"", NEVER
        self.reset_client()
