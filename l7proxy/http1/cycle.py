"""Request and response, one exchange after the other, as events in and commands out; no I/O.

Events are the public methods (`client_data`, `upstream_lost`, `timeout`, …); commands are the methods a
subclass gives (`decide`, `to_client`, `to_upstream`, …). On `decide(head)` the subclass answers, at once or
later, with `forward` (an upstream is attached) or `refuse`. Bytes go through as they came. One exchange runs
at a time, so pipelined requests wait in ``pending`` and answers keep their order.

    request side:   IDLE -> WAITING (decide) -> BODY -> SENT -> IDLE …      RAW after a matching 101
    response side:  NONE -> HEAD -> BODY -> NONE …                          CLOSED: only lingering is left
                    SENT: answered before the request's body was all here
"""

from __future__ import annotations

from l7proxy.errors import reply
from l7proxy.http1.exchange import BODY, CLOSED, HEAD, IDLE, NEVER, NONE, RAW, SENT, WAITING
from l7proxy.http1.head import RequestHead, ResponseHead
from l7proxy.http1.request_side import RequestSide
from l7proxy.http1.response_side import ResponseSide


class Cycle(RequestSide, ResponseSide):
    """Both halves, and what time and the worker bring about."""

    __slots__ = ()

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

    def adopt(self, head: RequestHead, *, left: int, status: int, upleft: int, elapsed: float) -> None:
        """While idle: an exchange that went on without us is ours from here on. ``left``: bytes of its request's body still
        to come; ``status``: 0 while no byte of the response has gone, then with ``upleft`` bytes of its body to come;
        ``elapsed``: seconds since it began."""
        self.request = head
        self.reused, self.retried, self.interim = True, False, 0
        self.left = left
        self.rq = BODY if left else SENT
        self.response_bytes = status > 0
        if status:
            self.rs, self.upleft, self.response = BODY, upleft, ResponseHead.carried(status, upleft)
        else:
            self.rs = HEAD
        limits = self.limits
        self.deadline = self.clock.now + (limits.idle_timeout_s if left or status else limits.request_timeout_s - elapsed)

    def end(self) -> None:
        """End politely: the next answer whose head is not out yet says it is the last."""
        self.ending = True

    @property
    def idle(self) -> bool:
        """Between two exchanges."""
        return self.rq == IDLE and not self.pending

    @property
    def endless(self) -> bool:
        """Upgraded: no exchange will end it."""
        return self.rq == RAW

    def end_idle(self) -> None:
        """Close if idle."""
        if self.idle:
            self.rq = CLOSED
            self.close_client()

    def cut(self) -> None:
        """End at once: the decision this connection rests on no longer holds."""
        if self.rq != CLOSED:
            self._cut()
