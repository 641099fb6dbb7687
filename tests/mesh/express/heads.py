"""Heads, and what others read in them: the reference the tables are held to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import h11
import httptools

from l7proxy.http1.head import HeadError, RequestHead, parse_request, path_fault

FOLLOWING = b"GET /following HTTP/1.1\r\nHost: following\r\n\r\n"
METHODS = rb"GET|HEAD|POST|PUT|DELETE|PATCH|OPTIONS"
_LINE = re.compile(rb"(?:%s) (/[\x21-\x7e]*) HTTP/1\.1" % METHODS)
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t\x20-\x7e\x80-\xff]*)")
_HOST = re.compile(rb"[\t ]*(?:[A-Za-z0-9_~-]+(?:\.[A-Za-z0-9_~-]+)*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_PUNTED = {b"transfer-encoding", b"upgrade", b"expect", b"trailer", b"te", b"http2-settings", b"proxy-connection"}


@dataclass(frozen=True)
class Reading:
    """What a parser reads of a head and what follows it. ``host``: as sent, without blanks around."""

    method: str
    target: bytes
    host: bytes
    length: int
    follows: bool  # the request after the body was found there


def strict(raw: bytes, headers: Iterable[str] = (), *, underscores: bool = True) -> RequestHead | None:
    """The head, if the kernel is to read it: the same grammar once more, as one would say it aloud. ``headers``: that rules
    read."""
    if not raw.endswith(b"\r\n\r\n") or raw.find(b"\r\n\r\n") != len(raw) - 4 or len(raw) > 1024:
        return None
    line, *fields = raw[:-4].split(b"\r\n")
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    path, _, query = match[1].partition(b"?")
    if path_fault(path) or b"%" in path or b"/." in path or b"#" in query:
        return None
    met: list[bytes] = []
    once = {b"host", b"content-length", *(name.encode() for name in headers)}
    for field in fields:
        match = _FIELD.fullmatch(field)
        if match is None:
            return None
        name, value = match[1].lower(), match[2]
        if name in _PUNTED or (name in once and name in met) or (b"_" in name and not underscores):
            return None
        if name == b"host" and not _HOST.fullmatch(value):
            return None
        if name == b"content-length" and not re.fullmatch(rb"[\t ]*(?:0|[1-9][0-9]{0,5})", value):
            return None
        if name == b"connection" and not re.fullmatch(rb"(?i)[\t ]*keep-alive", value):
            return None
        if name.decode() in headers:
            if value.strip(b"\t ") and value[-1:] in b"\t ":
                return None
        elif len(field) < 6:
            return None
        met.append(name)
    return parse_request(raw) if b"host" in met else None


def by_l7proxy(raw: bytes) -> Reading:
    head = parse_request(raw)
    return Reading(head.method, head.target, dict(head.fields)[b"host"], head.framing, True)


def by_httptools(raw: bytes, length: int) -> Reading:
    """Raises httptools.HttpParserError."""

    class Seen:
        def __init__(self) -> None:
            self.targets: list[bytes] = []
            self.hosts: list[bytes] = []
            self.methods: list[str] = []
            self.lengths: list[int] = []

        def on_message_begin(self) -> None:
            self.targets.append(b"")
            self.lengths.append(0)

        def on_url(self, part: bytes) -> None:
            self.targets[-1] += part

        def on_header(self, name: bytes, value: bytes) -> None:
            if name.lower() == b"host":
                self.hosts.append(value.strip(b"\t "))

        def on_headers_complete(self) -> None:
            self.methods.append(parser.get_method().decode())

        def on_body(self, part: bytes) -> None:
            self.lengths[-1] += len(part)

    seen = Seen()
    parser = httptools.HttpRequestParser(seen)
    parser.feed_data(raw + b"x" * length + FOLLOWING)
    follows = seen.targets[1:] == [b"/following"] and seen.hosts[1:] == [b"following"]
    return Reading(seen.methods[0], seen.targets[0], seen.hosts[0], seen.lengths[0], follows)


def by_h11(raw: bytes, length: int) -> Reading:
    """Raises h11.RemoteProtocolError."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 16)
    connection.receive_data(raw + b"x" * length + FOLLOWING)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    body = 0
    while isinstance(event := connection.next_event(), h11.Data):
        body += len(event.data)
    assert isinstance(event, h11.EndOfMessage)
    connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.start_next_cycle()
    after = connection.next_event()
    follows = isinstance(after, h11.Request) and after.target == b"/following"
    host = next(value for name, value in request.headers if name == b"host")
    return Reading(request.method.decode(), request.target, host, body, follows)


def make(random: Random, paths: Iterable[bytes] = (), headers: Iterable[bytes] = ()) -> bytes:
    """A head: right, odd or wrong. ``paths`` and ``headers`` (whole lines) are what this destination's rules are about."""
    raw = _plain(random, tuple(paths), tuple(headers), odd=random.random() < 0.5)
    return mutate(random, raw) if random.random() < 0.25 else raw


_NAMES = (b"Accept", b"User-Agent", b"X-A", b"Via", b"Keep-Alive", b"Cookie", b"hosts", b"Hos", b"Content-Lengt", b"x_user", b"a")
_VALUES = (b"*/*", b"curl/8.0", b"", b" ", b"a b", b"\xff\x80", b"5", b"timeout=5, max=3", b"x" * 60, b"\t!", b"b \t")
_HOSTS = (
    b"web.shop.mesh",
    b"WEB.shop.mesh:80",
    b"h",
    b"[::1]:8080",
    b"api.example.org",
    b"h.",
    b"a..b",
    b"h:",
    b"h h",
    b"",
    b"10.0.0.1",
)
_TARGETS = (
    b"/", b"/a", b"/a/b", b"/a?x=/../%2e&;", b"/.a", b"/a//b", b"/%41", b"/a;b", b"/a/", b"/a'b(c)", b"/a?", b"*", b"/a.b/c.",
    b"/a/..", b"http://h/", b"/a#b", b"/a\\b", b"/a?b#c",
)  # fmt: skip
_FRAMING = (
    b"Connection: keep-alive", b"Connection: Keep-Alive", b"Content-Length: 5", b"content-length:0", b"CONTENT-LENGTH:\t12",
    b"Content-Length: 999999", b"Content-Length: 1000000", b"Content-Length: 05", b"Content-Length: 5 ",
    b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"TE: trailers", b"Content-Length: +5", b"Content-Length:",
    b"Content-Length: 3, 3", b"Upgrade: h2c", b"connection: close", b"Connection: keep-alive, x", b"Proxy-Connection: close",
    b"Trailer: x", b"Connection: upgrade",
)  # fmt: skip


def _plain(random: Random, paths: tuple[bytes, ...], headers: tuple[bytes, ...], *, odd: bool) -> bytes:
    method = random.choice((b"GET", b"GET", b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"))
    target = random.choice(paths) if paths and random.random() < 0.8 else random.choice(_TARGETS if odd else _TARGETS[:4])
    version, hosts = b"HTTP/1.1", 1
    if odd:
        target += random.choice((b"", b"", b"", b"/", b"x", b"?q=1", b"/x/y", b".txt"))
        version = b"HTTP/1.1" if random.random() < 0.95 else random.choice((b"HTTP/1.0", b"HTTP/1.2", b"http/1.1"))
        method = method if random.random() < 0.95 else random.choice((b"TRACE", b"get"))
        hosts = 1 if random.random() < 0.95 else random.choice((0, 2))
    lines = [
        random.choice((b"Host: ", b"host:", b"HOST:\t ")) + random.choice(_HOSTS if odd and random.random() < 0.2 else _HOSTS[:5])
        for _ in range(hosts)
    ]
    for _ in range(random.choice((0, 0, 1, 2, 5))):
        name, value = random.choice(_NAMES if odd else _NAMES[:7]), random.choice(_VALUES if odd else _VALUES[:2])
        lines.append(name + b":" + random.choice((b" ", b"", b"\t")) + value)
    if random.random() < 0.4:
        lines.append(random.choice(_FRAMING if odd else _FRAMING[:5]))
    while headers and random.random() < 0.5:
        lines.append(random.choice(headers))
    random.shuffle(lines)
    return b"%s %s %s\r\n" % (method, target, version) + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def mutate(random: Random, raw: bytes) -> bytes:
    """One or two small changes."""
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(raw) + 1)
        new = random.choice(
            (
                b"\r",
                b"\n",
                b"\0",
                b" ",
                b":",
                b"/",
                b".",
                b"_",
                b"%",
                b"a",
                b"5",
                b"\xff",
                b"\x7f",
                bytes((random.randrange(256),)),
            )
        )
        kind = random.randrange(4)
        if kind == 0:
            raw = raw[:at] + new + raw[at:]
        elif kind == 1:
            raw = raw[:at] + new + raw[at + 1 :]
        elif kind == 2:
            raw = raw[:at] + raw[at + 1 :]
        else:
            end = at + random.randrange(12)
            raw = raw[:end] + raw[at:]
    return raw


def read_alike(raw: bytes) -> Reading:
    """The reading of all three parsers. Raises AssertionError where they differ or one of them refuses it."""
    try:
        ours = by_l7proxy(raw)
        others = by_httptools(raw, ours.length), by_h11(raw, ours.length)
    except (HeadError, httptools.HttpParserError, h11.RemoteProtocolError) as error:
        raise AssertionError(f"{raw!r} is refused: {error!r}") from error
    assert (ours, ours) == others, raw
    assert ours.follows
    return ours
