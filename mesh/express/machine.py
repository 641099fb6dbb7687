"""What the kernel's loop does with a table, step for step (it takes eight at once, or a whole head, where that makes no
difference)."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.express.dfa import ACT, DONE, FIRST, LOOP, Kind, Table

WINDOW_BYTES = 1024  # of a head; what the grammar promises (see `mesh.express.request`) holds for no larger one
HEAD_METHOD = 0x8000  # in a RULE's value: the method is HEAD, so that the response has no body


@dataclass(frozen=True, slots=True)
class Run:
    """An accepted head. ``end``: its length in bytes; ``once``: the bits of fields met; ``length``: Content-Length, 0
    without one; ``head``: the method is HEAD."""

    end: int
    rule: int
    seen: int
    once: int
    length: int
    status: int
    head: bool


def run(table: Table, data: bytes, window: int = WINDOW_BYTES) -> Run | None:
    """Steps ``table`` over the start of ``data``; None: user space decides. ``window``: bytes looked at, at most 1024."""
    rows, state = table.rows, table.root
    rule = seen = once = length = status = 0
    for place, byte in enumerate(data[: min(window, WINDOW_BYTES)]):
        row = rows[state - FIRST]
        edge = row.next[byte]
        if edge & ACT:
            if row.kind is Kind.RULE:
                rule = row.value
            elif row.kind is Kind.ONCE:
                if once & row.value:
                    return None
                once |= row.value
            elif row.kind is Kind.DIGIT:
                length = length * 10 + byte - 48
            elif row.kind is Kind.MATCH:
                seen |= row.value
            elif row.kind is Kind.STATUS:
                status = status * 10 + byte - 48
        state = edge & ~(ACT | LOOP)
        if state <= DONE:
            if state != DONE:
                return None
            return Run(place + 1, rule & ~HEAD_METHOD, seen, once, length, status, bool(rule & HEAD_METHOD))
    return None
