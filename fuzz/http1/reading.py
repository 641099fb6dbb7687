"""How each reader understands a stream of requests or responses: Pillion's own cycle, httptools and h11."""

from __future__ import annotations

from typing import Any

import h11
import httptools

from l7proxy.http1.cycle import Cycle
from l7proxy.http1.exchange import CLOSED, HEAD, SENT, Clock, Limits
from l7proxy.http1.head import CHUNKED, Heads, RequestHead

LIMITS = Limits(head_bytes_max=4096)  # small, so that cases reach it
CLOCK = Clock()
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Requests(Cycle):
    """A client's bytes through the proxy; each request is forwarded, and answered when it is whole."""

    __slots__ = ("done", "ends", "exchanges", "reply")

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads, LIMITS, CLOCK)
        self.exchanges: list[tuple[RequestHead, list[bytes]]] = []  # and what was forwarded of each
        self.done = 0  # of them, answered
        self.reply: tuple[int, str] | None = None  # the proxy's own
        self.ends = ""
        self.to_client = self._to_client
        self.to_upstream = self._to_upstream

    def feed(self, data: bytes) -> None:
        self.client_data(data)
        while self.rq == SENT and self.rs == HEAD:
            self.upstream_data(OK)

    @property
    def alive(self) -> bool:
        return self.rq != CLOSED

    def forwarded(self) -> list[bytes]:
        return [b"".join(pieces) for _, pieces in self.exchanges]

    def decide(self, head: RequestHead) -> None:
        self.exchanges.append((head, []))
        self.forward(head.onward, reused=False)

    def _to_upstream(self, data: bytes) -> None:
        self.exchanges[-1][1].append(data)

    def _to_client(self, data: bytes) -> None:
        pass

    def finished(self, status: int, why: str) -> None:
        if why and why != "behind_upgrade":  # that is said of an exchange which was whole
            self.reply = (status, why)
        else:
            self.done += 1

    def release(self, reusable: bool) -> None:
        pass

    def abandon(self) -> None:
        pass

    def end_client(self) -> None:
        self.ends += "fin "

    def close_client(self) -> None:
        self.ends += "close "

    def reset_client(self) -> None:
        self.ends += "reset "

    def pause_client(self) -> None:
        pass

    def resume_client(self) -> None:
        pass

    def end_upstream(self) -> None:
        pass


class Responses(Requests):
    """A server's bytes through the proxy, for one request."""

    __slots__ = ("reusable", "switched", "told")

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.told: list[bytes] = []  # to the client
        self.reusable: bool | None = None  # None: not released
        self.switched = False

    def _to_client(self, data: bytes) -> None:
        self.told.append(data)

    def release(self, reusable: bool) -> None:
        self.reusable = reusable


class Message:
    """One message as another reader sees it. ``whole``: it knows where it ends."""

    __slots__ = ("body", "headed", "host", "length", "method", "status", "target", "whole")

    def __init__(self) -> None:
        self.method = self.target = self.body = b""
        self.host: list[bytes] = []
        self.length = 0
        self.status = 0
        self.headed = self.whole = False


class Httptools:
    """httptools' callbacks, collected. ``error``: it refused; ``upgraded``: it stopped reading HTTP."""

    __slots__ = ("error", "messages", "now", "parser", "upgraded")

    def __init__(self, data: bytes, *, response: bool = False) -> None:
        self.messages: list[Message] = []
        self.now = Message()
        self.error = ""
        self.upgraded = False
        self.parser: Any = (httptools.HttpResponseParser if response else httptools.HttpRequestParser)(self)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.upgraded = True
        except httptools.HttpParserError as error:
            self.error = str(error) or type(error).__name__

    def on_message_begin(self) -> None:
        self.now = Message()
        self.messages.append(self.now)

    def on_url(self, url: bytes) -> None:
        self.now.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 4 and name.lower() == b"host" and not self.now.headed:
            self.now.host.append(value.strip(b" \t"))

    def on_headers_complete(self) -> None:
        now = self.now
        now.headed = True
        if isinstance(self.parser, httptools.HttpRequestParser):
            now.method = self.parser.get_method()
        else:
            now.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.now.length += len(body)

    def on_message_complete(self) -> None:
        self.now.whole = True


def h11_request(data: bytes) -> tuple[Message, bytes] | None:
    """(the first request of ``data``, what follows it); None when refused."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=65536)
    message = Message()
    try:
        connection.receive_data(data)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                message.headed = True
                message.method, message.target = bytes(event.method), bytes(event.target)
                message.host = [value for name, value in event.headers if name == b"host"]
            elif isinstance(event, h11.Data):
                message.length += len(event.data)
            elif isinstance(event, h11.EndOfMessage):
                message.whole = True
                break
            else:
                break
    except h11.RemoteProtocolError:
        return None
    return message, connection.trailing_data[0]


def h11_responses(method: bytes, data: bytes) -> tuple[list[Message], bytes] | None:
    """(interim responses and the final one, what follows it); None when refused."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=65536)
    connection.send(h11.Request(method=method, target=b"/", headers=[(b"host", b"h")]))
    connection.send(h11.EndOfMessage())
    messages: list[Message] = []
    try:
        connection.receive_data(data)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.InformationalResponse | h11.Response):
                message = Message()
                message.headed, message.status = True, event.status_code
                message.whole = isinstance(event, h11.InformationalResponse)
                messages.append(message)
            elif isinstance(event, h11.Data):
                messages[-1].length += len(event.data)
            elif isinstance(event, h11.EndOfMessage):
                messages[-1].whole = True
                break
            else:
                break
    except h11.RemoteProtocolError:
        return None
    return messages, connection.trailing_data[0]


def body_bytes(head_framing: int, body: bytes) -> int:
    """How long a body is that Pillion forwarded whole (without the chunked coding)."""
    if head_framing != CHUNKED:
        return len(body)
    total = at = 0
    while True:
        line = body.index(b"\r\n", at)
        size = int(body[at:line].partition(b";")[0], 16)
        if not size:
            return total
        total += size
        at = line + 2 + size + 2
