"""What the server of the differential test of express answers. Its programs import it, so only the standard
library here."""

from __future__ import annotations

import random
from dataclasses import dataclass

BUDGET_BYTES = 256 << 10  # of a response that the kernel carries


@dataclass(frozen=True)
class Plan:
    """A response. ``pieces``: one send() each; ``head``: of those, for HEAD; ``close``: the server ends the connection behind
    it; ``ends``: the proxy ends the client's; ``cut``: the answer is not whole, or not there."""

    pieces: tuple[bytes, ...]
    head: tuple[bytes, ...]
    close: bool = False
    ends: bool = False


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
    for status in (
        200,
        200,
        200,
        201,
        202,
        203,
        206,
        301,
        302,
        307,
        400,
        401,
        403,
        404,
        405,
        409,
        410,
        418,
        422,
        429,
        500,
        501,
        505,
        599,
    ):
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
    return [
        whole(200, 33, b"Connection: close", close=True, ends=True),
        Plan((until_close + text(50),), (until_close,), close=True, ends=True),
        Plan((until_close, text(50), text(9)), (until_close,), close=True, ends=True),
        Plan((v10 + b"ok",), (v10,), close=True, ends=True),
        Plan((b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok-and-more",), (b"HTTP/1.1 200 OK\r\n\r\nmore",), ends=True),
        Plan(
            (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok",), (b"HTTP/1.1 nonsense\r\n\r\n",), ends=True
        ),
        Plan((b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok",), (b"HTTP/1.1 20",), close=True, ends=True),  # cut
        Plan((), (), close=True, ends=True),  # asked again where that is safe, or 502
        Plan((b"HTTP/1.1 200 O",), (), close=True, ends=True),
        Plan((b"garbage\r\n\r\n",), (b"garbage\r\n\r\n",), ends=True),
    ]


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
