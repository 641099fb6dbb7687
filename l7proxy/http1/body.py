"""Chunked bodies, validated as they pass. Size lines and trailers are consumed whole, data as it comes, so what is
forwarded was always understood first."""

from __future__ import annotations

import re

from l7proxy.http1.head import TCHAR

SIZE_LINE_BYTES_MAX = 256
TRAILER_BYTES_MAX = 8192

_TOKEN = rb"[" + TCHAR + rb"]++"
_QUOTED = rb'"[\t\x20-\x21\x23-\x5b\x5d-\x7e]*+"'
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;" + _TOKEN + rb"(?:=(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?)*+")
_TRAILER = re.compile(_TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+")
_FORBIDDEN = frozenset(
    (b"content-length", b"transfer-encoding", b"host", b"connection", b"trailer", b"upgrade", b"authorization")
)

_SIZE_LINE, _DATA, _DATA_END, _TRAILERS, _DONE = range(5)


class BodyError(Exception):
    """The sender's chunked coding is broken; nothing after it can be trusted."""


class Chunked:
    """Where a chunked body ends. ``feed`` says how far the bytes given are understood."""

    __slots__ = ("left", "state", "trailer_bytes")

    def __init__(self) -> None:
        self.state = _SIZE_LINE
        self.left = 0
        self.trailer_bytes = 0

    @property
    def done(self) -> bool:
        return self.state == _DONE

    def feed(self, data: bytes, at: int = 0) -> int:
        """The index up to which ``data`` is understood and may be forwarded; what is beyond comes again with
        more bytes, or belongs to the next message once `done`. Raises BodyError."""
        size = len(data)
        while at < size:
            state = self.state
            if state == _DATA:
                take = min(self.left, size - at)
                at += take
                self.left -= take
                if self.left:
                    return at
                self.state = _DATA_END
            elif state == _DATA_END:
                if data[at] != 13 or (size - at > 1 and data[at + 1] != 10):
                    raise BodyError("chunk data is not followed by CRLF")
                if size - at < 2:
                    return at
                at += 2
                self.state = _SIZE_LINE
            elif state == _DONE:
                return at
            else:
                limit = SIZE_LINE_BYTES_MAX if state == _SIZE_LINE else TRAILER_BYTES_MAX - self.trailer_bytes
                newline = data.find(b"\n", at, at + limit)
                if newline < 0:
                    if size - at >= limit:
                        raise BodyError("chunk size line or trailers are too long")
                    return at
                if newline == at or data[newline - 1] != 13:
                    raise BodyError("bare LF in chunked coding")
                line, at = data[at : newline - 1], newline + 1
                if state == _SIZE_LINE:
                    self._size(line)
                else:
                    self._trailer(line)
        return at

    def _size(self, line: bytes) -> None:
        match = _SIZE.fullmatch(line)
        if match is None:
            raise BodyError("malformed chunk size")
        self.left = int(match[1], 16)
        self.state = _DATA if self.left else _TRAILERS

    def _trailer(self, line: bytes) -> None:
        if not line:
            self.state = _DONE
            return
        self.trailer_bytes += len(line) + 2
        if not _TRAILER.fullmatch(line):
            raise BodyError("malformed trailer")
        if line.partition(b":")[0].lower() in _FORBIDDEN:
            raise BodyError("a trailer that would change framing or routing")
