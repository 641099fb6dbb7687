"""The state of one client connection and its current exchange, the commands it gives, and how an exchange ends."""

from __future__ import annotations

from collections.abc import Callable

from l7proxy.errors import Reply
from l7proxy.http1.body import Chunked
from l7proxy.http1.head import NO_BODY, Heads, RequestHead, ResponseHead

IDLE, WAITING, BODY, SENT, RAW, CLOSED = range(6)
NONE, HEAD = IDLE, WAITING  # the response side's names; BODY and RAW are shared

INTERIM_MAX = 16  # 1xx responses before the final one
LINGER_S = 2.0  # how long a closed connection is read and discarded, so that the reply is not lost to a RST
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


class Exchange:
    """What `RequestSide` and `ResponseSide` share."""

    __slots__ = (
        "advancing", "chunks", "client_ended", "client_full", "client_paused", "clock", "deadline", "ending", "heads",
        "interim", "last", "left", "limits", "linger_bytes", "pending", "request", "response", "response_bytes", "rest",
        "retried", "reused", "rq", "rs", "to_client", "to_upstream", "upchunks", "upleft", "uppending", "upstream_ended",
    )  # fmt: skip

    to_client: Callable[[bytes], None]  # commands too, but set by the subclass to the transport's own write
    to_upstream: Callable[[bytes], None]

    rest: Callable[[], None] | None  # who hears that an exchange is over and nothing is pending

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
        self.ending = False  # this connection is to end with its next answer
        self.last = False  # the client was told so
        self.rest = None
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

    def _advance(self) -> None:
        """Go on with ``pending``: the request side's."""
        raise NotImplementedError

    # ---- ends

    def refuse(self, answer: Reply) -> None:
        """Answer in the server's place. Only before any byte of a response."""
        head = self.request
        keep = (
            answer.keep
            and not self.ending
            and head is not None
            and head.keep
            and head.framing == NO_BODY
            and not head.websocket
            and head.version == 11
        )
        self.to_client(answer.encode(close=not keep, head_only=head is not None and head.method == "HEAD"))
        self.finished(answer.status, answer.reason)
        self._next(keep)

    def _response_done(self, *, clean: bool, close: bool) -> None:
        """The response is whole. ``clean``: and nothing came behind it; ``close``: the connection's end ended it."""
        request, response = self.request, self.response
        if request is None or response is None:
            return
        reusable = (
            clean
            and not close
            and (request.last or (request.keep and not self.last))
            and not response.close
            and not request.websocket
            and (request.version == 11 or response.keep_alive)
        )
        goes_on = reusable and not request.last
        if goes_on and self.rq == BODY:  # the server reads the rest of the body, or drops the connection
            self.rs = SENT
            return
        sent = self.rq == SENT
        early = self.rs == SENT  # did it read that rest, or will it take it for a request?
        self.rs = NONE
        self.release(reusable and sent and not early)
        self.finished(response.status, "behind_upgrade" if request.websocket and self.pending else "")
        self._next(goes_on and sent)

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
                if self.rest is not None:
                    self.rest()
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

    def _resume(self) -> None:
        self.client_paused = False
        self.resume_client()

    def _raw_done(self) -> None:
        """Both sides of an upgraded connection have ended."""
        self.release(False)
        self.finished(101, "")
        self.rq, self.rs, self.deadline = CLOSED, NONE, self.clock.now + LINGER_S
        self.close_client()

    def _cut(self) -> None:
        """Both sides end by RST: the message is not whole and nobody may think it is."""
        self.abandon()
        if self.rq != IDLE and self.request is not None:
            self.finished(0, "cut")
        self.rq, self.rs, self.pending, self.uppending, self.deadline = CLOSED, NONE, b"", b"", NEVER
        self.reset_client()
