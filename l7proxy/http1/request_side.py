"""The client's half of a cycle: requests found in its bytes, one at a time, and their bodies."""

from __future__ import annotations

from l7proxy.errors import Reply, reply
from l7proxy.http1.body import BodyError, Chunked
from l7proxy.http1.exchange import BODY, CLOSED, HEAD, IDLE, NEVER, NONE, RAW, SENT, WAITING, Exchange
from l7proxy.http1.head import CHUNKED, NO_BODY, HeadError, RequestHead, bad_start

LINGER_BYTES_MAX = 1 << 20


class RequestSide(Exchange):
    """Events: `client_data`, `client_eof`, `client_blocked`, `client_drained`, `client_lost`; `forward` answers `decide`."""

    __slots__ = ()

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
            if self.rs == SENT:
                self._response_done(clean=False, close=False)
            else:
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
            self.refuse(Reply(error.status, error.reason, error.detail, keep=False))
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
                raise HeadError(431, "head_too_large", f"the request head is over {self.limits.head_bytes_max} bytes")
            return None
        if end > self.limits.head_bytes_max:
            raise HeadError(431, "head_too_large", f"the request head is over {self.limits.head_bytes_max} bytes")
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
        if done and self.rs == SENT:
            self._response_done(clean=True, close=False)
        return True

    def _bad_body(self, error: BodyError) -> None:
        self.abandon()
        self.rs = NONE
        if self.response_bytes:
            self._cut()
        else:
            self.refuse(reply("bad_request", str(error), keep=False))
