from __future__ import annotations

from typing import Any

import h11
import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.http1.head import CHUNKED, HeadError, Heads, bad_start, parse_request, parse_response, path_fault

HOST = b"Host: web.shop.mesh\r\n"


def request(first: bytes = b"GET / HTTP/1.1", *lines: bytes, host: bytes = HOST) -> bytes:
    return first + b"\r\n" + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


REFUSED = [
    (400, request(b"POST / HTTP/1.1", b"Content-Length: 1", b"Content-Length: 1")),
    (400, request(b"POST / HTTP/1.1", b"Content-Length: 1, 1")),
    (400, request(b"POST / HTTP/1.1", b"Content-Length: 1", b"Transfer-Encoding: chunked")),
    (400, request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked")),
    (501, request(b"POST / HTTP/1.1", b"Transfer-Encoding: gzip, chunked")),
    (501, request(b"POST / HTTP/1.1", b"Transfer-Encoding: xchunked")),
    (501, request(b"POST / HTTP/1.1", b"Transfer-Encoding: chunked;q=1")),
    (400, request(b"POST / HTTP/1.1", b"Transfer-Encoding : chunked")),
    (400, request(b"POST / HTTP/1.1", b"Transfer-Encoding\x0b: chunked")),
    (400, request(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked")),
    (400, request(b"POST / HTTP/1.1", b"Content-Length: -1")),
    (400, request(b"POST / HTTP/1.1", b"Content-Length: +1")),
    (400, request(b"POST / HTTP/1.1", b"Content-Length: 0x1")),
    (400, request(b"POST / HTTP/1.1", b"Content-Length: 1 1")),
    (400, request(b"POST / HTTP/1.1", b"Content-Length:")),
    (400, request(b"POST / HTTP/1.1", b"Content-Length: 9999999999999999999")),
    (400, request(b"GET / HTTP/1.1", b"A: b\r\n folded")),
    (400, request(b"GET / HTTP/1.1", b" A: b")),
    (400, request(b"GET / HTTP/1.1", b"A: b\nContent-Length: 3")),
    (400, request(b"GET / HTTP/1.1", b"A: b\rContent-Length: 3")),
    (400, request(b"GET / HTTP/1.1", b"A: b\0")),
    (400, request(b"GET / HTTP/1.1", b"A")),
    (400, request(b"GET / HTTP/1.1", b": b")),
    (400, request(b"GET / HTTP/1.1", b"A(: b")),
    (400, request(b"GET / HTTP/1.1", b"A\xff: b")),
    (400, request(b"GET  / HTTP/1.1")),
    (400, request(b"GET / HTTP/1.1 ")),
    (400, request(b"GET /a b HTTP/1.1")),
    (400, request(b"GET\t/ HTTP/1.1")),
    (400, request(b"GET /\xc3\xa9 HTTP/1.1")),
    (400, request(b"G(T / HTTP/1.1")),
    (400, request(b"GET /")),
    (400, request(b"GET / http/1.1")),
    (400, request(b"GET / HTTP/1.10")),
    (505, request(b"GET / HTTP/1.2")),
    (505, request(b"GET / HTTP/2.0")),
    (505, b"PRI * HTTP/2.0\r\n\r\n"),
    (501, request(b"CONNECT web:80 HTTP/1.1")),
    (400, request(b"GET web:80 HTTP/1.1")),
    (400, request(b"GET * HTTP/1.1")),
    (400, request(b"GET /a#b HTTP/1.1")),
    (400, request(host=b"")),
    (400, request(b"GET / HTTP/1.1", b"Host: other")),
    (400, request(host=b"Host:\r\n")),
    (400, request(host=b"Host: a/b\r\n")),
    (400, request(host=b"Host: a@b\r\n")),
    (400, request(host=b"Host: a b\r\n")),
    (400, request(b"GET http://other/ HTTP/1.1")),
    (400, request(b"GET https://web.shop.mesh/ HTTP/1.1")),
    (400, request(b"GET http://a@web.shop.mesh/ HTTP/1.1")),
    (
        400,
        request(
            b"GET / HTTP/1.1",
            b"Upgrade: h2c",
            b"Connection: Upgrade, HTTP2-Settings",
            b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        ),
    ),
    (400, request(b"GET / HTTP/1.1", b"Upgrade: h2c", b"Connection: Upgrade")),
    (400, request(b"GET / HTTP/1.1", b"Upgrade: websocket, h2c", b"Connection: Upgrade")),
    (400, request(b"GET / HTTP/1.1", b"Upgrade: websocket")),
    (400, request(b"POST / HTTP/1.1", b"Upgrade: websocket", b"Connection: Upgrade", b"Content-Length: 3")),
    (400, request(b"GET / HTTP/1.1", b"Connection: Content-Length")),
    (400, request(b"GET / HTTP/1.1", b"Connection: close, Host")),
    (400, request(b"POST / HTTP/1.1", b"Expect: 200-ok", b"Content-Length: 3")),
    (431, request(b"GET / HTTP/1.1", *[b"A: b"] * 200)),
]


@pytest.mark.parametrize(
    ("status", "raw"), REFUSED, ids=lambda value: repr(value)[:60] if isinstance(value, bytes) else str(value)
)
def test_refused(status: int, raw: bytes) -> None:
    with pytest.raises(HeadError) as error:
        parse_request(raw)
    assert error.value.status == status


def test_accepted_fields() -> None:
    head = parse_request(
        request(b"POST /a%20b?q=/../ HTTP/1.1", b"X-A:  1 \t", b"x-a: 2", b"Transfer-Encoding: Chunked", b"Connection: close")
    )
    assert (head.method, head.path, head.host, head.framing, head.close, head.keep) == (
        "POST",
        "/a%20b",
        "web.shop.mesh",
        CHUNKED,
        True,
        False,
    )
    assert head.header["x-a"] == ("1", "2")
    assert head.path_fault == ""


def test_absolute_form_that_equals_host() -> None:
    head = parse_request(request(b"GET http://web.shop.mesh/a?b HTTP/1.1"))
    assert head.path == "/a"
    assert parse_request(request(b"GET http://web.shop.mesh HTTP/1.1")).path == "/"
    assert parse_request(request(b"OPTIONS * HTTP/1.1")).path == "*"


@pytest.mark.parametrize(
    "path",
    ["/%61dmin", "/a//b", "//", "/a/./b", "/a/..", "/..", "/.", "/a\\b", "/a;x", "/a%2fb", "/a%2Fb", "/a%5cb", "/a%00",
     "/a%c3%a9",
     "/a%2", "/a%zz", "/a|b", "/a%21", '/"', "/a%7E"],
)  # fmt: skip
def test_paths_that_are_not_canonical(path: str) -> None:
    assert path_fault(path.encode())


@pytest.mark.parametrize(
    "path", ["/", "/a/b", "/.well-known/x", "/a..b", "/a%20b", "/%C3%A9", "/a@b:c", "/a.", "/-_.~!$&'()*+,=", "/a/"]
)
def test_paths_that_are(path: str) -> None:
    assert path_fault(path.encode()) == ""


def test_underscores_are_known() -> None:
    assert parse_request(request(b"GET / HTTP/1.1", b"X_User: a")).underscores == {"x-user"}


@pytest.mark.parametrize("data", [b"\r\n", b"\x16\x03\x01", b"GET / HTTP/1.1\n", b"\n", b" GET"])
def test_bad_starts(data: bytes) -> None:
    assert bad_start(data)
    assert not bad_start(b"GET / HTTP/1.1\r\n")


@pytest.mark.parametrize("line", [b"Connection: close", b"connection:CLOSE", b"Connection: \tClose \t"])
def test_the_server_is_not_told_that_the_client_asks_once(line: bytes) -> None:
    more = (b"X: Connection: close", b"Y: \x80")
    head = parse_request(request(b"GET / HTTP/1.1", more[0], line, more[1]))
    assert head.last and not head.keep
    assert head.onward == request(b"GET / HTTP/1.1", *more)
    again = parse_request(head.onward)
    assert again.keep and not again.last and again.onward is again.raw


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (b"Connection: keep-alive",),
        (b"Connection: close, x",),  # what is named there is between client and server
        (b"Connection: close", b"Connection: keep-alive"),
        (b"Connection: close", b"Connection:"),
        (b"Proxy-Connection: close",),
    ],
)
def test_what_else_is_said_of_a_connection_goes_as_it_came(lines: tuple[bytes, ...]) -> None:
    head = parse_request(request(b"GET / HTTP/1.1", *lines))
    assert not head.last and head.onward is head.raw


def test_a_client_of_http_1_0_is_passed_on_as_it_is() -> None:
    head = parse_request(request(b"GET / HTTP/1.0", b"Connection: close"))
    assert not head.last and head.onward is head.raw


def test_the_memo_is_bounded() -> None:
    heads = Heads()
    for n in range(5000):
        heads.request(request(b"GET /%d HTTP/1.1" % n))
    assert len(heads.requests) <= 2048
    assert heads.request(request(b"GET /4999 HTTP/1.1")) is heads.request(request(b"GET /4999 HTTP/1.1"))
    big = heads.request(request(b"GET / HTTP/1.1", b"A: " + b"a" * 4000))
    assert not big.memo


# ---- agreement: what we accept, others accept with the same meaning

TOKEN = st.text("!#$%&'*+-.^_`|~019azAZ", min_size=1, max_size=8).map(str.encode)
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=12).map(str.encode)
LINE = st.one_of(
    st.tuples(TOKEN, VALUE).map(lambda pair: pair[0] + b":" + pair[1]),
    st.sampled_from(
        [b"Content-Length: 5", b"Content-Length: 05", b"content-length: 0", b"Transfer-Encoding: chunked",
         b"Transfer-Encoding: CHUNKED", b"Connection: close", b"Connection: keep-alive", b"Connection: close, keep-alive",
         b"Expect: 100-continue", b"A:", b"A:\t", b"TE: trailers"]
    ),
)  # fmt: skip
REQUEST = st.builds(
    lambda method, target, version, lines: request(b" ".join((method, target, version)), *lines),
    st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"DELETE"]),
    st.sampled_from([b"/", b"/a?b=c", b"/%41//x", b"http://web.shop.mesh/x", b"/a;b|c"]),
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]),
    st.lists(LINE, max_size=6),
)


class Llhttp:
    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.url = b""
        self.complete = self.keep = False
        self.parser = httptools.HttpRequestParser(self)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_message_complete(self) -> None:
        self.complete, self.keep = True, self.parser.should_keep_alive()


def body_for(framing: int) -> bytes:
    return b"5\r\nhello\r\n0\r\n\r\n" if framing == CHUNKED else b"x" * framing


@given(REQUEST)
def test_what_is_accepted_means_the_same_to_h11(raw: bytes) -> None:
    try:
        head = parse_request(raw)
    except HeadError:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw + body_for(head.framing))
    event: Any = connection.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method, event.target) == (head.method.encode(), head.target)
    assert [(bytes(n), bytes(v)) for n, v in event.headers] == [
        (n, v.lower() if n == b"transfer-encoding" else v) for n, v in head.fields
    ]
    size = 0
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Data)
        size += len(event.data)
    assert size == (5 if head.framing == CHUNKED else head.framing)


@given(REQUEST)
def test_what_is_accepted_means_the_same_to_llhttp(raw: bytes) -> None:
    try:
        head = parse_request(raw)
    except HeadError:
        return
    seen = Llhttp()
    seen.parser.feed_data(raw + body_for(head.framing))
    assert seen.complete
    assert seen.url == head.target
    assert seen.headers == head.fields
    if head.version == 11:
        assert seen.keep == head.keep


@given(st.binary(max_size=80), st.integers(0, 60))
def test_arbitrary_bytes_are_refused_or_understood(noise: bytes, at: int) -> None:
    raw = request()
    raw = raw[:at] + noise + raw[at:]
    end = raw.find(b"\r\n\r\n") + 4
    for parse in (parse_request, parse_response):
        try:
            parse(raw[:end])
        except HeadError as error:
            status = error.status
        else:
            status = 200
        assert status in (200, 400, 431, 501, 502, 505)
