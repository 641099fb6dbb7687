"""What every counter of requests shares, so that proxy and kernel add up."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.identity import IdentityError, SpiffeId

BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # of durations
UNKNOWN = "unknown"


def identity_label(spiffe: str | None) -> str:
    """``namespace/account`` of a known identity."""
    try:
        return SpiffeId.parse(spiffe).short if spiffe else UNKNOWN
    except IdentityError:
        return UNKNOWN


def cumulated(counts: Sequence[int]) -> list[tuple[str, int]]:
    """A Prometheus histogram's buckets, (bound, how many up to it), of how many fell between the `BOUNDS_S` and past the last."""
    running, buckets = 0, []
    for bound, count in zip((*map(repr, BOUNDS_S), "+Inf"), counts, strict=True):
        running += count
        buckets.append((bound, running))
    return buckets
