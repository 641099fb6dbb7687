"""Exchanges for the differential test of express: what a client sends, in which pieces, and what the server answers. Made
from a seed; the same seed makes the same list. Programs of the test import it, so nothing but the standard library here."""

from __future__ import annotations

import random
from dataclasses import dataclass

ID = b"@@@@@@"  # where the exchange's number goes: six digits
BUDGET_BYTES = 256 << 10  # of a response that the kernel carries


@dataclass(frozen=True)
class Plan:
    """A response. ``pieces``: one send() each; ``head``: of those, for HEAD; ``close``: the server ends the connection behind
    it; ``ends``: the proxy ends the client's; ``cut``: the answer is not whole, or not there."""

    pieces: tuple[bytes, ...]
    head: tuple[bytes, ...]
    close: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Sent:
    """What a client sends before it reads all answers. ``heads``: for each request, whether it is HEAD; ``cuts``: where `raw`
    is cut into messages; ``ends``: the last answer ends the connection; ``one_way``: where the request goes is no draw."""

    raw: bytes
    heads: tuple[bool, ...] = (False,)
    cuts: tuple[int, ...] = ()
    ends: bool = False
    kind: str = "plain"

    @property
    def first(self) -> bytes:
        """The first message."""
        return self.raw[: self.cuts[0]] if self.cuts else self.raw


# ---- responses


def response(status: int, body: bytes = b"", *fields: bytes, length: bool = True) -> bytes:
    lines = [b"HTTP/1.1 %d Whatever" % status, *fields]
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n"


def text(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


def whole(status: int, size: int, *fields: bytes, **more: bool) -> Plan:
    head, body = response(status, text(size), *fields), text(size)
    return Plan((head + body,), (head,), **more)


def pieces(rng: random.Random, data: bytes, count: int) -> tuple[bytes, ...]:
    cuts = sorted(rng.sample(range(1, len(data)), min(count, len(data) - 1)))
    return tuple(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))


def in_pieces(rng: random.Random, plan: Plan) -> Plan:
    return Plan(pieces(rng, b"".join(plan.pieces), rng.randint(1, 4)), pieces(rng, plan.head[0], 1), plan.close, plan.ends)


def chunked(rng: random.Random, *fields: bytes) -> Plan:
    head = response(200, b"", b"Transfer-Encoding: chunked", *fields, length=False)
    chunks = b"".join(b"%x\r\n%s\r\n" % (size, text(size)) for size in (rng.randint(1, 300) for _ in range(rng.randint(0, 4))))
    body = chunks + rng.choice((b"0\r\n\r\n", b"0\r\nx-trailer: 1\r\n\r\n"))
    if rng.random() < 0.5:
        return Plan((head + body,), (head,))
    return Plan((head, *pieces(rng, body, rng.randint(1, 3))), (head,))


INTERIMS = (
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n",
    b"HTTP/1.1 102 Processing\r\n\r\n",
)
FIELDS = (
    (),
    (b"Server: s",),
    (b"content-type: text/plain", b"cache-control: no-store"),
    (b"set-cookie: a=b", b"set-cookie: c=d"),
    (b"Connection: keep-alive",),
    (b"Connection: Keep-Alive", b"Keep-Alive: timeout=5"),
    (b"x-odd:   spaces  \t",),
    (b"x-empty:",),
    (b"x-long: " + b"y" * 700,),
    (b"x-long: " + b"y" * 1100,),
    (b"x-long: " + b"y" * 5000,),
    (b"x-high: \xe9\xff",),
)


def plain_plans(rng: random.Random) -> list[Plan]:
    """Most of which the kernel can carry."""
    made = [whole(200, size) for size in (0, 1, 5, 17, 100, 500, 1000, 1400, 4000)]
    for status in (200, 200, 200, 201, 202, 203, 206, 301, 302, 307, 400, 401, 403, 404, 405, 409, 410, 418, 422, 429, 500, 501, 505, 599):
        made.append(whole(status, rng.choice((0, 3, 20, 120, 700)), *rng.choice(FIELDS[:9])))
    made += [Plan((head := response(204, length=False),), (head,)), Plan((head := response(304, length=False),), (head,))]
    made.append(Plan((head := response(304, text(77)),), (head,)))
    return made


def odd_plans(rng: random.Random) -> list[Plan]:
    made = [whole(200, rng.randint(0, 400), *fields) for fields in FIELDS[6:]]
    made += [in_pieces(rng, whole(rng.choice((200, 404)), rng.randint(0, 900), *rng.choice(FIELDS))) for _ in range(40)]
    made += [chunked(rng, *rng.choice(FIELDS[:6])) for _ in range(16)]
    for interims in (INTERIMS[:1], INTERIMS[1:2], INTERIMS):
        last = rng.choice((whole(200, 40), chunked(rng), whole(404, 3)))
        made.append(Plan((b"".join(interims) + b"".join(last.pieces),), (b"".join(interims) + last.head[0],)))
        made.append(Plan((*interims, *last.pieces), (*interims, *last.head)))
    made += [whole(status, 9) for status in (502, 503, 504)]
    head = b"HTTP/1.1 204 No\r\nContent-Length: 0\r\n\r\n"
    made.append(Plan((head,), (head,)))
    for raw in (
        b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 \r\ncontent-length:2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH: \t2 \t\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0000002\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nx-content-length: 9\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-lengt: 9\r\ncontent-length: 2\r\ncontent-lengthy: 7\r\n\r\nok",
    ):
        made.append(Plan((raw,), (raw[:-2],)))
    return made


def large_plans() -> list[Plan]:
    sizes = (20_000, 65_000, 150_000, BUDGET_BYTES - 60, BUDGET_BYTES + 60, 400_000)
    made = []
    for size in sizes:
        head, body = response(200, text(size)), text(size)
        made += [Plan((head + body,), (head,)), Plan((head, *(body[at : at + 16_000] for at in range(0, size, 16_000))), (head,))]
    return made


def ending_plans() -> list[Plan]:
    until_close = response(200, b"", length=False)
    v10 = b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n"
    made = [
        whole(200, 33, b"Connection: close", close=True, ends=True),
        Plan((until_close + text(50),), (until_close,), close=True, ends=True),
        Plan((until_close, text(50), text(9)), (until_close,), close=True, ends=True),
        Plan((v10 + b"ok",), (v10,), close=True, ends=True),
        Plan((b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok-and-more",), (b"HTTP/1.1 200 OK\r\n\r\nmore",), ends=True),
        Plan((b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok",), (b"HTTP/1.1 nonsense\r\n\r\n",), ends=True),
        Plan((b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok",), (b"HTTP/1.1 20",), close=True, ends=True),  # cut
        Plan((b"garbage\r\n\r\n",), (b"garbage\r\n\r\n",), ends=True),
    ]
    return made


@dataclass(frozen=True)
class Plans:
    """All of them, and which numbers are of which kind."""

    all: tuple[Plan, ...]
    kinds: dict[str, range]

    @classmethod
    def make(cls, seed: int) -> Plans:
        rng = random.Random(seed)
        found: list[Plan] = []
        kinds = {}
        for name, made in (
            ("plain", plain_plans(rng)),
            ("odd", odd_plans(rng)),
            ("large", large_plans()),
            ("ending", ending_plans()),
        ):
            kinds[name] = range(len(found), len(found) + len(made))
            found += made
        return cls(tuple(found), kinds)


# ---- requests

PATHS = (b"/a", b"/a/", b"/a/b/c", b"/b", b"/b/x-1_2~3", b"/only", b"/only/this", b"/a:b", b"/a/@", b"/b/" + b"z" * 200, b"/a/.b", b"/a/b.")
DENIED = (b"/a/private", b"/a/private/x", b"/a/privateer", b"/b/secret")
ELSEWHERE = (b"/", b"/ab", b"/bb/c", b"/none", b"/onl", b"/onlyx", b"/c/d")
NOT_PLAIN = (b"/a/%41", b"/a//b", b"/a/../a", b"/a/./b", b"/a;p=1", b"/a/%2e%2e/private", b"//a", b"/a/%70rivate")
HEADERS = (
    (b"accept: */*",),
    (b"User-Agent: curl/8.0", b"Accept: */*"),
    (b"x-variant: b",),
    (b"X-Variant: c",),
    (b"x-variant:b  ",),
    (b"Connection: keep-alive",),
    (b"connection:Keep-Alive ",),
    (b"cookie: " + b"k=v; " * 60,),
    (b"cookie: a=b", b"Cookie: c=d"),
    (b"x-fill: " + b"f" * 500,),
    (b"x-fill: " + b"f" * 650,),
    (b"x-deny: 0",),
    (b"accept-encoding: gzip, deflate, br", b"referer: http://x/y?z#w", b"x-a: 1", b"x-b:2", b"x-c:", b"x-d:\t4\t"),
)
ODD_HEADERS = (
    (b"x-deny: 1",),
    (b"X-DENY:1",),
    (b"x-deny: 0", b"x-deny: 1"),
    (b"x-variant: b", b"x-variant: c"),
    (b"x_variant: b",),
    (b"x_deny: 1",),
    (b"te: trailers",),
    (b"x-high: \xe9\xff\x80",),
    (b"x-fill: " + b"f" * 1200,),
    (b"x-fill: " + b"f" * 9000,),
    (b"upgrade: h2c",),
    (b"proxy-connection: keep-alive",),
    (b"http2-settings: x",),
    (b"expect: 100-continue",),
    (b"content-lengt: 5", b"content-lengthy: 6", b"hos: x", b"hosty: y"),
)
HOSTS = (b"app.example", b"APP.example", b"app.example:8080", b"other", b"10.0.0.1", b"a-b.c", b"[::1]:80")
ODD_HOSTS = (b"bad.example", b"BAD.example:1", b"app.example.", b"bad.example.", b"bad.examples")


def head(method: bytes, path: bytes, host: bytes, fields: tuple[bytes, ...], plan: int, sub: int = 0, version: bytes = b"1.1") -> bytes:
    target = b"%s?i=%s.%dr%d" % (path, ID, sub, plan)
    return b"\r\n".join((b"%s %s HTTP/%s" % (method, target, version), b"Host: " + host, *fields)) + b"\r\n\r\n"


def with_chunks(rng: random.Random) -> bytes:
    data = b"".join(b"%X\r\n%s\r\n" % (size, text(size)) for size in (rng.randint(1, 90) for _ in range(rng.randint(0, 3))))
    return data + rng.choice((b"0\r\n\r\n", b"0\r\nt: 1\r\n\r\n"))


class Maker:
    """Draws exchanges; the shares are of a service whose clients mostly do the ordinary."""

    def __init__(self, seed: int, plans: Plans) -> None:
        self.rng = random.Random(seed)
        self.plans = plans

    def plan(self, *kinds: str) -> int:
        return self.rng.choice(self.plans.kinds[self.rng.choice(kinds)])

    def request(self, *, sub: int = 0, plan: int | None = None, paths: tuple[bytes, ...] = PATHS) -> tuple[bytes, bool]:
        """A request the compiler would mostly take, and whether it is HEAD."""
        rng = self.rng
        method = rng.choices((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE"), (60, 8, 20, 6, 6))[0]
        body = text(rng.choice((0, 1, 10, 200, 1000, 1024, 3000))) if method in (b"POST", b"PUT") or rng.random() < 0.03 else None
        fields = rng.choice(HEADERS)
        if body is not None:
            name = rng.choice((b"Content-Length", b"content-length", b"CONTENT-LENGTH"))
            fields = rng.choice(((*fields, b"%s: %d" % (name, len(body))), (b"%s:%d" % (name, len(body)), *fields)))
        made = head(method, rng.choice(paths), rng.choice(HOSTS), fields, self.plan("plain") if plan is None else plan, sub)
        return made + (body or b""), method == b"HEAD"

    def one(self, kind: str) -> Sent:
        made: Sent = getattr(self, kind)()
        return made

    def plain(self) -> Sent:
        raw, is_head = self.request()
        return Sent(raw, (is_head,))

    def odd_answer(self) -> Sent:
        raw, is_head = self.request(plan=self.plan("odd"))
        return Sent(raw, (is_head,), kind="odd_answer")

    def body_apart(self) -> Sent:
        """The head in one message, the body in others."""
        rng = self.rng
        body = text(rng.choice((1, 2, 100, 2000, 9000)))
        fields = (*rng.choice(HEADERS), b"content-length: %d" % len(body))
        raw = head(b"POST", rng.choice(PATHS), rng.choice(HOSTS), fields, self.plan("plain", "plain", "odd"))
        first = len(raw) + rng.choice((0, 0, rng.randrange(len(body))))
        cuts = sorted({first, *(rng.randrange(first, len(raw + body)) for _ in range(rng.randint(0, 3)))} - {len(raw + body)})
        return Sent(raw + body, cuts=tuple(cuts), kind="body_apart")

    def large_body(self) -> Sent:
        rng = self.rng
        size = rng.choice((30_000, 65_536, 65_537, 200_000))
        raw = head(b"POST", rng.choice(PATHS), b"app.example", (b"content-length: %d" % size,), self.plan("plain"))
        cuts = tuple(range(len(raw), len(raw) + size, 16_384)) if rng.random() < 0.7 else ()
        return Sent(raw + text(size), cuts=cuts, kind="large_body")

    def large_answer(self) -> Sent:
        return Sent(self.request(plan=self.plan("large"))[0].replace(b"HEAD ", b"GET ", 1), kind="large_answer")

    def fragments(self) -> Sent:
        """Cut anywhere, the head too."""
        raw, is_head = self.request()
        count = self.rng.choice((1, 1, 1, 2, 5))
        return Sent(raw, (is_head,), tuple(sorted(self.rng.sample(range(1, len(raw)), count))), kind="fragments")

    def pipelined(self) -> Sent:
        made = [self.request(sub=sub, plan=self.plan("plain", "plain", "odd")) for sub in range(self.rng.randint(2, 5))]
        raw = b"".join(one for one, _ in made)
        cuts: set[int] = set()
        if self.rng.random() < 0.6:
            at = 0
            for one, _ in made[:-1]:
                at += len(one)
                cuts.add(at + self.rng.choice((0, 0, 0, -1, 1, -20, 30)))
        return Sent(raw, tuple(flag for _, flag in made), tuple(sorted(cuts)), kind="pipelined")

    def odd(self) -> Sent:
        """Legal, or refused by a rule; much of it the compiler leaves alone."""
        rng = self.rng
        method = rng.choices((b"GET", b"HEAD", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"PURGE", b"GETX"), (50, 5, 5, 5, 3, 1, 1, 1))[0]
        path = rng.choice(rng.choice((PATHS, DENIED, ELSEWHERE, NOT_PLAIN)))
        host = rng.choice(rng.choice((HOSTS, HOSTS, ODD_HOSTS)))
        fields = rng.choice(rng.choice((HEADERS, ODD_HEADERS)))
        return Sent(head(method, path, host, fields, self.plan("plain")), (method == b"HEAD",), kind="odd")

    def odd_body(self) -> Sent:
        rng = self.rng
        if rng.random() < 0.5:
            fields = (*rng.choice(HEADERS), b"Transfer-Encoding: chunked")
            body = with_chunks(rng)
        else:
            body = text(rng.choice((0, 7, 90)))
            fields = (rng.choice((b"content-length: 00%d", b"content-length:\t%d \t", b"Content-Length:%d")) % len(body),)
        raw = head(b"POST", rng.choice(PATHS), b"app.example", fields, self.plan("plain")) + body
        cuts = tuple(sorted(rng.sample(range(1, len(raw)), 2))) if rng.random() < 0.3 else ()
        return Sent(raw, cuts=cuts, kind="odd_body")

    def illegal(self) -> Sent:
        raw = head(b"GET", b"/a", b"app.example", (b"accept: */*",), self.plan("plain"))
        old, new = self.rng.choice(ILLEGAL)
        return Sent(raw.replace(old, new, 1), ends=True, kind="illegal")

    def ending(self) -> Sent:
        """The client's own wish, or the server's."""
        rng = self.rng
        if rng.random() < 0.5:
            return Sent(self.request(plan=self.plan("ending"))[0].replace(b"HEAD ", b"GET ", 1), ends=True, kind="ending")
        version = rng.choice((b"1.0", b"1.1"))
        fields = (rng.choice((b"Connection: close", b"connection: Close, x", b"Connection: keep-alive, close")),)
        return Sent(head(b"GET", b"/a", b"app.example", fields, self.plan("plain"), version=version), ends=True, kind="ending")


ILLEGAL = (
    (b"Host: app.example\r\n", b""),
    (b"Host: app.example\r\n", b"Host: app.example\r\nHost: app.example\r\n"),
    (b"Host: app.example\r\n", b"Host: app.example\r\nHost: b\r\n"),
    (b"Host: app.example", b"Host: a b"),
    (b"Host: app.example", b"Host : app.example"),
    (b"Host: app.example", b"Host: a/b"),
    (b"Host: app.example", b"Host: a@b"),
    (b"GET ", b"get "),
    (b"GET ", b"GET  "),
    (b"GET ", b" GET "),
    (b"GET ", b"G ET "),
    (b" HTTP/1.1", b" HTTP/1.2"),
    (b" HTTP/1.1", b"  HTTP/1.1"),
    (b" HTTP/1.1", b" HTTP/2.0"),
    (b" HTTP/1.1", b" http/1.1"),
    (b" HTTP/1.1", b""),
    (b" /a", b" a"),
    (b" /a", b" /a\x00"),
    (b" /a", b" /a#x"),
    (b" /a", b" /a\x7f"),
    (b" /a", b" /a\t"),
    (b"accept", b"acc ept"),
    (b"accept", b"acc\x00ept"),
    (b"accept", b" accept"),
    (b"accept: */*", b"accept"),
    (b"accept: */*", b": x"),
    (b"accept: */*", b"accept: a\r\n folded"),
    (b"accept: */*", b"accept: a\x00b"),
    (b"accept: */*", b"accept: a\rb"),
    (b"accept: */*", b"accept: a\nb"),
    (b"accept: */*", b"content-length: 1\r\ncontent-length: 2"),
    (b"accept: */*", b"content-length: 3\r\ncontent-length: 3"),
    (b"accept: */*", b"content-length: -1"),
    (b"accept: */*", b"content-length: +1"),
    (b"accept: */*", b"content-length: 1x"),
    (b"accept: */*", b"content-length: 0x5"),
    (b"accept: */*", b"content-length: 1,1"),
    (b"accept: */*", b"content-length:"),
    (b"accept: */*", b"content-length: 99999999999999999999"),
    (b"accept: */*", b"content-length: 3\r\ntransfer-encoding: chunked"),
    (b"accept: */*", b"transfer-encoding: chunked, identity"),
    (b"accept: */*", b"transfer-encoding: xchunked"),
    (b"accept: */*", b"transfer-encoding: chunked\r\ntransfer-encoding: chunked"),
)

SHARES = {
    "plain": 745,
    "odd_answer": 60,
    "body_apart": 60,
    "large_body": 1,
    "large_answer": 3,
    "fragments": 40,
    "pipelined": 25,
    "odd": 45,
    "odd_body": 10,
    "illegal": 4,
    "ending": 6,
}


def corpus(maker: Maker) -> list[Sent]:
    """Not drawn: heads cut at every boundary, every illegal head, every plan."""
    made = []
    raw = head(b"POST", b"/a/b", b"app.example", (b"content-length: 5", b"x-variant: b"), maker.plans.kinds["plain"][3]) + b"hello"
    made += [Sent(raw, cuts=(at,), kind="fragments") for at in range(1, len(raw))]
    for number, plan in enumerate(maker.plans.all):
        for method in (b"GET",) if plan.ends else (b"GET", b"HEAD"):
            raw = head(method, b"/b", b"app.example", (), number)
            made.append(Sent(raw, (method == b"HEAD",), ends=plan.ends, kind="ending" if plan.ends else "odd_answer"))
    raw = head(b"GET", b"/a", b"app.example", (b"accept: */*",), maker.plans.kinds["plain"][0])
    made += [Sent(raw.replace(old, new, 1), ends=True, kind="illegal") for old, new in ILLEGAL]
    for path in (*PATHS, *DENIED, *ELSEWHERE, *NOT_PLAIN):
        for method in (b"GET", b"HEAD", b"PATCH"):
            raw = head(method, path, b"app.example", (), maker.plans.kinds["plain"][1])
            made.append(Sent(raw, (method == b"HEAD",), kind="odd"))
    for fields in (*HEADERS, *ODD_HEADERS):
        made.append(Sent(head(b"GET", b"/a", b"app.example", fields, maker.plans.kinds["plain"][2]), kind="odd"))
    for host in (*HOSTS, *ODD_HOSTS):
        made.append(Sent(head(b"GET", b"/a", host, (), maker.plans.kinds["plain"][2]), kind="odd"))
    return made


def draw(seed: int, count: int, plans: Plans) -> list[Sent]:
    """The corpus, and so many drawn ones."""
    maker = Maker(seed, plans)
    kinds = maker.rng.choices(list(SHARES), list(SHARES.values()), k=count)
    return corpus(maker) + [maker.one(kind) for kind in kinds]
