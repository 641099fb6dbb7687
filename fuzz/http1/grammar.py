"""HTTP/1.1 requests and responses that are right, nearly right, or wrong in the ways smuggling is made of."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

METHODS = (b"GET",) * 8 + (b"POST",) * 8 + (
    b"HEAD", b"PUT", b"OPTIONS", b"DELETE", b"TRACE", b"PATCH", b"PROPFIND", b"M-SEARCH", b"get", b"G!T", b"CONNECT", b"PRI",
    b"SOURCE", b"QUERY", b"GET_", b"X",
)  # fmt: skip
TARGETS = (b"/",) * 6 + (
    b"/a", b"/a/b?c=d", b"/a?b/../c", b"/%2e%2e/", b"/a//b", b"//h/x", b"//", b"/..", b"/a/../b", b"/a/./b", b"/a/.", b"/.a",
    b"/a%2Fb", b"/a%2fb", b"/a%20b", b"/%C3%A9", b"/%c3", b"/%00", b"/%zz", b"/%", b"/a;b", b"/a\\b", b"/a|b", b"/~a", b"/a%25b",
    b"*", b"http://h/", b"http://h", b"http://h?x", b"http://h/a?b#c", b"HTTP://H/", b"http://h:80/", b"http://u@h/",
    b"http://x/",
    b"https://h/", b"h:80", b"/a#b", b"/?#", b"/\x80", b"", b"a", b"?", b"/a b", b"http:///a", b"http://h//a", b"/:80", b"/a&b=c",
    b"http://[::1]/", b"http://h./", b"http://h/..", b"/a/..?x", b"/?a?b", b"/a%3Fb", b"/a%23b", b"/a'b(c)", b"/a,b!$&=+*@:",
)  # fmt: skip
VERSIONS = (b"HTTP/1.1",) * 24 + (b"HTTP/1.0",) * 6 + (
    b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"HTTP/1.1 ", b"HTTP/01.1", b"HTTP/1.10", b"", b"HTTP/1", b"ICE/1.1",
)  # fmt: skip
HOSTS = (b"h",) * 12 + (
    b"H", b"web.shop.mesh", b"h:80", b"h:", b"h:99999", b"h.", b"h..", b".h", b"a..b", b"[::1]", b"[::1]:80", b"[::1", b"[h]",
    b"",
    b"h h", b"h,x", b"u@h", b"h/", b"h:80:80", b"h_x", b"-h", b"~", b"h%41", b"1.2.3.4", b"h\t", b"[::ffff:1.2.3.4]", b".", b"..",
    b"[]", b"[.]", b"h.:80", b"[:]:1", b"h:080", b"h:0", b"x",
)  # fmt: skip
PLAIN = (
    b"A: b", b"Accept: */*", b"User-Agent: x", b"Cookie: a=b; c=d", b"X: ", b"X:", b"X: a b", b"X:\t\ty\t", b"x-a: 1", b"x_a: 1",
    b"X: \x80\xff", b"Connection: keep-alive", b"Connection: close", b"Keep-Alive: 5", b"Connection: ", b"Connection: x, y",
    b"Connection: keep-alive, close", b"Connection: Keep-Alive", b"Connection: xclose", b"Proxy-Connection: close",
    b"TE: trailers",
    b"Trailer: x", b"Content-Type: text/plain", b"Content_Length: 5", b"Content-Encoding: gzip", b"Range: bytes=0-1",
    b"Via: 1.1 x",
    b"Accept: " + b"a" * 300, b"Sec-WebSocket-Key: dGhlIHNhbXBsZQ==", b"If-Match: *", b"If-Modified-Since: x", b"Expect:",
    b"Expect: 100-continue", b"Connection: keep-alive\t,", b"X-Forwarded-Client-Cert: By=a;URI=b",
    b"x_forwarded-client_cert: c", b"X-Request-Id: 1", b"traceparent: x", b"X-Original-URL: /b", b"X-HTTP-Method-Override: PUT",
    b"Date: x",
)  # fmt: skip
ODD = (
    b"A", b": b", b"A : b", b"A\t: b", b" A: b", b"\tA: b", b"A\x00: b", b"A: b\x00c", b"A: b\x01", b"A: b\x7f", b"A(: b",
    b"\xffA: b",
    b"A: b\x0b", b"\"A\": b", b"A@: b", b"Expect: 200-ok", b"Upgrade: h2c", b"Upgrade: websocket", b"Connection: upgrade",
    b"Upgrade:",
    b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABk", b"Connection: content-length", b"Connection: host",
    b"Host: x", b"Host: h", b"Connection: transfer-encoding", b"A: " + b"x" * 5000, b"A: b\r", b"A: b\n c", b"Upgrade: TLS/1.0",
    b"Content-Length : 3", b"Transfer-Encoding : chunked", b"Transfer_Encoding: chunked", b"Transfer-Encoding\x00: chunked",
    b"Connection: close\r\nConnection: keep-alive", b"Connection: expect", b"Upgrade: websocket, h2c", b"Connection: \"close\"",
    b"A:b\r\n\r", b"Upgrade: websocket\r\nConnection: upgrade", b"Connection: upgrade\r\nUpgrade: foo",
)  # fmt: skip
CODINGS = (b"chunked",) * 10 + (
    b"Chunked", b"CHUNKED", b"chunked ", b"chunked\t", b"\tchunked", b" chunked", b"chunked,", b",chunked", b"chunked, chunked",
    b"gzip, chunked", b"chunked, gzip", b"identity", b"xchunked", b"chunkedx", b"chunked;q=1", b"\"chunked\"",
    b"chunked, identity",
    b"\x0bchunked", b"chunked\x00", b"", b"chun ked", b"c hunked", b"chunked\r\n ", b"identity, chunked", b"chunke", b"trailers",
)  # fmt: skip
LENGTHS = (
    b"%d ", b" %d", b"+%d", b"-%d", b"0%d", b"00000000000000000%d", b"0x%d", b"%d,%d", b"%d, %d", b"%d;", b"%d.0", b"%de0", b"",
    b"\t%d\t", b"%d\x00", b"%d %d", b"18446744073709551616%d", b"9223372036854775808", b"999999999999999999", b"\"%d\"", b"%d_0",
    b"\x0c%d", b"0o%d", b"0%d0", b"_%d",
)  # fmt: skip
CL_NAMES = (b"Content-Length",) * 6 + (
    b"content-length",
    b"CONTENT-LENGTH",
    b"Content-length",
    b"Content_Length",
    b"Content-Length\t",
)
TE_NAMES = (b"Transfer-Encoding",) * 6 + (b"transfer-encoding", b"TRANSFER-ENCODING", b"Transfer_Encoding", b"Transfer-Encoding ")
BODIES = (
    b"", b"a", b"abc", b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n", b"0\r\n\r\n", b"\r\n", b"3\r\nabc\r\n0\r\n\r\n", b"x" * 100,
    b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: ", b"\x00\xff", b"HTTP/1.1 200 OK\r\n\r\n", b"0", b"\n", b"a" * 17,
)  # fmt: skip
EXTENSIONS = (
    b";a", b";a=b", b';a="b"', b';a="b;c"', b" ;a", b"; a", b";", b";;", b';a="\r\n"', b';a="b', b";a=", b";=b", b" ", b"\t",
    b";\x00",
    b';a="\\""', b";a=b;c=d", b";a b", b";\xff", b"\n", b";a\n", b"\r", b";a=\"\n\"", b";" + b"a" * 300, b'" ', b"x",
)  # fmt: skip
TRAILERS = (
    b"A: b", b"A:", b"Content-Length: 3", b"Transfer-Encoding: chunked", b"Host: x", b"A", b" A: b", b"A : b", b"A: b\nB: c",
    b"A: \x00",
    b"Trailer: x", b": b", b"X: " + b"t" * 200, b"Connection: close", b"A: b\r", b"Upgrade: websocket", b"Authorization: x",
)  # fmt: skip
STATUSES = (b"200",) * 12 + (
    b"100", b"101", b"102", b"103", b"199", b"201", b"204", b"205", b"206", b"301", b"304", b"404", b"500", b"599", b"600",
    b"999",
    b"000", b"099", b"20", b"2000", b"+20", b"2 0", b"0x1", b"",
)  # fmt: skip
REASONS = (b" OK",) * 8 + (b"", b" ", b" Not Found", b" \x80", b" a\x00", b"OK", b"  OK", b" OK\r", b"\tOK", b" a\nA: b")
RESPONSE_VERSIONS = (
    (b"HTTP/1.1",) * 16 + (b"HTTP/1.0",) * 4 + (b"HTTP/1.2", b"HTTP/2.0", b"HTTP/2", b"http/1.1", b"HTTP/0.9", b"ICY", b"")
)
ASKED = (
    b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n", b"GET / HTTP/1.0\r\nHost: h\r\n\r\n",
    b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n",
)  # fmt: skip
TOKENS = (
    *PLAIN, *ODD, *TRAILERS, *EXTENSIONS, *BODIES, b"\r\n", b"\n", b"\r", b"\r\r\n", b" ", b"\t", b"\x00", b"\r\n ", b"\r\n\t",
    b"Host: h", b"Content-Length: 3", b"Transfer-Encoding: chunked", b"HTTP/1.1", b"HTTP/1.0", b"chunked", b"0\r\n\r\n",
    b"Content-Length: 0\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 304 x\r\n\r\n", b"\x85", b"\xa0", b"\xc4\xaa",
)  # fmt: skip


def pick(rng: Random, choices: Sequence[bytes]) -> bytes:
    return choices[int(rng.random() * len(choices))]


def chunked(rng: Random, wrong: float) -> bytes:
    """A chunked body; each part is wrong with probability ``wrong``."""
    random = rng.random
    out = []
    for _ in range(int(random() * 4)):
        body = pick(rng, BODIES) or b"z"
        size = b"%x" % len(body) if random() < 0.7 else b"%03X" % len(body)
        if random() < wrong:
            size = pick(
                rng,
                (b"0x3", b"-1", b"+3", b"", b"fffffffffffffffff", b"%x" % (len(body) + 1), b"1 ", b" 1", b"g", b"0" * 20 + b"3"),
            )
        extension = pick(rng, EXTENSIONS[:4]) if random() < 0.15 else pick(rng, EXTENSIONS) if random() < wrong else b""
        ends = (
            (b"\r\n", b"\r\n")
            if random() > wrong
            else (pick(rng, (b"\r\n", b"\n", b"\r")), pick(rng, (b"\r\n", b"\n", b"", b"xx", b"\r")))
        )
        out += [size, extension, ends[0], body, ends[1]]
    out.append(b"0" if random() > 0.2 else pick(rng, (b"00", b"000", b"0;a", b"0 ", b"0" * 15, b"0" * 16)))
    out.append(b"\r\n" if random() > wrong else pick(rng, (b"\n", b"\r", b"")))
    while random() < 0.2:
        out += [TRAILERS[0] if random() > 0.5 else pick(rng, TRAILERS), b"\r\n" if random() > wrong else b"\n"]
    out.append(b"\r\n" if random() > wrong else pick(rng, (b"\n", b"", b"\r", b"\r\r\n")))
    return b"".join(out)


def _framing(rng: Random, lines: list[bytes], wrong: float) -> bytes:
    """Adds fields that frame a body to ``lines``; the body."""
    random = rng.random
    kind = random()
    if kind < 0.25:
        return b"" if random() > wrong else pick(rng, BODIES)
    if kind < 0.6:
        body = pick(rng, BODIES)
        length = len(body) if random() > wrong else len(body) + int(random() * 5) - 2
        value = b"%d" % length
        if random() < wrong:
            shape = pick(rng, LENGTHS)
            value = shape % ((length,) * shape.count(b"%d"))
        name = CL_NAMES[0] if random() > wrong else pick(rng, CL_NAMES)
        lines.append(name + b": " + value)
        if random() < wrong:
            lines.append(name + b": " + (value if random() < 0.5 else b"0"))
        return body
    body = chunked(rng, wrong)
    lines.append(
        (TE_NAMES[0] if random() > wrong else pick(rng, TE_NAMES))
        + b": "
        + (CODINGS[0] if random() > wrong else pick(rng, CODINGS))
    )
    if random() < wrong:
        lines.append(
            pick(rng, (b"Content-Length: 3", b"Content-Length: 0", b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"))
        )
    return body


def _message(rng: Random, first: bytes, lines: list[bytes], wrong: float) -> bytes:
    random = rng.random
    body = _framing(rng, lines, wrong)
    for _ in range(int(random() ** 2 * 5)):
        lines.append(pick(rng, PLAIN) if random() > wrong else pick(rng, ODD))
    if random() < 0.5:
        rng.shuffle(lines)
    end = b"\r\n" if random() > wrong / 2 else pick(rng, (b"\n", b"\r\n", b"\r", b"\r\r\n", b"\r\n "))
    head = [first]
    head += lines
    if end == b"\r\n" or random() < 0.5:
        text = b"\r\n".join(head)
    else:
        at = int(random() * len(head))
        text = b"\r\n".join(head[:at]) + end + b"\r\n".join(head[at:])
    return text + b"\r\n\r\n" + body


def request(rng: Random, wrong: float) -> bytes:
    random = rng.random
    target = pick(rng, TARGETS) if random() < 0.5 else b"/"
    version = b"HTTP/1.1" if random() > wrong else pick(rng, VERSIONS)
    space = (b" ", b" ") if random() > wrong / 3 else (pick(rng, (b"  ", b"\t", b"", b"\x0b")), b" ")
    host = b"h" if random() > 0.3 else pick(rng, HOSTS)
    lines = [b"Host: " + host] if random() > wrong / 3 else []
    lead = b"" if random() > wrong / 4 else pick(rng, (b"\r\n", b"\n", b" ", b"\r", b"\x00", b"\xef\xbb\xbf"))
    return lead + _message(rng, pick(rng, METHODS) + space[0] + target + space[1] + version, lines, wrong)


def requests(rng: Random) -> bytes:
    """One to four pipelined requests: a third are meant to be right."""
    random = rng.random
    wrong = (0.0, 0.04, 0.25)[int(random() * 3)]
    out = request(rng, wrong)
    while random() < 0.35 and len(out) < 20_000:
        out += request(rng, wrong)
    return out


def response(rng: Random, wrong: float) -> bytes:
    random = rng.random
    status = b"200" if random() > 0.4 else pick(rng, STATUSES)
    version = b"HTTP/1.1" if random() > 0.1 + wrong else pick(rng, RESPONSE_VERSIONS)
    return _message(rng, version + b" " + status + (b" OK" if random() > wrong else pick(rng, REASONS)), [], wrong)


def responses(rng: Random) -> bytes:
    """A request that is right, and what a server answers: interim responses, a response, sometimes more."""
    random = rng.random
    wrong = (0.0, 0.04, 0.25)[int(random() * 3)]
    out = [ASKED[0] if random() < 0.5 else pick(rng, ASKED)]
    while random() < 0.15:
        out.append(b"HTTP/1.1 " + pick(rng, (b"100 Continue", b"103 Early Hints\r\nLink: x", b"102 P")) + b"\r\n\r\n")
    out.append(response(rng, wrong))
    if random() < 0.1:
        out.append(response(rng, wrong) if random() < 0.6 else pick(rng, BODIES))
    return b"".join(out)
