"""Numbers out of the kernel as Prometheus text: the per-CPU counters of every verdict and drop reason, and how full
each map is. Label values come from the enum in bpf/types.h, never from traffic."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nodeagent.maps import BpfMap, MapType

POSSIBLE_CPUS = Path("/sys/devices/system/cpu/possible")


def parse_cpus(text: str) -> int:
    """How many CPUs a kernel list (``0-3,8``) names."""
    total = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def possible_cpus() -> int:
    """As many values as a per-CPU map returns."""
    return parse_cpus(POSSIBLE_CPUS.read_text())


def read(counters: BpfMap, reasons: Sequence[str], cpus: int) -> dict[str, int]:
    """Reason -> total over CPUs since the map was made."""
    totals: dict[str, int] = {}
    for index, reason in enumerate(reasons):
        values = counters.get_percpu(struct.pack("=I", index), cpus)
        totals[reason] = sum(struct.unpack(f"={cpus}Q", values)) if values else 0
    return totals


def occupancy(maps: Iterable[BpfMap]) -> dict[str, tuple[int, int]]:
    """Map -> (entries, entries at most), of the maps that can fill up."""
    return {
        bpf_map.name: (bpf_map.count(), bpf_map.entries_max)
        for bpf_map in maps
        if bpf_map.type in (MapType.HASH, MapType.LPM_TRIE)
    }


def family(name: str, kind: str, help_text: str, samples: Mapping[tuple[tuple[str, str], ...], int]) -> str:
    """One metric family: samples are label pairs -> value."""
    lines = [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
    for labels, value in samples.items():
        inside = ",".join(f'{key}="{text}"' for key, text in labels)
        lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
    return "\n".join(lines) + "\n"


def text(counts: Mapping[str, int], full: Mapping[str, tuple[int, int]], own: Mapping[str, int]) -> str:
    """The exposition. ``own``: the agent's counts about its work on the maps, by name without prefix."""
    parts = [
        family(
            "pillion_datapath_total",
            "counter",
            "Verdicts and drops of the kernel programs.",
            {(("reason", reason),): count for reason, count in counts.items()},
        ),
        family(
            "pillion_map_entries",
            "gauge",
            "Entries in a kernel map.",
            {(("map", name),): used for name, (used, _) in full.items()},
        ),
        family(
            "pillion_map_entries_max",
            "gauge",
            "Entries a kernel map can hold.",
            {(("map", name),): top for name, (_, top) in full.items()},
        ),
    ]
    parts += [
        family(f"pillion_datapath_{name}", "counter", "Agent's work on the kernel maps.", {(): count})
        for name, count in own.items()
    ]
    return "".join(parts)
