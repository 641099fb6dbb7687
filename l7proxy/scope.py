"""Deciding. A `Scope` is one caller asking one destination under one configuration; it remembers what equal
requests were told, so that the common request costs two dictionary look-ups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l7proxy.config import Config, Destination, Endpoint
from l7proxy.errors import Reply, denied, reply
from l7proxy.http1.head import NO_BODY, RequestHead
from l7proxy.metrics import Series
from l7proxy.target import Caller
from l7proxy.upstream import Pool
from mesh.model import Service
from mesh.policy import L7Fields, Peer, Request, Verdict, authorize, l7_fields
from mesh.routing import Choice, Decision, NoRoute

if TYPE_CHECKING:
    from l7proxy.worker import Worker

PLANS_MAX = 1024  # for each scope; dropped as a whole when full


class Candidate:
    """A plan's verdict about one endpoint. ``error``: what to answer instead of dialling."""

    __slots__ = ("add_headers", "audits", "endpoint", "error", "plain", "pool", "rule", "series")

    def __init__(
        self, endpoint: Endpoint, pool: Pool, series: Series, verdict: Verdict, error: Reply | None, add_headers: tuple[str, ...]
    ) -> None:
        self.endpoint, self.pool, self.series, self.error, self.add_headers = endpoint, pool, series, error, add_headers
        self.rule, self.audits = verdict.rule, verdict.audits
        self.plain = error is None and not add_headers and not verdict.audits


class Plan:
    """What becomes of one request head."""

    __slots__ = ("candidates", "choice", "error", "head", "only", "request_path")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self.error: Reply | None = None
        self.choice: Choice | None = None
        self.only: Candidate | None = None  # there is nothing to draw
        self.candidates: dict[Endpoint, Candidate] = {}


class Scope:
    """``inbound``: the destination's side of a tunnel."""

    __slots__ = (
        "brief", "caller", "config", "destination", "express", "inbound", "known", "label", "peer", "plans", "refused", "v6",
        "worker",
    )  # fmt: skip

    def __init__(self, worker: Worker, config: Config, caller: Caller, destination: Destination, *, inbound: bool) -> None:
        self.worker, self.config, self.caller, self.destination, self.inbound = worker, config, caller, destination, inbound
        self.peer = Peer(caller.spiffe, caller.identity, caller.address)
        self.v6 = ":" in caller.address
        self.plans: dict[RequestHead, Plan] = {}
        self.brief = 0  # connections in a row that were not worth pairing
        self.known: dict[bytes, Plan] = {}  # of them, those of heads that are whole requests and not refused out of hand
        self.label = config.label(caller.spiffe)
        self.refused = worker.metrics.http(self.label, self.service_label, "refused")
        self.express = not inbound and worker.express.allows(config, caller, destination)  # until the agent says no

    @property
    def service_label(self) -> str:
        """The destination as a metric's label, from a closed set."""
        destination = self.destination
        key = destination.service or (destination.endpoint.key if destination.endpoint else "")
        return key.partition("/")[2] or "unknown"

    def plan(self, head: RequestHead) -> Plan:
        """Remembered or made."""
        plan = self.plans.get(head)
        if plan is None:
            plan = self._make(head)
            if head.memo:
                if len(self.plans) >= PLANS_MAX:
                    self.plans.clear()
                    self.known.clear()
                self.plans[head] = plan
                if plan.error is None and head.framing == NO_BODY:
                    self.known[head.raw] = plan
        return plan

    def _make(self, head: RequestHead) -> Plan:
        plan = Plan(head)
        destination = self.destination
        if destination.endpoint is not None:
            plan.only = self.candidate(plan, destination.endpoint)
            return plan
        port = self.config.routes.port(destination.service, destination.port)
        if port is None:
            plan.error = reply("no_service")
            return plan
        plan.error = _canonical(head, port.fields)
        if plan.error is not None:
            return plan
        match = port.fixed or port.match(Request(destination.port, head.method, head.path, head.host, head.header))
        if isinstance(match, NoRoute):
            plan.error = _no_route(match)
            return plan
        plan.choice = match
        if isinstance(match.only, NoRoute):
            plan.error = _no_route(match.only)
        elif match.only is not None:
            endpoints = self.endpoints(match.only)
            if len(endpoints) == 1:
                plan.only = self.candidate(plan, endpoints[0])
        return plan

    def endpoints(self, decision: Decision) -> tuple[Endpoint, ...]:
        return self.config.endpoints(decision.service, decision.port, self.v6)

    def pick(self, plan: Plan, tried: list[Endpoint]) -> Candidate | Reply:
        """Draws a backend by weight and one of its endpoints that was not tried."""
        if plan.error is not None:
            return plan.error
        if plan.only is not None:
            return plan.only if plan.only.endpoint not in tried else reply("connect_refused")
        choice = plan.choice
        if choice is None:
            return reply("no_route")
        outcome = choice.only or choice.pick(self.worker.rng)
        if isinstance(outcome, NoRoute):
            return _no_route(outcome)
        endpoint = self.worker.upstreams.choose(self.endpoints(outcome), tried, self.worker.clock.now)
        if endpoint is None:
            return reply(
                "connect_refused" if tried else "no_endpoints",
                "" if tried else f"service {outcome.service.partition('/')[2]} has no endpoint",
            )
        return plan.candidates.get(endpoint) or self.candidate(plan, endpoint)

    def candidate(self, plan: Plan, endpoint: Endpoint) -> Candidate:
        """Whether this request may go to this endpoint, and by what path. Same node: the one and only check.
        Other node: it fails here early, and the endpoint's node has the last word."""
        config, head = self.config, plan.head
        error = _canonical(head, l7_fields(config.policies, endpoint.key, endpoint.port))
        request = Request(endpoint.port, head.method, head.path, head.host, head.header)
        verdict = authorize(config.policies, self.peer, endpoint.key, request)
        if error is None and not verdict.allowed:
            error = denied(verdict.rule)
        kind = "inbound" if self.inbound else "local" if endpoint.local else "outbound"
        workload = config.workloads.get(endpoint.key)
        series = self.worker.metrics.http(self.label, config.label(workload.spiffe if workload else None), kind)
        service = config.services.get(self.destination.service)
        add = service.add_headers if isinstance(service, Service) and endpoint.local else ()
        found = Candidate(endpoint, self.worker.upstreams.pool(self.caller, endpoint), series, verdict, error, add)
        plan.candidates[endpoint] = found
        return found

    def transport_verdict(self, endpoint: Endpoint) -> Verdict:
        """For a connection that carries no HTTP."""
        return authorize(self.config.policies, self.peer, endpoint.key, Request(endpoint.port), http=False)

    def all_endpoints(self) -> tuple[Endpoint, ...]:
        """For a connection that carries no HTTP: every endpoint of the destination."""
        destination = self.destination
        if destination.endpoint is not None:
            return (destination.endpoint,)
        return self.config.endpoints(destination.service, destination.port, self.v6)


def _canonical(head: RequestHead, fields: L7Fields) -> Reply | None:
    """Where a rule reads a path or a header, server and policy must read the same."""
    if fields.paths and head.path_fault:
        return reply("path_not_canonical", f"the path has a form that server and policy may read differently: {head.path_fault}")
    if fields.headers and not head.underscores.isdisjoint(fields.headers):
        return reply("underscore_header")
    return None


def _no_route(found: NoRoute) -> Reply:
    if found.reason == "no_match":
        return reply("no_route")
    if found.reason == "unknown_service":
        return reply("no_service")
    return reply("no_backend", f"HTTPRoute {found.rule} leads to no backend: {found.reason}")
