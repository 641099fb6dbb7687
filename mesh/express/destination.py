"""What one caller may ask of one service port on its own node, told by the router and the evaluator themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mesh.express.atoms import Reads
from mesh.express.machine import WINDOW_BYTES
from mesh.model import CONFIG_KEY, Config, Protocol, Service, ServicePort, State, Workload
from mesh.policy import Peer, PolicySet, Request, authorize, l7_fields, port_needs_l7
from mesh.routing import Choice, Decision, Outcome, RouteTable

ENDPOINTS_MAX = 8  # of one destination: what a client's record has room for
GROUPS_MAX = 4  # of one verdict


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why requests to a destination stay in user space. ``code``: an enum's text; ``reason``: a sentence for people."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where requests go that are told apart no further. ``rule``: the policy rule that allows, as `mesh.verdict` names it;
    ``route``: the route's rule, or ""; ``spiffe``: the destination's identity; ``groups``: weight and the endpoints it
    is for, as bits of their places in `Program.endpoints`."""

    rule: str
    route: str
    spiffe: str
    groups: tuple[tuple[int, int], ...]


def too_many_endpoints(count: int) -> Refusal:
    return Refusal("too_many_endpoints", f"{count} endpoints; the kernel chooses among at most {ENDPOINTS_MAX}")


class Facts:
    """A State and the tables made of it."""

    def __init__(self, state: State, routes: RouteTable, policies: PolicySet) -> None:
        self.state, self.routes, self.policies = state, routes, policies
        config = state.get(CONFIG_KEY)
        self.config = config if isinstance(config, Config) else Config(trust_domain="", express="off")

    def service(self, key: str) -> Service | None:
        item = self.state.get(key)
        return item if isinstance(item, Service) else None

    def workload(self, key: str) -> Workload | None:
        item = self.state.get(key)
        return item if isinstance(item, Workload) else None


class Destination:
    """A service port as one caller sees it who is where the ``local`` workloads are. `refusal` first; then `decide` answers,
    and `endpoints` has a place for every endpoint the kernel may send to."""

    def __init__(
        self, facts: Facts, peer: Peer, service_key: str, port: int, *, local: Collection[str], caller: str = ""
    ) -> None:
        self.facts, self.peer, self.key, self.port = facts, peer, service_key, port
        self.local, self.caller = local, caller
        self.endpoints: dict[tuple[str, int], int] = {}
        self._verdicts: dict[tuple[int, int], str | Refusal] = {}  # of one request: the rule that allows, by what decides
        self._targets: dict[tuple[str, int], tuple[tuple[str, int, Workload], ...]] = {}

    @property
    def name(self) -> str:
        return self.key.partition("/")[2]

    def refusal(self) -> Refusal | None:
        """Why no request to it is for the kernel, whatever it asks."""
        facts = self.facts
        claims = self._claims()
        if claims is None:
            return self._unknown()
        if facts.config.express == "off":
            return Refusal("off", "express is off in MeshConfig")
        for key, service, _ in claims:
            if service.express == "off":
                return Refusal("off", f"express is off for service {key.partition('/')[2]}")
        caller = facts.workload(self.caller) if self.caller else None
        if caller is not None and caller.express == "off":
            return Refusal("off", f"express is off for workload {self.caller.partition('/')[2]}")
        if facts.config.access_log:
            return Refusal("access_log", "MeshConfig asks for a full access log, which user space writes")
        if facts.config.head_bytes_max < WINDOW_BYTES:
            return Refusal("head_limit", f"MeshConfig.headBytesMax is below the kernel's window of {WINDOW_BYTES} bytes")
        for key, service, _ in claims:
            if service.add_headers:
                added = ", ".join(service.add_headers)
                return Refusal("add_headers", f"service {key.partition('/')[2]} has headers added to its requests: {added}")
        if not any(self._http(*claim) for claim in claims):
            return self._not_http()
        return None

    def _claims(self) -> tuple[tuple[str, Service, ServicePort], ...] | None:
        """The service with the port as it says of it; None: there is no such port."""
        service = self.facts.service(self.key)
        if service is None or self.facts.routes.port(self.key, self.port) is None:
            return None
        return ((self.key, service, next(spec for spec in service.ports if spec.port == self.port)),)

    def _unknown(self) -> Refusal:
        return Refusal("unknown_service", f"there is no service {self.name} with port {self.port}")

    def _not_http(self) -> Refusal:
        return Refusal("not_http", f"port {self.port} of service {self.name} is not known to carry HTTP: set appProtocol: http")

    def _http(self, key: str, service: Service, spec: ServicePort) -> bool:
        if spec.protocol is Protocol.HTTP or self.facts.routes.routed(key, spec.port):
            return True
        return any(port_needs_l7(self.facts.policies, end, spec.target_port) for end in service.endpoints)

    def reads(self) -> tuple[Reads, bool]:
        """What routes and policies read of requests, and whether a name with "_" could be taken for a header they read."""
        reads = Reads()
        table = self.facts.routes.port(self.key, self.port)
        decisions: list[Outcome] = [Decision("", self.key, self.port)]
        names = False
        if table is not None:
            if table.fixed is None:
                for entry in table.entries:
                    reads.entry(entry)
            names = bool(table.fields.headers)
            choices = [table.fixed] if table.fixed is not None else [entry.choice for entry in table.entries]
            decisions = [outcome for choice in choices for outcome in choice.outcomes] or decisions
        for decision in dict.fromkeys(decisions):
            for key, port, _ in self.targets(decision) if isinstance(decision, Decision) else ():
                names = self._policies(reads, key, port) or names
        return reads, names

    def _policies(self, reads: Reads, key: str, port: int) -> bool:
        """Adds what an endpoint's policies read; whether they read headers."""
        view = self.facts.policies.view(key, self.peer.spiffe, port)
        if view is not None and view.simple is None:
            for clause in view.clauses():
                reads.clause(clause)
        return bool(l7_fields(self.facts.policies, key, port).headers)

    def targets(self, decision: Decision) -> tuple[tuple[str, int, Workload], ...]:
        """The endpoints of a backend: workload key, port and the workload."""
        asked = (decision.service, decision.port)
        found = self._targets.get(asked)
        if found is None:
            service = self.facts.service(decision.service)
            port = next((spec.target_port for spec in service.ports if spec.port == decision.port), 0) if service else 0
            keys = service.endpoints if service and port else ()
            known = [(key, port, self.facts.workload(key)) for key in keys]
            found = self._targets[asked] = tuple((key, port, item) for key, port, item in known if item and item.addresses)
        return found

    def decide(self, request: Request) -> Verdict | Refusal:
        """Whether and where the kernel may send a request; ``request.port`` is the service's."""
        table = self.facts.routes.port(self.key, self.port)
        if table is None:
            return Refusal("unknown_service", "the service or its port does not exist")
        choice = table.fixed or table.match(request)
        if not isinstance(choice, Choice):
            return Refusal("no_route", "no route takes it")
        self._verdicts.clear()
        groups: dict[int, int] = {}
        answers: dict[tuple[str, str], None] = {}
        route, before = "", 0
        for outcome, upto in zip(choice.outcomes, choice.cumulative, strict=True):
            weight, before = upto - before, upto
            if not isinstance(outcome, Decision):
                return Refusal("no_route", f"HTTPRoute {outcome.rule} leads to no backend: {outcome.reason}")
            route = outcome.rule
            targets = self.targets(outcome)
            if not targets:
                return Refusal("no_endpoint", f"service {outcome.service.partition('/')[2]} has no endpoint")
            if len(targets) > ENDPOINTS_MAX:
                return too_many_endpoints(len(targets))
            bits = 0
            for key, port, workload in targets:
                answer = self._ask(key, port, workload, request)
                if isinstance(answer, Refusal):
                    return answer
                answers[answer] = None
                place = self.endpoints.setdefault((key, port), len(self.endpoints))
                bits |= 1 << place
            groups[bits] = groups.get(bits, 0) + weight
        if len(answers) > 1:
            return Refusal("answers_differ", "endpoints differ in the rule that allows it, or in their identity")
        if len(groups) > GROUPS_MAX:
            return Refusal("too_many_backends", f"the route splits among more than {GROUPS_MAX} backends")
        rule, spiffe = next(iter(answers))
        return Verdict(rule, route, spiffe, tuple((weight, bits) for bits, weight in groups.items()))

    def _ask(self, key: str, port: int, workload: Workload, request: Request) -> tuple[str, str] | Refusal:
        """The rule that allows it and the endpoint's identity."""
        name = key.partition("/")[2]
        if key not in self.local:
            return Refusal("remote_endpoint", f"endpoint {name} is on node {workload.node}, not on this one")
        if workload.express == "off":
            return Refusal("off", f"express is off for workload {name}")
        # Endpoints that the same policies select get the same answer
        group = (id(self.facts.policies.index(key)), port)
        answer = self._verdicts.get(group)
        if answer is None:
            verdict = authorize(
                self.facts.policies,
                self.peer,
                key,
                Request(port, request.method, request.path, request.host, request.headers),
            )
            if not verdict.allowed:
                answer = Refusal("denied", f"denied by {verdict.rule}")
            elif verdict.audits:
                answer = Refusal("audited", f"rule {verdict.audits[0]} is audited, which user space writes")
            else:
                answer = verdict.rule
            self._verdicts[group] = answer
        return answer if isinstance(answer, Refusal) else (answer, workload.spiffe)


class Direct(Destination):
    """A workload's port, asked for by the workload's own address: no route has a say, and nobody else answers."""

    def _claims(self) -> tuple[tuple[str, Service, ServicePort], ...] | None:
        """The services that lead there, each with the port by which it does."""
        workload = self.facts.workload(self.key)
        if workload is None or self.port not in workload.ports:
            return None
        return tuple(self._leading())

    def _leading(self) -> Iterable[tuple[str, Service, ServicePort]]:
        for key, item in self.facts.state.items():
            if isinstance(item, Service) and self.key in item.endpoints:
                for spec in item.ports:
                    if spec.target_port == self.port and spec.protocol is not Protocol.UDP:
                        yield key, item, spec

    def _unknown(self) -> Refusal:
        return Refusal("unknown_workload", f"there is no workload {self.name} with port {self.port}")

    def _not_http(self) -> Refusal:
        return Refusal("not_http", f"port {self.port} of workload {self.name} is not known to carry HTTP: set appProtocol: http")

    def reads(self) -> tuple[Reads, bool]:
        reads = Reads()
        return reads, self._policies(reads, self.key, self.port)

    def decide(self, request: Request) -> Verdict | Refusal:
        workload = self.facts.workload(self.key)
        if workload is None:
            return self._unknown()
        self._verdicts.clear()
        answer = self._ask(self.key, self.port, workload, request)
        if isinstance(answer, Refusal):
            return answer
        rule, spiffe = answer
        return Verdict(rule, "", spiffe, ((1, 1 << self.endpoints.setdefault((self.key, self.port), 0)),))


def destination_of(facts: Facts, peer: Peer, key: str, port: int, *, local: Collection[str], caller: str = "") -> Destination:
    """``key``: a service's, or that of a workload which is dialled by its own address."""
    kind = Direct if key.startswith("Workload/") else Destination
    return kind(facts, peer, key, port, local=local, caller=caller)
