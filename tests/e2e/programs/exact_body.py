"""The bytes an exact server answers with: they tell answers, and places in one, apart."""

import hashlib

STEP = 8
PERIOD = 96_000
_BLOCK = b"".join(b"%07d\n" % number for number in range(PERIOD // STEP))


def _start(tag: str) -> int:
    return int(hashlib.sha1(tag.encode()).hexdigest()[:8], 16) % PERIOD


def body_of(tag: str, size: int) -> bytes:
    """Repeats itself every PERIOD bytes."""
    start = _start(tag)
    return (_BLOCK * ((size + start) // PERIOD + 1))[start : start + size]


def place_of(tag: str, found: bytes) -> str:
    """Where in the answer these bytes are right: "N" of PERIOD, or "nowhere"."""
    at = (_BLOCK * 2).find(found[: 4 * STEP])
    return "nowhere" if at < 0 else str((at - _start(tag)) % PERIOD)
