from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.http1.body import SIZE_LINE_BYTES_MAX, TRAILER_BYTES_MAX, BodyError, Chunked


def feed(pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    """What is understood, what is left over, done."""
    chunked, out, held = Chunked(), b"", b""
    for piece in pieces:
        held += piece
        at = chunked.feed(held)
        out, held = out + held[:at], held[at:]
    return out, held, chunked.done


BODY = b'5\r\nhello\r\nA;x;y=1;z="q q"\r\n0123456789\r\n000\r\nX-Sum: 1\r\nY:\r\n\r\n'


@given(st.lists(st.integers(1, len(BODY) + 4), max_size=20))
def test_any_split_is_understood_alike(cuts: list[int]) -> None:
    data = BODY + b"next"
    places = [0, *sorted(set(cuts)), len(data)]
    assert feed([data[a:b] for a, b in pairwise(places)]) == (BODY, b"next", True)


@pytest.mark.parametrize(
    "bad",
    [
        b"\r\n", b"g\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b" 1\r\n", b"1 \r\n", b"1\n", b"1\r\nab", b"1\r\na\n", b"1\r\na\rx",
        b"1;\r\n", b"1;a b\r\n", b'1;a="\r\n', b"1234567890abcdef\r\n", b"1;a\x00\r\n",
        b"0\r\nA\r\n", b"0\r\n folded\r\n", b"0\r\nContent-Length: 3\r\n", b"0\r\nTransfer-Encoding: chunked\r\n", b"0\r\nA: b\n",
    ],
)  # fmt: skip
def test_refused(bad: bytes) -> None:
    with pytest.raises(BodyError):
        feed([bad])
    with pytest.raises(BodyError):
        feed([bytes([byte]) for byte in bad])


def test_lines_and_trailers_are_bounded() -> None:
    with pytest.raises(BodyError):
        feed([b"1" + b";a" * SIZE_LINE_BYTES_MAX])
    with pytest.raises(BodyError):
        feed([b"0\r\n"] + [b"A: " + b"b" * 100 + b"\r\n"] * (TRAILER_BYTES_MAX // 100))
