"""The smallest part of a case that still shows the same finding."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS_MAX = 3.0


def minimise(case: bytes, fails: Callable[[bytes], bool], seconds: float = SECONDS_MAX) -> bytes:
    """Leave out ever smaller pieces while ``fails`` stays true, then make what is left plainer."""
    deadline = time.monotonic() + seconds
    size = max(1, len(case) // 2)
    while size:
        at, shrunk = 0, False
        while at < len(case):
            if time.monotonic() > deadline:
                return case
            shorter = case[:at] + case[at + size :]
            if fails(shorter):
                case, shrunk = shorter, True
            else:
                at += size
        if not shrunk or size > 1:
            size //= 2
    for at, byte in enumerate(case):
        if time.monotonic() > deadline:
            break
        for plain in b"a0":
            if byte == plain or byte in b"\r\n":
                break
            plainer = case[:at] + bytes([plain]) + case[at + 1 :]
            if fails(plainer):
                case = plainer
                break
    return case
