"""What the kernel counted, as metrics and as a table: under the same names as what the proxy counts, so that totals are the
same whichever path carried a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from mesh.metrics import BOUNDS_S, cumulated, identity_label
from nodeagent.express_path import Stat, bucket_floor_ns
from nodeagent.express_programs import Program

Stats = Mapping[tuple[int, int, int], Stat]
PATH_KIND = "express"


def _bound(bucket: int) -> int:
    """The place of a kernel's bucket among BOUNDS_S, by its middle."""
    middle = (bucket_floor_ns(bucket) + bucket_floor_ns(bucket + 1)) / 2e9
    return next((place for place, bound in enumerate(BOUNDS_S) if middle <= bound), len(BOUNDS_S))


def quantile_us(buckets: Sequence[int], share: float) -> float:
    """Of a Stat's buckets, good to 10 %; 0 of none."""
    left = sum(buckets) * share
    for bucket, count in enumerate(buckets):
        left -= count
        if count and left <= 0:
            return (bucket_floor_ns(bucket) + bucket_floor_ns(bucket + 1)) / 2000
    return 0.0


def label_of(destination: str) -> str:
    """For people, of a program's destination: a service, or a workload that is dialled by its own address."""
    kind, _, name = destination.partition("/")
    return name if kind == "Service" else f"{name} (by address)"


def _labelled(programs: Sequence[Program], stats: Stats) -> list[tuple[Program, str, str, int, Stat]]:
    """(program, rule, destination's label, status, stat) of what is still known."""
    by_index = {program.index: program for program in programs}
    out = []
    for (index, name, status), stat in stats.items():
        program = by_index.get(index)
        if program is not None and name < len(program.names):
            rule, spiffe = program.names[name]
            out.append((program, rule, identity_label(spiffe), status, stat))
    return out


class _Families(Collector):  # type: ignore[misc]  # prometheus_client is not followed
    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> list[Any]:
        return self._families


def metrics_text(
    programs: Sequence[Program],
    stats: Stats,
    counters: Mapping[str, int],
    asked: Mapping[str, int],
    pairs: int,
    on: bool,
    probes: Mapping[str, str],
) -> str:
    """Prometheus exposition."""
    requests = CounterMetricFamily("pillion_requests", "HTTP exchanges", labels=["source", "destination", "code", "path_kind"])
    seconds = HistogramMetricFamily(
        "pillion_request_seconds", "From the request's head to the response's end", labels=["source", "destination"]
    )
    moved = CounterMetricFamily(
        "pillion_express_bytes",
        "Of requests (in) and responses (out) that the kernel carried",
        labels=["source", "destination", "direction"],
    )
    codes: dict[tuple[str, str, int], int] = {}
    sums: dict[tuple[str, str], tuple[list[int], float, int, int]] = {}
    places = [_bound(bucket) for bucket in range(len(next(iter(stats.values())).buckets))] if stats else []
    for program, _, destination, status, stat in _labelled(programs, stats):
        source = identity_label(program.source)
        codes[source, destination, status] = codes.get((source, destination, status), 0) + stat.requests
        row, total, up, down = sums.get((source, destination), ([0] * (len(BOUNDS_S) + 1), 0.0, 0, 0))
        for place, count in zip(places, stat.buckets, strict=True):
            row[place] += count
        sums[source, destination] = row, total + stat.ns / 1e9, up + stat.bytes_in, down + stat.bytes_out
    for (source, destination, status), count in codes.items():
        requests.add_metric([source, destination, str(status), PATH_KIND], count)
    for (source, destination), (row, total, up, down) in sums.items():
        seconds.add_metric([source, destination], buckets=cumulated(row), sum_value=total)
        moved.add_metric([source, destination, "in"], up)
        moved.add_metric([source, destination, "out"], down)
    events = CounterMetricFamily("pillion_express", "Requests carried, and why others went to user space", labels=["event"])
    for name, count in counters.items():
        events.add_metric([name], count)
    questions = CounterMetricFamily(
        "pillion_express_pairings", "What workers asked for, and what became of it", labels=["result"]
    )
    for name, count in asked.items():
        questions.add_metric([name], count)
    probe = GaugeMetricFamily("pillion_express_probe", "1: this kernel does what express needs", labels=["probe"])
    for name, text in probes.items():
        probe.add_metric([name], float(text == "ok"))
    registry = CollectorRegistry()
    gauges = [
        GaugeMetricFamily("pillion_express_on", "1: the kernel may carry requests on this node", value=float(on)),
        GaugeMetricFamily("pillion_express_records", "Client connections that are paired", value=float(pairs)),
    ]
    registry.register(_Families([requests, seconds, moved, events, questions, probe, *gauges]))
    return str(generate_latest(registry), "utf-8")


def top(programs: Sequence[Program], stats: Stats) -> list[dict[str, Any]]:
    """By source, service and rule; the busiest first."""
    rows: dict[tuple[str, str, str], tuple[int, list[int]]] = {}
    for program, rule, _, _, stat in _labelled(programs, stats):
        key = identity_label(program.source), label_of(program.key.service), rule
        count, buckets = rows.get(key, (0, [0] * len(stat.buckets)))
        rows[key] = count + stat.requests, [a + b for a, b in zip(buckets, stat.buckets, strict=True)]
    return [
        {
            "source": source,
            "service": service,
            "rule": rule,
            "kernel": count,
            "p50_us": round(quantile_us(buckets, 0.5), 1),
            "p99_us": round(quantile_us(buckets, 0.99), 1),
        }
        for (source, service, rule), (count, buckets) in sorted(rows.items(), key=lambda item: -item[1][0])
    ]


def described(program: Program) -> dict[str, Any]:
    """For `pillion express status`."""
    key = program.key
    return {
        "service": label_of(key.service),
        "port": key.port,
        "source": program.source,
        "address": key.address,
        "states": program.states,
        "reason": program.reason,
    }
