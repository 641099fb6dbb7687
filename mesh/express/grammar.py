"""Header lines, as requests and responses share them: strict as l7proxy's, and stricter where that costs nobody much.

Lines shorter than `LINE_BYTES_MIN` are left to user space: so a head within the window can not have more fields than
l7proxy takes (128), and nothing has to be counted.
"""

from __future__ import annotations

from mesh.express.dfa import DONE, PUNT, Builder, Kind

HOST, LENGTH = 1, 2  # bits of `once`
FIRST_HEADER = 4  # the bit of the first header that rules read; the next has twice that
LINE_BYTES_MIN = 8  # with its CR LF
OWS = b"\t "
TCHAR = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEXT = bytes((*range(0x21, 0x7F), *range(0x80, 0x100)))  # of a value, besides OWS
_COUNTED = LINE_BYTES_MIN - 2
_CR, _LF, _COLON = b"\r", b"\n", b":"


class Lines:
    """The part of a table that reads header lines up to the empty one. ``line``: at the start of a line; ``cr``: after
    the CR of a field's line. ``underscores``: take names with "_"."""

    def __init__(self, builder: Builder, *, underscores: bool = True) -> None:
        self.builder = builder
        self.line, self.cr, end = builder.state(), builder.state(), builder.state()
        builder.edge(self.line, _CR, end)
        builder.edge(end, _LF, DONE)
        builder.edge(self.cr, _LF, self.line)
        letters = TCHAR if underscores else TCHAR.replace(b"_", b"")
        # How much of the line was read, up to what matters
        self._names = [self.line, *(builder.state() for _ in range(_COUNTED))]
        values = [builder.state() for _ in range(_COUNTED + 1)]
        for read in range(_COUNTED + 1):
            after = min(read + 1, _COUNTED)
            builder.edge(self._names[read], letters, self._names[after])
            builder.edge(values[read], TEXT + OWS, values[after])
            if read:
                builder.edge(self._names[read], _COLON, values[after])
        builder.edge(values[_COUNTED], _CR, self.cr)

    def field(self, name: bytes, to: int, kind: Kind = Kind.NONE, value: int = 0) -> None:
        """Fields of this name, in either case, have their value read from ``to`` on; PUNT: are left to user space."""
        builder, at = self.builder, self.line
        for place, byte in enumerate(name.lower(), 1):
            after = builder.edges[at][byte]
            if after == PUNT or after in self._names:
                after = builder.state(self._names[min(place, _COUNTED)])
                builder.edge(at, (byte, *chr(byte).upper().encode()), after)
            at = after
        builder.action(at, kind, value)
        builder.edge(at, _COLON, to, act=kind is not Kind.NONE)

    def length(self, digits_max: int) -> int:
        """A state that reads Content-Length: no sign, no leading zero, no blank after it."""
        builder = self.builder
        start, zero = builder.state(kind=Kind.DIGIT), builder.state()
        builder.edge(start, OWS, start)
        builder.edge(start, b"0", zero, act=True)
        builder.edge(zero, _CR, self.cr)
        at = start
        for place in range(digits_max):
            after = builder.state(kind=Kind.DIGIT)
            builder.edge(at, b"0123456789" if place else b"123456789", after, act=True)
            builder.edge(after, _CR, self.cr)
            at = after
        return start

    def keep_alive(self) -> int:
        """A state that reads the one value of Connection that changes nothing."""
        start, last = self.builder.state(), self.builder.state()
        self.builder.edge(start, OWS, start)
        self.builder.chain(start, b"keep-alive", last, fold=True)
        self.builder.edge(last, _CR, self.cr)
        return start
