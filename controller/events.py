"""What the controller refused and why: a counter for each reason, and a short log in the form of flows.

Anybody may ask to be refused. So of each reason and caller only the first few in a while are kept, with the number of the others;
and where there are too many the caller with most of them loses his oldest. All who have no certificate are one caller.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from controller.sparing import WINDOW_S, Sparing
from mesh.link import Flow

EVENTS_MAX = 1_000
STRANGER = "nobody"

log = structlog.get_logger()


class Refused(Exception):
    """An answer of "no": ``reason`` is a counted enum, the message says who is at fault and what to do."""

    def __init__(
        self, reason: str, message: str, status: int = 403, *, node: str = "", spiffe: str = "", source: str = ""
    ) -> None:
        super().__init__(message)
        self.reason, self.status = reason, status
        self.node, self.spiffe, self.source = node, spiffe, source


def not_granted(node: str, namespace: str, account: str, spiffe: str, source: str) -> Refused:
    """The refusal of an identity that no NodeGrant gives the node."""
    return Refused(
        "identity_not_granted",
        f"node {node} is not granted {namespace}/{account}; an operator adds it to a NodeGrant of that node",
        node=node,
        spiffe=spiffe,
        source=source,
    )


class Event(Flow, frozen=True, tag="flow"):
    """``more``: it stands for so many that were not kept."""

    more: int = 0


class Events:
    """The newest of each caller, in order of time; none has his pushed out by those of one who has more."""

    def __init__(self) -> None:
        self._by_caller: dict[str, deque[Event]] = {}
        self._kept = 0

    def __iter__(self) -> Iterator[Event]:
        return iter(sorted((event for kept in self._by_caller.values() for event in kept), key=lambda event: event.time))

    def __len__(self) -> int:
        return self._kept

    def add(self, caller: str, event: Event) -> None:
        self._by_caller.setdefault(caller, deque()).append(event)
        self._kept += 1
        if self._kept > EVENTS_MAX:
            most = max(self._by_caller, key=lambda name: len(self._by_caller[name]))
            self._by_caller[most].popleft()
            self._kept -= 1
            if not self._by_caller[most]:
                del self._by_caller[most]


class Telemetry:
    """Metrics in a registry of their own (several controllers may live in one test process) and the event log."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.events = Events()
        self.sparing = Sparing(self._sum_up)
        self.refusals = Counter(
            "pillion_controller_refusals_total", "Requests refused, by reason.", ["reason"], registry=self.registry
        )
        self.requests = Counter(
            "pillion_controller_requests_total", "API requests, by route and code.", ["route", "code"], registry=self.registry
        )
        self.signed = Counter(
            "pillion_controller_certificates_total", "Certificates issued, by kind.", ["kind"], registry=self.registry
        )
        self.streams = Gauge("pillion_controller_streams", "Agents with an open stream.", registry=self.registry)
        self.stream_cuts = Counter(
            "pillion_controller_stream_cuts_total", "Streams the controller ended, by reason.", ["reason"], registry=self.registry
        )
        self.turned_away = Counter(
            "pillion_controller_turned_away_total",
            "Connections closed because there was no room for one more, in all or of their source.",
            registry=self.registry,
        )
        self.numbers = Gauge(
            "pillion_controller_numbers_given",
            "Numbers given out since the mesh began, by kind; they never come back.",
            ["kind"],
            registry=self.registry,
        )
        self.revision = Gauge("pillion_controller_revision", "The published revision.", registry=self.registry)
        self.resources = Gauge("pillion_controller_resources", "Resources in the registry.", registry=self.registry)
        self.compile_seconds = Histogram(
            "pillion_controller_compile_seconds",
            "Time to compile the whole state.",
            registry=self.registry,
            buckets=(0.001, 0.01, 0.05, 0.1, 0.5, 1, 5),
        )

    def refused(self, refusal: Refused, revision: int, known: str = "") -> None:
        """Counts one refusal, and logs and keeps it unless there are too many. ``known``: the role and name of a caller who has
        a certificate of ours; no stranger's flood hides what is refused to one."""
        self.refusals.labels(refusal.reason).inc()
        caller = known or STRANGER
        if not self.sparing.passes("refused", refusal.reason, caller):
            return
        event = Event(
            time=time.time(),
            verdict="denied",
            reason=refusal.reason,
            source=refusal.spiffe or "unknown",
            source_address=refusal.source,
            layer="control",
            revision=revision,
            node=refusal.node,
        )
        self.events.add(caller, event)
        log.warning("refused", reason=refusal.reason, detail=str(refusal), node=refusal.node, source=refusal.source)

    def _sum_up(self, kind: tuple[str, ...], more: int) -> None:
        event, reason, caller = kind if len(kind) == 3 else ("refused", "any", "any")
        log.warning(f"{event}, and more of these", reason=reason, caller=caller, more=more, in_s=WINDOW_S)
        if event == "refused":
            role, _, name = caller.partition(" ")
            summary = Event(time.time(), "denied", reason, "unknown", layer="control", node=name * (role == "node"), more=more)
            self.events.add(caller, summary)
