"""Regular expressions as items of an automaton: the places of their letters, and which may follow which.

Python's own parser reads them, so that a pattern means here what `re` makes of it. What is no regular language, or has
another meaning inside a text than at its ends, is not taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from re import _constants as op  # type: ignore[attr-defined]  # the parser behind `re` is the one that counts
from re import _parser as parser  # type: ignore[attr-defined]  # as above
from typing import Any

from mesh.express.automata import ANY, Nfa, mask
from mesh.express.dfa import BYTES, TooLarge

PLACES_MAX = 256  # letters of one pattern with its counted repeats written out
MOVES_MAX = 2048  # remembered of one `Pattern`


class NotRegular(Exception):
    """Not taken; `TooLarge` where it is only its size."""


Part = tuple[bool, frozenset[int], frozenset[int]]  # may be empty, first items, last items
_EMPTY: Part = (True, frozenset(), frozenset())


def add(nfa: Nfa, pattern: str, accepts: int) -> None:
    """Adds what the pattern matches as a whole. Texts are bytes seen as latin-1. Raises NotRegular, TooLarge."""
    tree = list(parser.parse(pattern))
    flags = re.compile(pattern).flags
    if flags & ~re.UNICODE:
        raise NotRegular
    if tree and tree[0] == (op.AT, op.AT_BEGINNING):
        del tree[0]
    if tree and tree[-1] == (op.AT, op.AT_END):
        del tree[-1]
    builder = _Places(nfa)
    empty, first, last = builder.sequence(tree)
    start = nfa.start(accepts if empty else 0)
    for item in first:
        nfa.step(start, builder.masks[item], item)
    for item in last:
        nfa.accepts[item] |= accepts


class Pattern:
    """Whether the whole of a text matches, found by going through it once: the time is in proportion to the text, whatever
    text and pattern are. Raises NotRegular, TooLarge."""

    def __init__(self, pattern: str) -> None:
        self._nfa = Nfa()
        add(self._nfa, pattern, 1)
        self._moves: dict[tuple[frozenset[int], int], frozenset[int]] = {}

    def __call__(self, text: bytes) -> bool:
        items, moves = frozenset(self._nfa.starts), self._moves
        for byte in text:
            after = moves.get((items, byte))
            if after is None:
                if len(moves) >= MOVES_MAX:
                    moves.clear()
                steps = (step for item in items for step in self._nfa.steps[item])
                after = moves[items, byte] = frozenset(to for over, to in steps if over >> byte & 1)
            items = after
            if not items:
                return False
        return any(self._nfa.accepts[item] for item in items)


class _Places:
    def __init__(self, nfa: Nfa) -> None:
        self.nfa = nfa
        self.masks: dict[int, int] = {}

    def place(self, over: int) -> Part:
        if len(self.masks) >= PLACES_MAX:
            raise TooLarge
        item = self.nfa.item()
        self.masks[item] = over
        only = frozenset((item,))
        return False, only, only

    def follow(self, last: frozenset[int], first: frozenset[int]) -> None:
        for item in last:
            steps = self.nfa.steps[item]
            known = {to for _, to in steps}
            steps += [(self.masks[to], to) for to in first if to not in known]

    def join(self, left: Part, right: Part) -> Part:
        self.follow(left[2], right[1])
        return (
            left[0] and right[0],
            left[1] | right[1] if left[0] else left[1],
            left[2] | right[2] if right[0] else right[2],
        )

    def sequence(self, nodes: Sequence[Any]) -> Part:
        part = _EMPTY
        for node in nodes:
            part = self.join(part, self.node(*node))
        return part

    def node(self, kind: Any, detail: Any) -> Part:
        if kind is op.LITERAL:
            return self.place(1 << detail if detail < BYTES else 0)
        if kind is op.NOT_LITERAL:
            return self.place(ANY & ~(1 << detail if detail < BYTES else 0))
        if kind is op.ANY:
            return self.place(ANY & ~(1 << 10))
        if kind is op.IN:
            return self.place(_members(detail))
        if kind is op.BRANCH:
            parts = [self.sequence(branch) for branch in detail[1]]
            return (
                any(part[0] for part in parts),
                frozenset().union(*(part[1] for part in parts)),
                frozenset().union(*(part[2] for part in parts)),
            )
        if kind is op.SUBPATTERN:
            _, added, removed, inner = detail
            if added or removed:
                raise NotRegular
            return self.sequence(inner)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self.repeat(*detail)
        raise NotRegular

    def repeat(self, least: int, most: Any, inner: Sequence[Any]) -> Part:
        if least > PLACES_MAX or (most is not op.MAXREPEAT and most > PLACES_MAX):
            raise TooLarge
        part = _EMPTY
        for _ in range(least):
            part = self.join(part, self.sequence(inner))
        if most is op.MAXREPEAT:
            _, first, last = self.sequence(inner)
            self.follow(last, first)
            return self.join(part, (True, first, last))
        for _ in range(int(most) - least):
            _, first, last = self.sequence(inner)
            part = self.join(part, (True, first, last))
        return part


def _members(detail: Sequence[Any]) -> int:
    out, negate = 0, False
    for kind, value in detail:
        if kind is op.NEGATE:
            negate = True
        elif kind is op.LITERAL:
            out |= 1 << value if value < BYTES else 0
        elif kind is op.RANGE:
            out |= mask(range(value[0], min(value[1], BYTES - 1) + 1))
        elif kind is op.CATEGORY:
            out |= _category(value)
        else:
            raise NotRegular
    return ANY & ~out if negate else out


_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d",
    op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w",
    op.CATEGORY_NOT_WORD: r"\W",
}


def _category(kind: Any) -> int:
    letters = re.compile(_CATEGORIES[kind])
    return mask(byte for byte in range(BYTES) if letters.fullmatch(chr(byte)))
