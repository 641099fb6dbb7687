"""What a table accepts, everyone reads the same; and it decides as the router and the evaluator do."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.express import request as grammar
from mesh.express.destination import Destination, Facts, Refusal
from mesh.express.machine import run
from mesh.express.program import Program
from mesh.model import Operation
from tests.mesh.express.build import (
    HEADERS,
    KEY,
    PATHS,
    PEER,
    allow,
    anything,
    carried,
    compiled,
    deny,
    facts,
    local,
    program,
    reference,
)
from tests.mesh.express.heads import make, read_alike, strict

SEEDS = st.integers(0, 1 << 64)
PLAIN_FACTS = facts()
PLAIN = program(PLAIN_FACTS)
FULL = facts(
    allow(
        Operation(methods=("GET", "HEAD"), paths=("/a/*", "/api*", "*.txt"), hosts=("*.mesh", "h"), headers=(("x-user", "bob"),)),
        Operation(paths=("/a",), headers=(("x-env", None),)),
    ),
    deny(Operation(methods=("PUT",), not_paths=("/a/b",))),
)
FULL_PROGRAM = program(FULL)


@cache
def asked(known: Facts) -> tuple[list[str], bool]:
    """Headers that rules read, and whether names with "_" are taken."""
    reads, underscored = Destination(known, PEER, KEY, 80, local=local(known)).reads()
    return [name for name in reads.headers if name not in grammar.PUNTED], not underscored


def same(known: Facts, made: Program, raw: bytes) -> bool:
    """Whether the kernel carries it. Raises AssertionError where it should decide otherwise."""
    headers, underscores = asked(known)
    raw, end, _ = raw.partition(b"\r\n\r\n")
    raw += end
    head = strict(raw, headers, underscores=underscores)
    expected = reference(known, head) if head is not None else None
    assert carried(made, raw) == expected, (raw, made.read(raw))
    if expected is None:
        return False
    reading = read_alike(raw)
    found, _ = made.read(raw)
    assert (found.end, found.length, found.head) == (len(raw), reading.length, reading.method == "HEAD")
    return True


def test_heads_of_a_plain_service():
    random = Random(5)
    count = sum(same(PLAIN_FACTS, PLAIN, make(random)) for _ in range(4000))
    assert count > 1000, "most of them were for user space"


def test_heads_of_a_service_with_rules():
    random = Random(6)
    paths = [path.encode() for path in PATHS]
    count = sum(same(FULL, FULL_PROGRAM, make(random, paths, HEADERS)) for _ in range(6000))
    assert count > 50


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_any_head(seed):
    random = Random(seed)
    for _ in range(5):
        same(PLAIN_FACTS, PLAIN, make(random))


@given(SEEDS)
@settings(max_examples=150, deadline=None)
def test_any_destination(seed):
    random = Random(seed)
    known = anything(random)
    made = compiled(known)
    paths = [path.encode() for path in (*PATHS, "/a/12", "/img/", "/ab", "/xbb")]
    raws = [make(random, paths, HEADERS) for _ in range(60)]
    if isinstance(made, Refusal) and made.code.startswith(("too_", "regex")):
        return
    if isinstance(made, Refusal):
        headers, underscores = asked(known)
        heads = [strict(raw, headers, underscores=underscores) for raw in raws]
        assert not [head.raw for head in heads if head is not None and reference(known, head)], made
        return
    for raw in raws:
        same(known, made, raw)


@given(st.binary(max_size=200))
def test_any_bytes(raw):
    assert run(PLAIN.table, raw) is None or strict(raw[: raw.index(b"\r\n\r\n") + 4])


@pytest.mark.parametrize("made", [PLAIN, FULL_PROGRAM], ids=["plain", "rules"])
def test_a_head_split_anywhere_is_not_accepted(made):
    raw = b"GET /a/b?c HTTP/1.1\r\nHost: web.shop.mesh:80\r\nX-User: bob\r\nContent-Length: 12\r\nConnection: keep-alive\r\n\r\n"
    assert made.read(raw)
    for cut in range(len(raw)):
        assert run(made.table, raw[:cut]) is None
        if cut:
            assert run(made.table, raw[cut:]) is None


def test_window():
    base = b"GET / HTTP/1.1\r\nHost: h\r\nX-Padding: %s\r\n\r\n"
    fits = base % (b"x" * (1024 - len(base) + 2))
    assert len(fits) == 1024 and run(PLAIN.table, fits).end == 1024
    assert run(PLAIN.table, base % (b"x" * (1025 - len(base) + 2))) is None
    assert run(PLAIN.table, fits, window=1023) is None


def test_what_follows_a_head_is_not_looked_at():
    raw = b"POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\n\r\n"
    found = run(PLAIN.table, raw + b"GET /\0")
    assert (found.end, found.length) == (len(raw), 5)


def test_a_head_has_no_more_fields_than_l7proxy_takes():
    shortest = b"aaaaa:\r\n"
    start, end = b"GET / HTTP/1.1\r\n", b"Host:h\r\n\r\n"
    raw = start + shortest * ((1024 - len(start) - len(end)) // 8) + end
    assert run(PLAIN.table, raw) and strict(raw)
    # Lines of headers that rules read may be shorter, which is why there must be few
    names = "abcdef"
    known = facts(deny(Operation(headers=tuple((name, "zzzz") for name in names))))
    assert len(names) == grammar.HEADERS_MAX
    short = b"".join(b"%c:\r\n" % ord(name) for name in names)
    raw = start + short + shortest * ((1024 - len(start) - len(end) - len(short)) // 8) + end
    assert program(known).read(raw) and strict(raw, names)
