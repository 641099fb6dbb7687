from __future__ import annotations

import struct
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.express import request as grammar
from mesh.express.destination import Refusal
from mesh.express.dfa import ACT, DONE, FIRST, PUNT, ROW_BYTES, ROWS_MAX, STATES_MAX, Builder, Kind, Row, Table, TooLarge
from mesh.express.machine import run
from mesh.express.response import RESPONSE
from mesh.model import Operation
from tests.mesh.express.build import HEADERS, PATHS, allow, anything, compiled, deny, facts, program
from tests.mesh.express.heads import make


def literal(text: bytes, kind: Kind = Kind.NONE, value: int = 0) -> Table:
    builder = Builder()
    root = builder.state()
    builder.chain(root, text[:-1], last := builder.state(kind=kind, value=value))
    builder.edge(last, text[-1:], DONE, act=kind is not Kind.NONE)
    return builder.table(root)


def placed(table: Table, base: int, tail: int | None = None) -> Table:
    """As the kernel's array would have it."""
    rows = {base + place: row for place, row in enumerate(table.relocate(base, tail))}
    if tail is not None:
        rows |= {tail + place: row for place, row in enumerate(table.relocate_tail(tail))}
    empty = Row((PUNT,) * 256)
    out = []
    for state in range(FIRST, max(rows) + 1):
        packed = rows.get(state)
        *edges, kind, value, pad = struct.unpack("<256HHHI", packed) if packed else (*empty.next, 0, 0, 0)
        assert pad == 0
        out.append(Row(tuple(edges), Kind(kind), value))
    return Table(tuple(out), table.root_at(base))


def test_layout_of_a_row():
    row = literal(b"ab", Kind.MATCH, 0x1234).relocate(1000)
    assert [len(packed) for packed in row] == [ROW_BYTES, ROW_BYTES] == [520, 520]
    first, second = (struct.unpack("<256HHHI", packed) for packed in row)
    assert first[ord("a")] == 1001
    assert second[ord("b")] == DONE | ACT
    assert second[256:] == (Kind.MATCH, 0x1234, 0)
    assert sum(first[:256]) == 1001


@pytest.mark.parametrize("base", [0, 1, ROWS_MAX - 1])
def test_rows_stay_within_the_array(base):
    with pytest.raises(ValueError, match="do not fit"):
        literal(b"ab").relocate(base)


HEAD = b"GET /a/b HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n"


@pytest.mark.parametrize(("base", "tail"), [(2, None), (777, None), (5000, 2), (2, 9000)])
def test_a_table_does_the_same_wherever_it_stands(base, tail):
    made = program(facts(deny(Operation(methods=("PUT",), paths=("/x*",))))).table
    moved = placed(made, base, tail)
    assert run(moved, HEAD) == run(made, HEAD) is not None
    random = Random(1)
    for _ in range(300):
        raw = make(random)
        assert run(moved, raw) == run(made, raw)


def test_programs_share_the_part_after_the_target():
    tables = [
        program(facts(*items)).table
        for items in ((), (deny(Operation(paths=("/x*",))),), (allow(Operation(methods=("GET", "PUT"), paths=("/x*", "*.y"))),))
    ]
    assert len({table.digest for table in tables}) == 3
    assert len({table.tail_digest for table in tables}) == 1
    assert all(table.front < 50 < table.tail for table in tables)
    other = program(facts(deny(Operation(hosts=("x",))))).table
    assert other.tail_digest != tables[0].tail_digest


def test_states_are_numbered_as_they_are_met():
    one, other = Builder(), Builder()
    for builder, order in ((one, (b"ab", b"cd")), (other, (b"cd", b"ab"))):
        builder.state()
        for text in order:
            builder.chain(2, text, DONE)
    assert one.table(2) == other.table(2)
    assert len(one.table(2).rows) == 3


def test_states_that_do_the_same_are_one_state():
    builder = Builder()
    root = builder.state()
    for text in (b"axyz", b"bxyz", b"cxyz"):
        builder.chain(root, text, DONE)
    assert len(builder.unminimised(root).rows) == 10
    assert len(builder.table(root).rows) == 4


def test_actions_keep_states_apart():
    builder = Builder()
    root = builder.state()
    for byte, value in ((b"a", 1), (b"b", 2), (b"c", 2)):
        after = builder.state(kind=Kind.MATCH, value=value)
        builder.edge(root, byte, after)
        builder.edge(after, b"x", DONE, act=True)
    # A state whose action is on no edge is like any other
    idle = builder.state(kind=Kind.MATCH, value=9)
    builder.edge(root, b"d", idle)
    builder.edge(idle, b"x", DONE)
    plain = builder.state()
    builder.edge(root, b"e", plain)
    builder.edge(plain, b"x", DONE)
    table = builder.table(root)
    assert len(table.rows) == 4
    assert [run(table, text).seen for text in (b"ax", b"bx", b"cx", b"dx", b"ex")] == [1, 2, 2, 0, 0]


def test_too_many_states():
    builder = Builder()
    root = builder.state()
    builder.chain(root, bytes(range(256)) * (STATES_MAX // 256 + 1), DONE)
    with pytest.raises(TooLarge):
        builder.table(root)


def test_states_that_lead_nowhere_are_user_space():
    builder = Builder()
    root = builder.state()
    builder.chain(root, b"ok", DONE)
    builder.chain(root, b"nowhere", builder.state())
    assert len(builder.table(root).rows) == 2
    with pytest.raises(ValueError, match="accepts nothing"):
        builder.table(builder.state())


@given(st.integers(0, 1 << 64))
@settings(max_examples=40, deadline=None)
def test_minimised_equals_unminimised(seed):
    random = Random(seed)
    built: list[tuple[Builder, int]] = []
    original = grammar.build

    def build(*args, **more):
        builder, root, tail = original(*args, **more)
        built.append((builder, root))
        return builder, root, tail

    grammar.build = build
    grammar.table.cache_clear()
    try:
        made = compiled(anything(random))
    finally:
        grammar.build = original
    if isinstance(made, Refusal):
        return
    builder, root = built[-1]
    raw_table = builder.unminimised(root)
    assert len(made.table.rows) < len(raw_table.rows)
    paths = [path.encode() for path in PATHS]
    for _ in range(60):
        raw = make(random, paths, HEADERS)
        assert run(raw_table, raw) == run(made.table, raw), raw


@pytest.mark.parametrize("table", [program(facts()).table, RESPONSE], ids=["request", "response"])
def test_no_two_states_of_a_table_are_the_same(table):
    builder = Builder()
    for row in table.rows:
        builder.edges.append(list(row.next))
        builder.actions.append((row.kind, row.value))
    again = builder.table(table.root)
    assert len(again.rows) == len(table.rows)
    rng = Random(2)
    rng.shuffle(order := list(range(len(table.rows))))
    place = {PUNT: PUNT, DONE: DONE, **{FIRST + old: FIRST + new for new, old in enumerate(order)}}
    shuffled = Builder()
    for old in order:
        shuffled.edges.append([place[edge & ~ACT] | edge & ACT for edge in table.rows[old].next])
        shuffled.actions.append((table.rows[old].kind, table.rows[old].value))
    assert shuffled.table(place[table.root]) == again
