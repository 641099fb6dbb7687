"""The table of response heads: which of them the kernel may count and bound by Content-Length.

`RESPONSE` accepts HTTP/1.1, a final status, at most one Content-Length of at most 7 digits, no other framing and nothing
that ends or changes the connection. Whether there must be a length is for the kernel, which knows what was asked.
"""

from __future__ import annotations

from mesh.express.dfa import PUNT, Builder, Kind, Table
from mesh.express.grammar import LENGTH, OWS, TEXT, Lines

LENGTH_DIGITS_MAX = 7
_PUNTED = (b"transfer-encoding", b"upgrade", b"proxy-connection")


def _fields(builder: Builder, *, body: bool) -> int:
    lines = Lines(builder)
    for name in _PUNTED:
        lines.field(name, PUNT)
    lines.field(b"connection", lines.keep_alive())
    # l7proxy refuses a 204 that claims a body
    lines.field(b"content-length", lines.length(LENGTH_DIGITS_MAX) if body else PUNT, Kind.ONCE, LENGTH)
    return lines.line


def build() -> Table:
    """The table; the same each time."""
    builder = Builder()
    root = builder.state()
    for body in (True, False):
        after, reason, cr = builder.state(), builder.state(), builder.state()
        builder.edge(after, b" ", reason)
        builder.edge(after, b"\r", cr)
        builder.edge(reason, TEXT + OWS, reason)
        builder.edge(reason, b"\r", cr)
        builder.edge(cr, b"\n", _fields(builder, body=body))
        if body:
            status = _digits(builder, after)
        else:
            builder.edge(_second(builder, _second(builder, status, b"2"), b"0"), b"4", after, act=True)
    builder.chain(root, b"HTTP/1.1 ", status)
    return builder.table(root)


def _digits(builder: Builder, after: int) -> int:
    """200 to 599; 1xx are followed by another head."""
    first, second, third = (builder.state(kind=Kind.STATUS) for _ in range(3))
    builder.edge(first, b"2345", second, act=True)
    builder.edge(second, b"0123456789", third, act=True)
    builder.edge(third, b"0123456789", after, act=True)
    return first


def _second(builder: Builder, at: int, byte: bytes) -> int:
    """A state of its own after this digit."""
    old = builder.edges[at][byte[0]]
    own = builder.state(old & 0x7FFF, Kind.STATUS)
    builder.edge(at, byte, own, act=True)
    return own


RESPONSE = build()
