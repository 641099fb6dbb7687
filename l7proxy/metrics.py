"""Counters the hot path can afford: plain integers on objects it already holds. They become Prometheus families when scraped."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from l7proxy.errors import REASONS
from mesh.metrics import BOUNDS_S, cumulated

SERIES_MAX = 16384  # past it everything is counted as "other"
OTHER = "other"
_EDGES = (float("-inf"), *BOUNDS_S, float("inf"))


class Series:
    """Requests of one source to one destination over one kind of path."""

    __slots__ = ("_above", "_bucket", "_up_to", "buckets", "codes", "destination", "path_kind", "seconds", "source")

    def __init__(self, source: str, destination: str, path_kind: str) -> None:
        self.source, self.destination, self.path_kind = source, destination, path_kind
        self.codes: dict[int, int] = {}
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        self.seconds = 0.0
        self._bucket, self._above, self._up_to = (
            0,
            _EDGES[0],
            _EDGES[1],
        )  # where the last one fell: the next one does, too, mostly

    def done(self, code: int, seconds: float) -> None:
        """One exchange; code 0: cut off before a response."""
        codes = self.codes
        codes[code] = codes.get(code, 0) + 1
        if not self._above < seconds <= self._up_to:
            self._bucket = bucket = bisect_left(BOUNDS_S, seconds)
            self._above, self._up_to = _EDGES[bucket], _EDGES[bucket + 1]
        self.buckets[self._bucket] += 1
        self.seconds += seconds


class TcpSeries:
    """Opaque connections of one source to one destination."""

    __slots__ = ("closed", "destination", "opened", "received", "sent", "source")

    def __init__(self, source: str, destination: str) -> None:
        self.source, self.destination = source, destination
        self.opened = self.closed = self.sent = self.received = 0


class Metrics(Collector):  # type: ignore[misc]  # prometheus_client is not followed
    """A worker's counters; a prometheus_client collector."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.events: Counter[str] = Counter()
        self.denials: Counter[str] = Counter()
        self.gauges: list[tuple[str, str, Callable[[], float]]] = []
        self._http: dict[tuple[str, str, str], Series] = {}
        self._tcp: dict[tuple[str, str], TcpSeries] = {}

    def http(self, source: str, destination: str, path_kind: str) -> Series:
        """The series to count on; look it up once and keep it."""
        key = (source, destination, path_kind)
        found = self._http.get(key)
        if found is None:
            if len(self._http) >= SERIES_MAX:
                key = (OTHER, OTHER, path_kind)
            found = self._http.setdefault(key, Series(*key))
        return found

    def tcp(self, source: str, destination: str) -> TcpSeries:
        key = (source, destination)
        found = self._tcp.get(key)
        if found is None:
            if len(self._tcp) >= SERIES_MAX:
                key = (OTHER, OTHER)
            found = self._tcp.setdefault(key, TcpSeries(*key))
        return found

    def denied(self, reason: str) -> None:
        """``reason``: from a closed list, never from a request."""
        self.denials[reason] += 1

    def count(self, name: str, by: int = 1) -> None:
        """An event of the proxy's own, from a closed list."""
        self.events[name] += by

    def gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Read at scrape time."""
        self.gauges.append((name, help_text, value))

    def register(self, collector: Collector) -> None:
        """One more collector in the same answer."""
        self.registry.register(collector)

    def text(self) -> str:
        """Prometheus exposition."""
        return str(generate_latest(self.registry), "utf-8")

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "pillion_requests", "HTTP exchanges", labels=["source", "destination", "code", "path_kind"]
        )
        seconds = HistogramMetricFamily(
            "pillion_request_seconds", "From the request's head to the response's end", labels=["source", "destination"]
        )
        merged: dict[tuple[str, str], tuple[list[int], float]] = {}
        for series in self._http.values():
            for code, count in series.codes.items():
                requests.add_metric([series.source, series.destination, str(code), series.path_kind], count)
            buckets, total = merged.get((series.source, series.destination), ([0] * (len(BOUNDS_S) + 1), 0.0))
            merged[series.source, series.destination] = (
                [a + b for a, b in zip(buckets, series.buckets, strict=True)],
                total + series.seconds,
            )
        for labels, (buckets, total) in merged.items():
            seconds.add_metric(list(labels), buckets=cumulated(buckets), sum_value=total)
        yield requests
        yield seconds
        yield from self._collect_tcp()
        denied = CounterMetricFamily("pillion_denied", "Refusals of user space", labels=["reason"])
        for reason, count in self.denials.items():
            denied.add_metric([reason], count)
        yield denied
        events = CounterMetricFamily("pillion_proxy_events", "What else the proxy met", labels=["event"])
        for name, count in self.events.items():
            events.add_metric([name], count)
        yield events
        for name, help_text, value in self.gauges:
            yield GaugeMetricFamily(name, help_text, value=value())

    def _collect_tcp(self) -> Iterable[Metric]:
        opened = CounterMetricFamily("pillion_tcp_opened", "Opaque connections opened", labels=["source", "destination"])
        closed = CounterMetricFamily("pillion_tcp_closed", "Opaque connections closed", labels=["source", "destination"])
        moved = CounterMetricFamily("pillion_bytes", "Bytes of opaque connections", labels=["source", "destination", "direction"])
        for series in self._tcp.values():
            labels = [series.source, series.destination]
            opened.add_metric(labels, series.opened)
            closed.add_metric(labels, series.closed)
            moved.add_metric([*labels, "sent"], series.sent)
            moved.add_metric([*labels, "received"], series.received)
        yield opened
        yield closed
        yield moved


def known_reason(reason: str) -> str:
    """A reason as a label: from the closed list, whatever came over the wire."""
    return reason if reason in REASONS else OTHER
