"""Who asks, whom we dial for it, and why a dial failed."""

from __future__ import annotations

import msgspec

from mesh.model import Workload


class Caller(msgspec.Struct, frozen=True, gc=False):
    """The application whose bytes these are. ``workload``: its item key when it runs on this node."""

    spiffe: str | None
    identity: int
    address: str  # canonical text
    port: int
    workload: str | None = None


class Target(msgspec.Struct, frozen=True, gc=False):
    """One dial. ``source_netns``: cookie of the caller's netns, 0 at the destination; ``opaque``: a TLS connection of its own."""

    workload: Workload
    address: str
    port: int
    caller: Caller
    source_netns: int
    opaque: bool


class DialError(Exception):
    """``reason``: a key of `errors.REASONS`; ``elsewhere``: another endpoint may be tried."""

    def __init__(self, reason: str, detail: str = "", status: int = 503, elsewhere: bool = True) -> None:
        super().__init__(detail or reason)
        self.reason, self.detail, self.status, self.elsewhere = reason, detail, status, elsewhere
