"""Mutation of bytes: flips, tokens, cuts, copies and splices, seeded."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

_BYTES = b'\x00\t\n\r !"#%*+,-./09:;<=>?@AZ[\\]^_`az{|}~\x7f\x80\xff'


def mutate(case: bytes, rng: Random, tokens: Sequence[bytes], other: bytes = b"", size_max: int = 65536) -> bytes:
    """One to four changes. ``other``: a second case to splice with."""
    data = bytearray(case)
    for _ in range(1 + int(rng.random() ** 2 * 4)):
        size = len(data)
        at = int(rng.random() * (size + 1))
        kind = int(rng.random() * 8)
        if kind == 0 and size:
            data[at % size] ^= 1 << int(rng.random() * 8)
        elif kind == 1 and size:
            data[at % size] = _BYTES[int(rng.random() * len(_BYTES))]
        elif kind == 2:
            data.insert(at, _BYTES[int(rng.random() * len(_BYTES))])
        elif kind == 3 and tokens:
            data[at:at] = tokens[int(rng.random() * len(tokens))]
        elif kind == 4 and size:
            del data[at : at + 1 + int(rng.random() ** 3 * 32)]
        elif kind == 5 and size:
            piece = data[at : at + 1 + int(rng.random() ** 2 * 48)]
            where = int(rng.random() * (size + 1))
            data[where:where] = piece
        elif kind == 6 and tokens and size:
            token = tokens[int(rng.random() * len(tokens))]
            data[at : at + len(token)] = token
        elif kind == 7 and other:
            data[at:] = other[int(rng.random() * len(other)) :]
    return bytes(data[:size_max])
