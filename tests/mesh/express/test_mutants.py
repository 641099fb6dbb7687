"""The differential test sees: a table with one edge, one mark or one action changed does not pass it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from random import Random

import pytest

from mesh.express.dfa import ACT, DONE, FIRST, PUNT, Kind, Row, Table
from mesh.express.machine import HEAD_METHOD
from mesh.express.program import Program
from mesh.model import Operation
from tests.mesh.express.build import allow, deny, facts, program
from tests.mesh.express.test_differential import same

Place = tuple[int, int, int, int, int]  # state, rule, seen, once, length
MUTANTS = 60
PAIRS_MAX = 100_000
EMPTY = (PUNT,) * 256


def step(table: Table, place: Place | None, byte: int) -> Place | None:
    """One byte further, as `mesh.express.machine` goes; None: user space."""
    if place is None or place[0] == DONE:
        return None
    state, rule, seen, once, length = place
    row = table.rows[state - FIRST]
    edge = row.next[byte]
    if edge & ACT:
        if row.kind is Kind.ONCE and once & row.value:
            return None
        rule = row.value if row.kind is Kind.RULE else rule
        once |= row.value if row.kind is Kind.ONCE else 0
        seen |= row.value if row.kind is Kind.MATCH else 0
        length = length * 10 + byte - 48 if row.kind is Kind.DIGIT else length
    after = edge & ~ACT
    return None if after == PUNT else (after, rule, seen, once, length)


def outcome(made: Program, place: Place | None) -> object:
    """What a head that ends here comes to."""
    if place is None or place[0] != DONE:
        return None
    verdict = made.verdicts.get((place[1] & ~HEAD_METHOD, place[2]))
    return verdict and (verdict, place[1] & HEAD_METHOD, place[4])


def telling(made: Program, mutant: Program) -> bytes | None:
    """The shortest head that the two tables do not decide alike; None: there is none."""
    start = (made.table.root, 0, 0, 0, 0)
    known: set[object] = set()
    queue: deque[tuple[Place | None, Place | None, bytes]] = deque([(start, start, b"")])

    @cache
    def kinds(left: int, right: int) -> tuple[int, ...]:
        edges = made.table.rows[left - FIRST].next if left else EMPTY, mutant.table.rows[right - FIRST].next if right else EMPTY
        return tuple({pair: byte for byte, pair in enumerate(zip(*edges, strict=True)) if any(pair)}.values())

    while queue:
        assert len(known) < PAIRS_MAX
        left, right, text = queue.popleft()
        for byte in kinds(left[0] if left else 0, right[0] if right else 0):
            pair = step(made.table, left, byte), step(mutant.table, right, byte)
            raw = text + bytes((byte,))
            if outcome(made, pair[0]) != outcome(mutant, pair[1]):
                return raw
            on = tuple(None if place is None or place[0] == DONE else place for place in pair)
            # Of the lengths only whether they differ
            key = (*(place and place[:4] for place in on), bool(on[0] and on[1] and on[0][4] != on[1][4]))
            if any(on) and key not in known:
                known.add(key)
                queue.append((*on, raw))
    return None


def changed(random: Random, table: Table) -> Iterator[Table]:
    """Tables with one thing changed."""
    while True:
        place = random.randrange(len(table.rows))
        row = table.rows[place]
        if random.random() < 0.1 and row.kind in (Kind.RULE, Kind.MATCH, Kind.ONCE):
            new = replace(row, value=row.value ^ (1 << random.randrange(2)))
        else:
            byte = random.randrange(256)
            edge = random.choice((PUNT, row.next[byte] ^ ACT, random.randrange(FIRST, len(table.rows) + FIRST)))
            if edge == row.next[byte] or edge & ~ACT == PUNT == row.next[byte] or (edge & ACT and row.kind is Kind.NONE):
                continue
            new = Row((*row.next[:byte], edge, *row.next[byte + 1 :]), row.kind, row.value)
        rows = (*table.rows[:place], new, *table.rows[place + 1 :])
        yield replace(table, rows=rows)


RULES = (
    allow(Operation(methods=("GET", "HEAD"), paths=("/a/*", "/x"), hosts=("*.mesh",), headers=(("x-user", "bob"),))),
    deny(Operation(paths=("/a/b",))),
)


@pytest.mark.parametrize("items", [(), RULES], ids=["plain", "rules"])
def test_a_changed_table_is_found_out(items):
    known = facts(*items)
    made = program(known)
    random = Random(9)
    found = 0
    for _, table in zip(range(MUTANTS), changed(random, made.table), strict=False):
        mutant = replace(made, table=table)
        raw = telling(made, mutant)
        if raw is not None:
            found += 1
            same(known, made, raw)
            with pytest.raises(AssertionError):
                same(known, mutant, raw)
    # The others end where no verdict is: without a rule, without a Host, or with two
    assert found > MUTANTS / 2
