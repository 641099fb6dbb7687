"""What the kernel counted of requests it carried: the map's entries, and the totals of programs that carry nothing any more,
which are kept here so that the map has room for others."""

from __future__ import annotations

import struct
import threading
from typing import NamedTuple

from nodeagent.layouts import Layouts
from nodeagent.maps import BpfMap

KEPT_MAX = 8192  # as xstats has: what is over that stays in there

Name = tuple[int, int, int]  # program, name, status


class Stat(NamedTuple):
    """Totals over CPUs. bytes_in: of requests, bytes_out: of responses, heads and bodies; ns: their sum."""

    requests: int
    bytes_in: int
    bytes_out: int
    ns: int
    buckets: tuple[int, ...]


class Stats:
    """``entries``: xstats. Any thread may call."""

    def __init__(self, entries: BpfMap, layouts: Layouts, cpus: int) -> None:
        self._entries, self._cpus = entries, cpus
        self._key = layouts["pl_xstat_key"]
        self._numbers = struct.Struct(f"={layouts['pl_xstat'].size // 8}Q")
        self._kept: dict[Name, Stat] = {}
        self._lock = threading.Lock()

    def read(self) -> dict[Name, Stat]:
        """Totals, of those put aside too."""
        with self._lock:
            found = dict(self._kept)
            for key in self._entries:
                self._add(found, key)
        return found

    def put_aside(self, programs: set[int]) -> None:
        """Empty their entries. Nothing may count there meanwhile: what is counted in between would be lost."""
        with self._lock:
            for key in list(self._entries):
                name = self._name(key)
                if name[0] in programs and (name in self._kept or len(self._kept) < KEPT_MAX):
                    self._add(self._kept, key)
                    self._entries.delete(key)

    def clear(self) -> None:
        """A former agent's."""
        for key in list(self._entries):
            self._entries.delete(key)

    def _name(self, key: bytes) -> Name:
        fields = self._key.unpack(key)
        return fields["program"], fields["name"], fields["status"]

    def _add(self, to: dict[Name, Stat], key: bytes) -> None:
        raw = self._entries.get_percpu(key, self._cpus)
        if raw is None:
            return
        name = self._name(key)
        sums = [sum(column) for column in zip(*self._numbers.iter_unpack(raw), strict=True)]
        if (known := to.get(name)) is not None:
            sums = [a + b for a, b in zip(sums, (*known[:4], *known.buckets), strict=True)]
        to[name] = Stat(sums[0], sums[1], sums[2], sums[3], tuple(sums[4:]))


def bucket_floor_ns(index: int) -> int:
    """The shortest duration counted in this bucket of a Stat (bpf/express_map.h, bucket_of)."""
    if index < 8:
        return index << 7
    power, part = index // 8 + 2, index % 8
    return (8 + part) << (power - 3) << 7
