"""The bytes an exact server answers with: they tell answers, and places in one, apart."""

import hashlib

PERIOD = 94_000
_BLOCK = bytes(range(33, 127)) * 1000


def body_of(tag: str, size: int) -> bytes:
    """Repeats itself every PERIOD bytes, at most."""
    start = int(hashlib.sha1(tag.encode()).hexdigest()[:4], 16) % 94
    return (_BLOCK * ((size + start) // PERIOD + 1))[start : start + size]
