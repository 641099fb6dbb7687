"""The server's half of a cycle: its responses go through as they came, once their heads are understood."""

from __future__ import annotations

from l7proxy.errors import reply
from l7proxy.http1.added import last_answer
from l7proxy.http1.body import BodyError, Chunked
from l7proxy.http1.exchange import BODY, HEAD, NONE, RAW, SENT, WAITING, Exchange
from l7proxy.http1.head import CHUNKED, NO_BODY, UNTIL_CLOSE, HeadError, ResponseHead

INTERIM_MAX = 16  # 1xx responses before the final one
RESPONSE_HEAD_BYTES_MAX = 65536


class ResponseSide(Exchange):
    """Events: `upstream_data`, `upstream_eof`, `upstream_lost`."""

    __slots__ = ()

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
        elif rs == SENT:
            self._response_done(clean=False, close=False)

    def upstream_eof(self) -> None:
        """The server sent FIN."""
        rs = self.rs
        if rs == RAW:
            self.upstream_ended = True
            if self.client_ended:
                self._raw_done()
            else:
                self.end_client()
        elif rs == SENT or (rs == BODY and self.upleft == UNTIL_CLOSE):
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
        elif rs == SENT or (rs == BODY and self.upleft == UNTIL_CLOSE and error is None):
            self._response_done(clean=False, close=True)
        elif rs != NONE:
            self._upstream_gone()

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
        if (self.ending or request.last) and not head.close:
            self.last = True
            raw = last_answer(head)
            data, end = raw + data[end:], len(raw)
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

    def _bad_response(self, detail: str) -> None:
        self.abandon()
        self.rs = NONE
        if self.response_bytes:
            self._cut()
        else:
            self.refuse(reply("bad_response", detail, keep=False))

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
