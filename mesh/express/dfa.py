"""The tables the kernel steps: one row for each state, one edge for each byte, an action on marked edges.

States 0 (PUNT: user space decides) and 1 (DONE: the whole head is read) have no rows. State ``s`` of a `Table` is
``rows[s - 2]``; in the kernel's array it is ``base + s - 2``. A row has one action, done on its marked edges only.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

PUNT, DONE, FIRST = 0, 1, 2
ACT = 0x8000  # on an edge: do the row's action, then go on
LOOP = 0x4000  # on an edge in the kernel: the state it leads to stays where it is for all of TEXT, eight at a time
TEXT = range(0x20, 0x7F)
STATES_MAX = 2048  # of one table, minimised
RAW_STATES_MAX = 16_384  # of one table while it is built
ROWS_MAX = 16_384  # of a node, all tables together, the two reserved states included
BYTES = 256
_ROW = struct.Struct("<256HHHI")  # struct pl_xrow
ROW_BYTES = _ROW.size


class Kind(IntEnum):
    """enum pl_xaction: what a marked edge does."""

    NONE = 0
    RULE = 1  # rule = value
    ONCE = 2  # the bits of value are set in `once`; set already: punt
    DIGIT = 3  # length = length * 10 + the byte's digit
    MATCH = 4  # seen |= value
    STATUS = 5  # status = status * 10 + the byte's digit


class TooLarge(Exception):
    """The automaton has more states than a table may have."""


@dataclass(frozen=True, slots=True)
class Row:
    """``next``: 256 states, each perhaps marked with ACT."""

    next: tuple[int, ...]
    kind: Kind = Kind.NONE
    value: int = 0


@dataclass(frozen=True)
class Table:
    """Equal tables accept the same and do the same: states are minimal, and numbered by the order they are met in.
    The last ``tail`` rows lead nowhere but among themselves, and tables of many programs have the same."""

    rows: tuple[Row, ...]
    root: int
    tail: int = 0

    @property
    def front(self) -> int:
        """Rows before the tail."""
        return len(self.rows) - self.tail

    def relocate(self, base: int, tail_base: int | None = None) -> list[bytes]:
        """The rows as struct pl_xrow, for the array's entries from ``base`` (at least 2) on: all of them, or the front
        alone, to go with a tail that stands from ``tail_base`` on. Raises ValueError."""
        tail = base + self.front if tail_base is None else tail_base
        moved = self._pack(base, tail)
        return moved if tail_base is None else moved[: self.front]

    def relocate_tail(self, base: int) -> list[bytes]:
        """The tail's rows for the entries from ``base`` on. Raises ValueError."""
        return self._pack(FIRST, base)[self.front :]

    def _pack(self, base: int, tail: int) -> list[bytes]:
        for start, count in ((base, self.front), (tail, self.tail)):
            if start < FIRST or start + count > ROWS_MAX:
                raise ValueError(f"{count} rows from {start} on do not fit between {FIRST} and {ROWS_MAX}")
        moved = [PUNT, DONE, *range(base, base + self.front), *range(tail, tail + self.tail)]
        loops = {state for state, row in enumerate(self.rows, FIRST) if {row.next[byte] for byte in TEXT} == {state}}
        places = {
            edge: moved[edge & ~ACT] | edge & ACT | LOOP * (edge & ~ACT in loops)
            for edge in {edge for row in self.rows for edge in row.next}
        }.__getitem__
        return [_ROW.pack(*map(places, row.next), row.kind, row.value, 0) for row in self.rows]

    def root_at(self, base: int) -> int:
        """The root's number once the rows, or the front's, stand from ``base`` on."""
        return self.root + base - FIRST

    @cached_property
    def digest(self) -> str:
        """Equal for equal tables, so that a node keeps their rows once."""
        return _digest(self.relocate(FIRST))

    @cached_property
    def tail_digest(self) -> str:
        """Equal for equal tails."""
        return _digest(self.relocate_tail(FIRST))


def _digest(rows: list[bytes]) -> str:
    return f"{len(rows)}-{hashlib.blake2b(b''.join(rows), digest_size=16).hexdigest()}"


class Builder:
    """States being made. ``fallback`` of a new state: the state whose edges it starts with."""

    def __init__(self) -> None:
        self.edges: list[list[int]] = [[PUNT] * BYTES, [PUNT] * BYTES]
        self.actions: list[tuple[Kind, int]] = [(Kind.NONE, 0), (Kind.NONE, 0)]

    def state(self, fallback: int = PUNT, kind: Kind = Kind.NONE, value: int = 0) -> int:
        """A new state. Raises TooLarge."""
        if len(self.edges) >= RAW_STATES_MAX:
            raise TooLarge
        self.edges.append(list(self.edges[fallback]))
        self.actions.append((kind, value))
        return len(self.edges) - 1

    def edge(self, at: int, over: Iterable[int], to: int, *, act: bool = False) -> None:
        """Edges over some bytes. An edge to PUNT does nothing on its way."""
        code = to | ACT if act and to != PUNT else to
        edges = self.edges[at]
        for byte in over:
            edges[byte] = code

    def action(self, at: int, kind: Kind, value: int = 0) -> None:
        self.actions[at] = (kind, value)

    def chain(self, at: int, text: bytes, to: int, *, fold: bool = False) -> None:
        """``text`` from ``at``, its last byte leading to ``to``; ``fold``: in either case."""
        for position, byte in enumerate(text):
            after = to if position == len(text) - 1 else self.state()
            self.edge(at, cases(byte) if fold else (byte,), after)
            at = after

    def table(self, root: int, tail: int = PUNT) -> Table:
        """Minimised; ``tail``: the state whose part stands last. Raises TooLarge."""
        return minimise(self, root, tail)

    def unminimised(self, root: int) -> Table:
        """As built, for comparison; perhaps larger than a table may be."""
        return Table(
            tuple(Row(tuple(edges), *action) for edges, action in zip(self.edges[FIRST:], self.actions[FIRST:], strict=True)),
            root,
        )


def cases(byte: int) -> tuple[int, ...]:
    """A letter in both cases."""
    low, high = ord(chr(byte).lower()) if byte < 128 else byte, ord(chr(byte).upper()) if byte < 128 else byte
    return (low,) if low == high else (low, high)


def minimise(builder: Builder, root: int, tail: int = PUNT) -> Table:
    """The smallest table that does the same, by splitting sets of states until their members can not be told apart.
    States that can not lead to DONE become PUNT. Bytes that no state tells apart are looked at once. Raises TooLarge."""
    order, before = _reachable(builder.edges, root)
    distance = _distances(before)
    order = [state for state in order if state in distance]
    if root not in distance:
        raise ValueError("a table that accepts nothing")
    count = len(order) + FIRST
    index = {state: place for place, state in enumerate(order, FIRST)} | {DONE: DONE}
    code = [PUNT] * (ACT * 2)
    for state, place in index.items():
        code[state], code[state | ACT] = place, place + count
    columns = set(zip(*(builder.edges[state] for state in order), strict=True))
    rows = [tuple(map(code.__getitem__, row)) for row in zip(*columns, strict=True)]
    # By action and by the shortest way to DONE, which alone tells most states apart
    groups: dict[tuple[Kind, int, int], list[int]] = {}
    for place, (state, row) in enumerate(zip(order, rows, strict=True), FIRST):
        action = builder.actions[state] if max(row) >= count else (Kind.NONE, 0)
        groups.setdefault((*action, distance[state]), []).append(place)
    sets = {number: set(members) for number, members in enumerate(groups.values(), FIRST)}
    block = [PUNT, DONE] + [PUNT] * (2 * count - FIRST)  # of states; from ``count`` on, of states that marked edges lead to
    block[count + DONE] = count + DONE
    look = block.__getitem__
    for number, members in sets.items():
        for place in members:
            block[place], block[place + count] = number, number + count
    # Set -> those of its members whose edges lead elsewhere since it was last looked at; the others are alike
    pending = {number: set(members) for number, members in sets.items() if len(members) > 1}
    while pending:
        number, changed = pending.popitem()
        renamed = _split(sets, number, changed, lambda place: tuple(map(look, rows[place - FIRST])))
        for new in renamed:
            for place in sets[new]:
                block[place], block[place + count] = new, new + count
        for state in {state for new in renamed for place in sets[new] for state in before[order[place - FIRST]]}:
            place = index.get(state, PUNT)
            if place and len(sets[block[place]]) > 1:
                pending.setdefault(block[place], set()).add(place)
    of_state = {state: block[place] for state, place in index.items()}
    return _numbered(builder, order, of_state, of_state[root], of_state.get(tail, PUNT))


def _split(sets: dict[int, set[int]], number: int, changed: set[int], edges: Callable[[int], tuple[int, ...]]) -> list[int]:
    """Splits a set by its members' edges, all but the ``changed`` ones having the same; the largest part keeps the number.
    The numbers of the others."""
    members = sets[number]
    parts: dict[tuple[int, ...], set[int]] = {}
    for place in changed:
        parts.setdefault(edges(place), set()).add(place)
    other = next((place for place in members if place not in changed), None)
    if other is not None:
        members -= changed
        members |= parts.pop(edges(other), set())
        parts[()] = members
    largest, *smaller = sorted(parts.values(), key=len, reverse=True)
    sets[number] = largest
    out = []
    for part in smaller:
        new = len(sets) + FIRST
        sets[new] = part
        out.append(new)
    return out


def _reachable(edges: list[list[int]], root: int) -> tuple[list[int], dict[int, list[int]]]:
    """The states, without PUNT and DONE, and for each the states before it."""
    out: list[int] = [root]
    before: dict[int, list[int]] = {root: []}
    for state in out:
        for after in sorted({edge & ~ACT for edge in set(edges[state])} - {PUNT}):
            if after not in before:
                before[after] = []
                if after != DONE:
                    out.append(after)
            before[after].append(state)
    return out, before


def _distances(before: dict[int, list[int]]) -> dict[int, int]:
    """Bytes from each state to DONE."""
    out = {DONE: 0}
    queue = [DONE]
    for state in queue:
        for one in before.get(state, ()):
            if one not in out:
                out[one] = out[state] + 1
                queue.append(one)
    return out


def _numbered(builder: Builder, order: list[int], of_state: dict[int, int], root: int, tail: int) -> Table:
    """One state for each block, numbered as they are met from the root on, byte by byte; those met from ``tail`` on last."""
    sample: dict[int, int] = {}
    for state in order:
        sample.setdefault(of_state[state], state)
    after = {
        one: [of_state.get(edge & ~ACT, PUNT) for edge in dict.fromkeys(builder.edges[state])] for one, state in sample.items()
    }
    last = _met(after, [tail], set()) if tail != PUNT else []
    met = [*_met(after, [root], set(last)), *last]
    if len(met) > STATES_MAX:
        raise TooLarge
    number = {PUNT: PUNT, DONE: DONE, **{one: place for place, one in enumerate(met, FIRST)}}
    code = [PUNT] * (ACT * 2)
    for state, one in of_state.items():
        code[state], code[state | ACT] = number[one], number[one] | ACT
    rows = []
    for one in met:
        edges = tuple(map(code.__getitem__, builder.edges[sample[one]]))
        rows.append(Row(edges, *(builder.actions[sample[one]] if max(edges) & ACT else (Kind.NONE, 0))))
    return Table(tuple(rows), number[root], len(last))


def _met(after: dict[int, list[int]], starts: list[int], known: set[int]) -> list[int]:
    met, seen = list(starts), {PUNT, DONE, *known, *starts}
    for one in met:
        for to in after[one]:
            if to not in seen:
                seen.add(to)
                met.append(to)
    return met
