"""Exchanges for the differential test of express: what a client sends, in which pieces, and which answer it asks for. Made
from a seed; the same seed makes the same list. Programs of the test import it, so nothing but the standard library here."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tests.e2e.answers import Plans, text

ID = b"@@@@@@"  # where the exchange's number goes: six digits


@dataclass(frozen=True)
class Sent:
    """What a client sends before it reads all answers. ``heads``: for each request, whether it is HEAD; ``cuts``: where `raw`
    is cut into messages; ``ends``: the last answer ends the connection."""

    raw: bytes
    heads: tuple[bool, ...] = (False,)
    cuts: tuple[int, ...] = ()
    ends: bool = False
    kind: str = "plain"
    once: bool = False  # not when the list begins anew

    @property
    def first(self) -> bytes:
        """The first message."""
        return self.raw[: self.cuts[0]] if self.cuts else self.raw


# ---- requests

PATHS = (b"/a", b"/a/", b"/a/b/c", b"/b", b"/b/x-1_2~3", b"/a/c:d", b"/a/@", b"/b/" + b"z" * 200, b"/a/b.")
ONLY = (b"/only", b"/only/this", b"/only/")
DENIED = (b"/a/private", b"/a/private/x", b"/a/privateer", b"/b/secret")
ELSEWHERE = (b"/", b"/ab", b"/bb/c", b"/none", b"/onl", b"/onlyx", b"/c/d", b"/a:b", b"/a/.b")
NOT_PLAIN = (b"/a/%41", b"/a//b", b"/a/../a", b"/a/./b", b"/a;p=1", b"/a/%2e%2e/private", b"//a", b"/a/%70rivate")
HEADERS = (
    (b"accept: */*",),
    (b"User-Agent: curl/8.0", b"Accept: */*"),
    (b"X-Variant: c",),
    (b"Connection: keep-alive",),
    (b"connection:Keep-Alive",),
    (b"cookie: " + b"k=v; " * 60,),
    (b"cookie: a=b", b"Cookie: c=d"),
    (b"x-fill: " + b"f" * 500,),
    (b"x-fill: " + b"f" * 650,),
    (b"x-deny: 0",),
    (b"accept-encoding: gzip, deflate, br", b"referer: http://x/y?z#w", b"x-a: 1", b"x-b:2", b"x-c:", b"x-d:\t4"),
)
ONE_BACKEND = ((b"x-variant: b",), (b"x-variant:b",))
ODD_HEADERS = (
    *ONE_BACKEND,
    (b"x-variant:b  ",),
    (b"x-variant:\tb\t",),
    (b"connection:Keep-Alive ",),
    (b"x-d:\t4\t",),
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


def head(
    method: bytes, path: bytes, host: bytes, fields: tuple[bytes, ...], plan: int, sub: int = 0, version: bytes = b"1.1"
) -> bytes:
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

    def request(self, *, sub: int = 0, plan: int | None = None) -> tuple[bytes, bool]:
        """A request the compiler would mostly take, and whether it is HEAD."""
        rng = self.rng
        method = rng.choices((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE"), (60, 8, 20, 6, 6))[0]
        body = text(rng.choice((0, 1, 10, 200, 1000, 1024, 3000))) if method in (b"POST", b"PUT") or rng.random() < 0.03 else None
        fields = rng.choice(ONE_BACKEND if rng.random() < 0.02 else HEADERS)
        paths = ONLY if rng.random() < 0.02 else PATHS
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
        method = rng.choices(
            (b"GET", b"HEAD", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"PURGE", b"get"), (50, 5, 5, 5, 3, 1, 1, 1)
        )[0]
        path = rng.choice(rng.choice((PATHS, ONLY, DENIED, ELSEWHERE, NOT_PLAIN)))
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

SHARES = {  # ends are rare: a connection is paired when it has lasted
    "plain": 7500,
    "odd_answer": 600,
    "body_apart": 600,
    "large_body": 10,
    "large_answer": 30,
    "fragments": 400,
    "pipelined": 250,
    "odd": 100,
    "odd_body": 100,
    "illegal": 2,
    "ending": 3,
}


def corpus(maker: Maker) -> list[Sent]:
    """Not drawn: heads cut at every boundary, every illegal head, every plan."""
    made = []
    raw = (
        head(b"POST", b"/a/b", b"app.example", (b"content-length: 5", b"x-variant: b"), maker.plans.kinds["plain"][3]) + b"hello"
    )
    made += [Sent(raw, cuts=(at,), kind="fragments") for at in range(1, len(raw))]
    for number, plan in enumerate(maker.plans.all):
        for method in (b"GET",) if plan.ends else (b"GET", b"HEAD"):
            raw = head(method, b"/b", b"app.example", (), number)
            made.append(Sent(raw, (method == b"HEAD",), ends=plan.ends, kind="ending" if plan.ends else "odd_answer"))
    raw = head(b"GET", b"/a", b"app.example", (b"accept: */*",), maker.plans.kinds["plain"][0])
    made += [Sent(raw.replace(old, new, 1), ends=True, kind="illegal") for old, new in ILLEGAL]
    for path in (*PATHS, *ONLY, *DENIED, *ELSEWHERE, *NOT_PLAIN):
        for method in (b"GET", b"HEAD", b"PATCH"):
            raw = head(method, path, b"app.example", (), maker.plans.kinds["plain"][1])
            made.append(Sent(raw, (method == b"HEAD",), kind="odd"))
    for fields in (*HEADERS, *ODD_HEADERS):
        made.append(Sent(head(b"GET", b"/a", b"app.example", fields, maker.plans.kinds["plain"][2]), kind="odd"))
    for host in (*HOSTS, *ODD_HOSTS):
        made.append(Sent(head(b"GET", b"/a", host, (), maker.plans.kinds["plain"][2]), kind="odd"))
    return made


def draw(seed: int, count: int, plans: Plans) -> list[Sent]:
    """So many, the corpus among them, spread: what ends a connection ends a paired one then."""
    maker = Maker(seed, plans)
    fixed = corpus(maker)
    kinds = maker.rng.choices(list(SHARES), list(SHARES.values()), k=max(0, count - len(fixed)))
    made = [maker.one(kind) for kind in kinds]
    step = len(made) / len(fixed)
    for place in range(len(fixed) - 1, -1, -1):
        made.insert(int(place * step), replace(fixed[place], once=True))
    return made
