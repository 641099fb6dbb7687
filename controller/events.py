"""What the controller refused and why: a counter for each reason, and a short log in the form of flows."""

from __future__ import annotations

import time
from collections import deque

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from controller.sparing import WINDOW_S, Sparing
from mesh.link import Flow

EVENTS_MAX = 1_000  # older ones are forgotten

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


class Telemetry:
    """Metrics in a registry of their own (several controllers may live in one test process) and the event log."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.events: deque[Flow] = deque(maxlen=EVENTS_MAX)
        self.sparing = Sparing(_sum_up)
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
        """Counts one refusal, and logs it unless there are too many. ``known``: the role and name of a caller who has a
        certificate of ours; no stranger's flood hides what is refused to one."""
        self.refusals.labels(refusal.reason).inc()
        self.events.append(
            Flow(
                time=time.time(),
                verdict="denied",
                reason=refusal.reason,
                source=refusal.spiffe or "unknown",
                source_address=refusal.source,
                layer="control",
                revision=revision,
                node=refusal.node,
            )
        )
        if self.sparing.passes("refused", refusal.reason, known or "nobody"):
            log.warning("refused", reason=refusal.reason, detail=str(refusal), node=refusal.node, source=refusal.source)


def _sum_up(kind: tuple[str, ...], more: int) -> None:
    event, reason, caller = kind if len(kind) == 3 else ("refused", "any", "any")
    log.warning(f"{event}, and more of these", reason=reason, caller=caller, more=more, in_s=WINDOW_S)
