from __future__ import annotations

import re
from random import Random

import h11
import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy.http1.head import HeadError, ResponseHead, parse_response
from mesh.express import response
from mesh.express.grammar import LENGTH
from mesh.express.machine import run
from mesh.express.response import RESPONSE
from tests.mesh.express.heads import mutate

_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t\x20-\x7e\x80-\xff]*)")


def strict(raw: bytes) -> ResponseHead | None:
    """The head, if the kernel is to read it."""
    if not raw.endswith(b"\r\n\r\n") or raw.find(b"\r\n\r\n") != len(raw) - 4 or len(raw) > 1024:
        return None
    line, *fields = raw[:-4].split(b"\r\n")
    status = re.fullmatch(rb"HTTP/1\.1 ([2-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?", line)
    lengths = 0
    for field in fields:
        match = _FIELD.fullmatch(field)
        if match is None or len(field) < 6:
            return None
        name, value = match[1].lower(), match[2]
        if name in (b"transfer-encoding", b"upgrade", b"proxy-connection"):
            return None
        if name == b"connection" and not re.fullmatch(rb"(?i)[\t ]*keep-alive", value):
            return None
        if name == b"content-length":
            lengths += 1
            if lengths > 1 or not re.fullmatch(rb"[\t ]*(?:0|[1-9][0-9]{0,6})", value) or (status and status[1] == b"204"):
                return None
    return parse_response(raw) if status else None


def make(random: Random) -> bytes:
    odd = random.random() < 0.5
    status = random.choice((b"200 OK", b"204 No Content", b"304", b"404 Not Found", b"503 ", b"201 \xff"))
    lines = []
    if random.random() < 0.7:
        lines.append(random.choice((b"Content-Length: 5", b"content-length:0", b"Content-Length:\t1234567")))
    for _ in range(random.choice((0, 1, 3))):
        lines.append(
            random.choice((b"Date: now", b"Server: x", b"Set-Cookie: a=b; c", b"x_y: 12", b"Keep-Alive: 5", b"ETag:\xff  "))
        )
    if random.random() < 0.3:
        lines.append(b"Connection: Keep-Alive")
    if odd:
        status = random.choice(
            (status, status, b"100 Continue", b"101 x", b"999", b"099", b"20", b"2000 x", b"200\tOK", b"600 x")
        )
        lines.append(
            random.choice(
                (
                    b"Transfer-Encoding: chunked",
                    b"Content-Length: 5",
                    b"Content-Length: 05",
                    b"Content-Length: 12345678",
                    b"a: b",
                    b"Connection: close",
                    b"Upgrade: websocket",
                    b"Proxy-Connection: close",
                    b"Content-Length: 5 ",
                    b"Content-Length:",
                )
            )
        )
    random.shuffle(lines)
    version = b"HTTP/1.1" if random.random() < 0.95 else random.choice((b"HTTP/1.0", b"HTTP/1.2", b"ICY"))
    raw = version + b" " + status + b"\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
    return mutate(random, raw) if random.random() < 0.3 else raw


def read_alike(raw: bytes) -> tuple[int, int]:
    """Status and body length, -1 without one, by everyone, of a response to a GET. Raises AssertionError."""
    try:
        head = parse_response(raw)
        body = 0 if head.status in (204, 304) else max(head.length, 0)
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 16)
        connection.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
        connection.send(h11.EndOfMessage())
        connection.receive_data(raw + b"x" * body)
        event = connection.next_event()
        assert isinstance(event, h11.Response)
        length = 0
        while isinstance(data := connection.next_event(), h11.Data):
            length += len(data.data)
        if head.length >= 0 or head.status in (204, 304):
            assert isinstance(data, h11.EndOfMessage)
            assert length == body
            assert connection.their_state is h11.DONE
        else:
            assert data is h11.NEED_DATA

        class Seen:
            bodies, done = 0, 0

            def on_body(self, part: bytes) -> None:
                self.bodies += len(part)

            def on_message_complete(self) -> None:
                self.done += parser.should_keep_alive()

        parser = httptools.HttpResponseParser(seen := Seen())
        parser.feed_data(raw + b"x" * body)
        assert seen.bodies == body
        assert seen.done == (head.length >= 0 or head.status in (204, 304))
        assert event.status_code == parser.get_status_code() == head.status
    except (HeadError, httptools.HttpParserError, h11.RemoteProtocolError) as error:
        raise AssertionError(f"{raw!r} is refused: {error!r}") from error
    return head.status, head.length


def same(raw: bytes) -> bool:
    raw, end, _ = raw.partition(b"\r\n\r\n")
    raw += end
    head, found = strict(raw), run(RESPONSE, raw)
    assert (found is None) is (head is None), raw
    if found is None:
        return False
    assert found.end == len(raw)
    assert read_alike(raw) == (found.status, found.length if found.once & LENGTH else -1)
    assert not head.close
    return True


def test_heads():
    random = Random(3)
    count = sum(same(make(random)) for _ in range(4000))
    assert count > 1000


@given(st.integers(0, 1 << 64))
@settings(max_examples=300, deadline=None)
def test_any_head(seed):
    random = Random(seed)
    for _ in range(5):
        same(make(random))


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n",
    ],
)
def test_left_to_user_space(raw):
    assert run(RESPONSE, raw) is None


def test_the_table_is_the_same_each_time():
    assert response.build() == RESPONSE
    assert run(RESPONSE, b"HTTP/1.1 200 OK\r\nContent-Length: 42\r\n\r\n" + b"x" * 42).length == 42
