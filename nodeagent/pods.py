"""Workloads with a network namespace and a veth of their own: what they send is filtered on the veth's host side (`tc`). An
optional part: where this kernel does not take the filter there are no such workloads, until a later try."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pyroute2.netlink.exceptions import NetlinkError

from nodeagent.datapath_api import DatapathError
from nodeagent.tc import VethGuard

RETRY_S = 60.0  # a try compiles
WHY_CHARS_MAX = 400
NOT_LOADED = "the programs are not loaded"


class Pods:
    """``whose``: the netns that has these addresses, by cookie, 0 for none yet. Under the data path's lock, but for ``why``."""

    def __init__(self, bpf_dir: Path, run_dir: Path, whose: Callable[[Sequence[str]], int]) -> None:
        self._bpf_dir, self._run_dir, self._whose = bpf_dir, run_dir, whose
        self._filter: VethGuard | None = None
        self._permissive = 0
        self._tried_at = 0.0
        self._rules: dict[str, tuple[tuple[str, ...], bool]] = {}  # by veth: addresses, permissive
        self.why = ""  # it is off

    @property
    def on(self) -> bool:
        return self._filter is not None

    def load(self, permissive: int) -> None:
        """Never raises. ``permissive``: the flag of the same name, PL_MEMBER_PERMISSIVE."""
        self.close()
        self._permissive, self._tried_at = permissive, time.monotonic()
        try:
            self._filter = VethGuard(self._bpf_dir, self._run_dir)
            self._filter.sweep()
            self.why = ""
        except (DatapathError, NetlinkError, OSError) as error:
            self.close()
            self.why = str(error)[-WHY_CHARS_MAX:] or type(error).__name__

    def close(self) -> None:
        """The programs stay attached."""
        if self._filter is not None:
            self._filter.close()
            self._filter = None

    def guard(self, veth: str, addresses: Sequence[str], permissive: bool) -> None:
        """Raises DatapathError."""
        self._rules[veth] = (tuple(addresses), permissive)
        self._guard(veth)

    def unguard(self, veth: str) -> None:
        self._rules.pop(veth, None)
        if self._filter is not None:
            self._filter.unguard(veth)

    def set_unguarded(self, addresses: Sequence[str]) -> None:
        """See `VethGuard`; where it is off there is no filter to let anything through. Raises DatapathError."""
        if self._filter is not None:
            self._filter.set_unguarded(addresses)
        elif not self.why:
            raise DatapathError(NOT_LOADED)

    def opened(self, addresses: Sequence[str]) -> None:
        """There are listeners on these addresses now, so it is known whose they are. Raises DatapathError."""
        for veth, (guarded, _) in self._rules.items():
            if set(guarded) <= set(addresses):
                self._guard(veth)

    def mend(self) -> int:
        """Tries again what is off, puts back filters that were lost; how many. Raises DatapathError."""
        if self.why and time.monotonic() - self._tried_at > RETRY_S:
            self.load(self._permissive)
        bare = self._filter.bare(self._rules) if self._filter is not None else []
        for veth in bare:
            self._guard(veth)
        return len(bare)

    def _guard(self, veth: str) -> None:
        if self._filter is None:
            raise DatapathError(self.why or NOT_LOADED)
        addresses, permissive = self._rules[veth]
        self._filter.guard(veth, addresses, self._whose(addresses), self._permissive if permissive else 0)
