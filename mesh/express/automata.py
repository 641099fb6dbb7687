"""Sets of texts as automata: what one walk over a text tells about many patterns at once.

An `Nfa` collects the patterns; `determinise` walks it together with a `Grammar`, which says what texts there are and
which byte of them the patterns see (the host's in lower case; not the blanks before a value).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mesh.express.dfa import BYTES, TooLarge

ANY = (1 << BYTES) - 1
ITEMS_MAX = 8192  # of all patterns of one text together
WALK_STATES_MAX = 2048  # of one text, before minimising

Grammar = tuple[Mapping[int, tuple[int, int | None]], ...]  # by state: byte -> (next state, the byte the patterns see)


def mask(over: Iterable[int]) -> int:
    """A set of bytes as a number."""
    out = 0
    for byte in over:
        out |= 1 << byte
    return out


class Nfa:
    """Patterns by number. An item is a place in a pattern; ``accepts[item]`` has the bits of the patterns that match
    a text that ends there."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, int]]] = []  # item -> (bytes, next item)
        self.accepts: list[int] = []
        self.starts: set[int] = set()

    def item(self, accepts: int = 0, *, loop: bool = False) -> int:
        """A new item; ``loop``: any byte leads back to it. Raises TooLarge."""
        if len(self.steps) >= ITEMS_MAX:
            raise TooLarge
        place = len(self.steps)
        self.steps.append([(ANY, place)] if loop else [])
        self.accepts.append(accepts)
        return place

    def step(self, at: int, over: int, to: int) -> None:
        self.steps[at].append((over, to))

    def chain(self, at: int, text: bytes, *, accepts: int = 0, loop: bool = False) -> int:
        """Items for ``text`` from ``at`` on; ``accepts`` and ``loop`` are of the last. An empty text adds none."""
        for place, byte in enumerate(text, 1):
            last = place == len(text)
            after = self.item(accepts if last else 0, loop=loop and last)
            self.step(at, 1 << byte, after)
            at = after
        return at

    def start(self, accepts: int = 0, *, loop: bool = False) -> int:
        """An item every text starts in."""
        place = self.item(accepts, loop=loop)
        self.starts.add(place)
        return place


@dataclass(frozen=True, slots=True)
class Spot:
    """A state of a walk. ``next``: for each class of bytes the next spot or -1; ``matched``: the patterns that match a text
    that ends here, ``witness`` being the shortest such text as the patterns see it."""

    grammar: int
    next: tuple[int, ...]
    matched: int
    witness: bytes


@dataclass(frozen=True, slots=True)
class Walk:
    """``classes``: bytes that lead to the same spots everywhere."""

    spots: tuple[Spot, ...]
    classes: tuple[bytes, ...]


def determinise(nfa: Nfa, grammar: Grammar) -> Walk:
    """Every spot that texts of the grammar, which starts in its state 0, lead to. Raises TooLarge."""
    kinds = _kinds(nfa)
    by_kind: list[dict[int, list[int]]] = []
    inside: list[int] = [0] * (max(kinds) + 1)
    for byte, kind in enumerate(kinds):
        inside[kind] |= 1 << byte
    for steps in nfa.steps:
        table: dict[int, list[int]] = {}
        for over, to in steps:
            for kind, members in enumerate(inside):
                if over & members:
                    table.setdefault(kind, []).append(to)
        by_kind.append(table)
    classes = _classes(kinds, grammar)
    moves = [[_move(state, cls[0], kinds) for cls in classes] for state in grammar]
    first = (0, frozenset(nfa.starts))
    index = {first: 0}
    order = [first]
    witnesses = [b""]
    rows: list[tuple[int, ...]] = []
    for place, (state, items) in enumerate(order):
        after_kind: dict[int, frozenset[int]] = {}
        row: list[int] = []
        for move in moves[state]:
            if move is None:
                row.append(-1)
                continue
            to, kind, byte = move
            after = items
            if kind >= 0:
                known = after_kind.get(kind)
                if known is None:
                    known = after_kind[kind] = frozenset(one for item in items for one in by_kind[item].get(kind, ()))
                after = known
            key = (to, after)
            found = index.get(key)
            if found is None:
                if len(order) >= WALK_STATES_MAX:
                    raise TooLarge
                found = index[key] = len(order)
                order.append(key)
                witnesses.append(witnesses[place] + bytes((byte,)) if kind >= 0 else witnesses[place])
            row.append(found)
        rows.append(tuple(row))
    spots = []
    for (state, items), edges, witness in zip(order, rows, witnesses, strict=True):
        matched = 0
        for item in items:
            matched |= nfa.accepts[item]
        spots.append(Spot(state, edges, matched, witness))
    return Walk(tuple(spots), tuple(classes))


def _kinds(nfa: Nfa) -> list[int]:
    """A number for each byte, equal where no pattern tells the bytes apart."""
    told: list[int] = [0] * BYTES
    for bit, over in enumerate({over for steps in nfa.steps for over, _ in steps} - {ANY}):
        if over & (over - 1) == 0:
            told[over.bit_length() - 1] |= 1 << bit
        else:
            for byte in range(BYTES):
                if over >> byte & 1:
                    told[byte] |= 1 << bit
    numbers: dict[int, int] = {}
    return [numbers.setdefault(one, len(numbers)) for one in told]


def _classes(kinds: list[int], grammar: Grammar) -> list[bytes]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for byte in range(BYTES):
        key = tuple(_move(state, byte, kinds)[:2] if byte in state else None for state in grammar)  # type: ignore[index]  # in it
        if any(part is not None for part in key):
            groups.setdefault(key, []).append(byte)
    return [bytes(group) for group in groups.values()]


def _move(state: Mapping[int, tuple[int, int | None]], byte: int, kinds: list[int]) -> tuple[int, int, int] | None:
    """Next state, the kind of the byte the patterns see (-1: none) and that byte."""
    if byte not in state:
        return None
    to, seen = state[byte]
    return (to, -1, 0) if seen is None else (to, kinds[seen], seen)
