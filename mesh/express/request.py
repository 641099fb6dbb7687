"""The table of request heads of one destination: strict HTTP/1.1, and what rules read of it.

Whatever it accepts, l7proxy, httptools and h11 read the same: method, path, Host and length. Left to user space, by having
no edge: other methods and versions, targets other than a canonical path with an optional query, framing other than one plain
Content-Length, everything that changes the connection, folded lines, a Host with a final dot, values of headers that rules
read with blanks after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from mesh.express.automata import Grammar, Walk
from mesh.express.dfa import PUNT, Builder, Kind, Table
from mesh.express.grammar import FIRST_HEADER, HOST, LENGTH, OWS, TEXT, Lines
from mesh.express.machine import HEAD_METHOD

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
LENGTH_DIGITS_MAX = 6
TABLES_KEPT_MAX = 16  # up to 4 MB each
HEADERS_MAX = 6  # that rules read: their lines may be shorter than others, so there must not be many
PUNTED = frozenset(
    ("transfer-encoding", "upgrade", "expect", "trailer", "te", "http2-settings", "proxy-connection")
)  # a head with one of these is never accepted
OWN = frozenset(("host", "content-length", "connection"))  # that the grammar reads itself

_SEGMENT = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_~!$&'()*+,=:@"
_LABEL = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_~-"
_QUERY = bytes(byte for byte in range(0x21, 0x7F) if byte != 0x23)


def _over(over: bytes, to: int, *, lower: bool = False) -> dict[int, tuple[int, int | None]]:
    return {byte: (to, chr(byte).lower().encode("latin-1")[0] if lower else byte) for byte in over}


_START, _SLASH, _INSIDE = 0, 1, 2
# No empty element and none that starts with "."
PATH: Grammar = (
    _over(b"/", _SLASH),
    _over(_SEGMENT, _INSIDE),
    {**_over(_SEGMENT + b".", _INSIDE), **_over(b"/", _SLASH)},
)
PATH_ENDS = frozenset((_SLASH, _INSIDE))

_NAME, _DOT, _OPEN, _INNER, _CLOSED = 1, 2, 3, 4, 5
_ADDRESS = b"0123456789abcdefABCDEF:."
HOST_NAME: Grammar = (
    {**_over(_LABEL, _NAME, lower=True), **_over(b"[", _OPEN)},
    {**_over(_LABEL, _NAME, lower=True), **_over(b".", _DOT)},
    _over(_LABEL, _NAME, lower=True),
    _over(_ADDRESS, _INNER, lower=True),
    {**_over(_ADDRESS, _INNER, lower=True), **_over(b"]", _CLOSED)},
    {},
)
HOST_ENDS = frozenset((_NAME, _CLOSED))

_BLANK = 2
VALUE: Grammar = (
    {**_over(TEXT, 1), **dict.fromkeys(OWS, (0, None))},
    {**_over(TEXT, 1), **_over(OWS, _BLANK)},
    {**_over(TEXT, 1), **_over(OWS, _BLANK)},
)
VALUE_ENDS = frozenset((0, 1))


@dataclass(frozen=True, slots=True)
class Part:
    """A text of the head that rules read. ``values``: what matches, and what to add to `seen` for it (of the path: the rule);
    what is not there is left to user space."""

    walk: Walk
    values: tuple[tuple[int, int], ...]

    @property
    def bits(self) -> dict[int, int]:
        return dict(self.values)


@lru_cache(TABLES_KEPT_MAX)
def table(
    methods: tuple[tuple[str, int], ...], path: Part, host: Part, headers: tuple[tuple[str, Part], ...], underscores: bool
) -> Table:
    """The table of `build`; destinations whose rules ask for the same have the same. Raises TooLarge."""
    builder, root, tail = build(dict(methods), path, host, dict(headers), underscores=underscores)
    return builder.table(root, tail)


def build(
    methods: Mapping[str, int], path: Part, host: Part, headers: Mapping[str, Part], *, underscores: bool
) -> tuple[Builder, int, int]:
    """The states, not minimised, the root, and where the part begins that comes after the target. ``methods``: the bits of
    those to take. Raises TooLarge."""
    builder = Builder()
    lines = Lines(builder, underscores=underscores)
    for name in sorted(PUNTED):
        lines.field(name.encode(), PUNT)
    lines.field(b"connection", lines.keep_alive())
    lines.field(b"content-length", lines.length(LENGTH_DIGITS_MAX), Kind.ONCE, LENGTH)
    lines.field(b"host", _host(builder, lines.cr, host), Kind.ONCE, HOST)
    for number, (name, part) in enumerate(headers.items()):
        lines.field(name.encode(), _value(builder, lines.cr, part), Kind.ONCE, FIRST_HEADER << number)
    version = builder.state()
    builder.chain(version, b"HTTP/1.1\r\n", lines.line)
    query = builder.state()
    builder.edge(query, _QUERY, query)
    builder.edge(query, b" ", version)
    root = builder.state()
    targets = {
        flag: _path(builder, path, flag, query, version)
        for flag in {HEAD_METHOD if method == "HEAD" else 0 for method in methods}
    }
    for method, bits in methods.items():
        _method(builder, root, method.encode(), bits, targets[HEAD_METHOD if method == "HEAD" else 0])
    return builder, root, version


def _method(builder: Builder, at: int, method: bytes, bits: int, to: int) -> None:
    for byte in method:
        after = builder.edges[at][byte] or builder.state()
        builder.edge(at, (byte,), after)
        at = after
    if bits:
        builder.action(at, Kind.MATCH, bits)
    builder.edge(at, b" ", to, act=bool(bits))


def _states(builder: Builder, walk: Walk) -> list[int]:
    states = [builder.state() for _ in walk.spots]
    for at, spot in zip(states, walk.spots, strict=True):
        for over, after in zip(walk.classes, spot.next, strict=True):
            if after >= 0:
                builder.edge(at, over, states[after])
    return states


def _path(builder: Builder, part: Part, flag: int, query: int, version: int) -> int:
    states, rules = _states(builder, part.walk), part.bits
    for at, spot in zip(states, part.walk.spots, strict=True):
        if spot.grammar in PATH_ENDS and spot.matched in rules:
            builder.action(at, Kind.RULE, rules[spot.matched] | flag)
            builder.edge(at, b"?", query, act=True)
            builder.edge(at, b" ", version, act=True)
    return states[0]


def _host(builder: Builder, cr: int, part: Part) -> int:
    states, values = _states(builder, part.walk), part.bits
    ports: dict[int, int] = {}
    for at, spot in zip(states, part.walk.spots, strict=True):
        bits = values.get(spot.matched)
        if spot.grammar in HOST_ENDS and bits is not None:
            builder.action(at, Kind.MATCH, bits)
            builder.edge(at, b"\r", cr, act=True)
            if bits not in ports:
                ports[bits] = _port(builder, cr, bits)
            builder.edge(at, b":", ports[bits])
    builder.edge(states[0], OWS, states[0])
    return states[0]


def _port(builder: Builder, cr: int, bits: int) -> int:
    states = [builder.state(kind=Kind.MATCH, value=bits) for _ in range(6)]
    for at, after in pairwise(states):
        builder.edge(at, b"0123456789", after)
        builder.edge(after, b"\r", cr, act=True)
    return states[0]


def _value(builder: Builder, cr: int, part: Part) -> int:
    states, values = _states(builder, part.walk), part.bits
    for at, spot in zip(states, part.walk.spots, strict=True):
        bits = values.get(spot.matched)
        if spot.grammar in VALUE_ENDS and bits is not None:
            if bits:
                builder.action(at, Kind.MATCH, bits)
            builder.edge(at, b"\r", cr, act=bool(bits))
    return states[0]
