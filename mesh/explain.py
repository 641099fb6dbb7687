"""Why a request is allowed or denied: the evaluator and the router of the data path, asked aloud."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mesh.dataplane import DestKind, kernel_may
from mesh.express import why as express
from mesh.identity import SCHEME, IdentityError, SpiffeId
from mesh.model import CONFIG_KEY, Action, Config, Identity, Policy, Protocol, Service, ServicePort, State, TlsMode, Workload
from mesh.policy import Peer, PolicySet, Request, Verdict, authorize
from mesh.routing import Choice, Decision, NoRoute, RouteTable

NAMES_MAX = 5  # suggested for a name that is not known
LIKENESS_MIN = 0.6  # of either part of such a name; 1: the same


class ExplainError(ValueError):
    """The question names something the State does not have. The message suggests what it might have meant."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Who the source is to the mesh, and what proves it."""

    spiffe: str | None
    identity: int  # 0: nobody's now
    workload: str  # item key; "" for an identity asked about by its name
    address: str
    proof: tuple[str, ...]  # sentences


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The verdict at one endpoint the request could go to."""

    workload: str  # item key
    node: str
    port: int
    verdict: Verdict
    policies: tuple[str, ...]  # that select it, as "ns/name ACTION"


@dataclass(frozen=True, slots=True)
class Explanation:
    """``outcome``: allowed, denied, mixed (endpoints differ), needs_l7 (ask with method and path), no_route or no_endpoint.
    ``path_kind``: native (from the endpoints' own node the kernel alone connects) or proxy. ``express``: whether the kernel
    carries such a request past the proxy, and if not, why; "" where the question has no request or no workload that asks."""

    outcome: str
    rule: str
    reason: str
    detail: str  # a sentence for people
    source: Evidence
    destination: str  # item key
    port: int
    protocol: str
    path_kind: str
    route: str  # "ns/name#index", or "" where the service is its own backend
    endpoints: tuple[Endpoint, ...]
    revision: int
    express: str = ""


def why(
    state: State,
    source: str,
    destination: str,
    method: str | None = None,
    path: str = "",
    port: int = 0,
    *,
    host: str = "",
    headers: Mapping[str, str] | None = None,
    revision: int = 0,
) -> Explanation:
    """``source``: a workload (``ns/name``), an identity (SPIFFE URI or principal), or "unknown". ``destination``: a service
    (``ns/name`` or ``name.ns.mesh``) or, if there is no such service, a workload (``ns/name``). ``port``: the service's (a
    workload's own where one is asked about), 0 for its only or first. Raises ExplainError.
    """
    evidence = _source(state, source)
    policies = PolicySet(state)
    peer = Peer(evidence.spiffe, evidence.identity, evidence.address)
    key, item = _destination(state, destination)
    if isinstance(item, Workload):
        target = port or next(iter(item.ports), 0)
        if target not in item.ports:
            raise ExplainError(f"{key} declares no port {target}; it has {', '.join(map(str, item.ports)) or 'none'}")
        ask = Request(target, method, path or "/" if method else path, host, dict(headers or {}))
        endpoint = _endpoint(policies, state, key, peer, ask, http=True)
        found = _conclude(evidence, key, target, "", DestKind.PROXY.value, "", [endpoint], revision)
        if method is None or not evidence.workload:
            return found
        sent = Request(target, method, ask.path, host or _host_of(item), ask.headers)
        return replace(found, express=express.why(state, RouteTable(state), policies, peer, key, sent, caller=evidence.workload))
    spec = _port(key, item, port)
    request = Request(spec.port, method, path or ("/" if method else ""), host or _own_name(item), dict(headers or {}))
    table = RouteTable(state)
    decisions, missing = _routes(table, key, spec, request)
    rule = next((decision.rule for decision in decisions), missing.rule if missing else "")
    endpoints = []
    for decision in decisions:
        backend = state[decision.service]
        if isinstance(backend, Service):
            used = _port(decision.service, backend, decision.port)
            ask = Request(used.target_port, method, request.path, request.host, request.headers)
            http = spec.protocol not in (Protocol.TCP, Protocol.UDP)
            endpoints += [_endpoint(policies, state, name, peer, ask, http=http) for name in backend.endpoints if name in state]
    nodes = {endpoint.node for endpoint in endpoints}
    kernel = kernel_may(policies, table, key, spec, item.endpoints) and len(nodes) == 1
    kind = (DestKind.NATIVE if kernel else DestKind.PROXY).value
    if missing is not None and not endpoints:
        detail = (
            f"{missing.reason}: no backend of {key} port {spec.port} takes {method or 'a connection'} {request.path}".rstrip()
        )
        return Explanation(
            "no_route", missing.rule, missing.reason, detail, evidence, key, spec.port, spec.protocol, kind, rule, (), revision
        )
    found = _conclude(evidence, key, spec.port, spec.protocol, kind, rule, endpoints, revision)
    if method is None or kind == DestKind.NATIVE.value or not evidence.workload:
        return found
    return replace(found, express=express.why(state, table, policies, peer, key, request, caller=evidence.workload))


def _host_of(workload: Workload) -> str:
    """What a client writes that dials it by its own address."""
    address = next(iter(workload.addresses), "")
    return f"[{address}]" if ":" in address else address


def _routes(table: RouteTable, key: str, spec: ServicePort, request: Request) -> tuple[list[Decision], NoRoute | None]:
    known = table.port(key, spec.port)
    if known is None or request.method is None:
        return [Decision("", key, spec.port)], None
    choice = known.fixed or known.match(request)
    outcomes = choice.outcomes if isinstance(choice, Choice) else (choice,)
    decisions = [outcome for outcome in outcomes if isinstance(outcome, Decision)]
    return decisions, next((outcome for outcome in outcomes if isinstance(outcome, NoRoute)), None)


def _conclude(
    source: Evidence, key: str, port: int, protocol: str, kind: str, route: str, endpoints: list[Endpoint], revision: int
) -> Explanation:
    if not endpoints:
        outcome, rule, reason, detail = (
            "no_endpoint",
            "",
            "no_backend",
            f"no workload is behind {key}; check the selector's labels",
        )
    else:
        verdicts = [endpoint.verdict for endpoint in endpoints]
        first = next((verdict for verdict in verdicts if not verdict.allowed), verdicts[0])
        rule, reason = first.rule, first.reason
        if any(verdict.needs_l7 for verdict in verdicts):
            outcome = "needs_l7"
        elif len({verdict.allowed for verdict in verdicts}) > 1:
            outcome = "mixed"
        else:
            outcome = "allowed" if first.allowed else "denied"
        detail = _sentence(first)
    return Explanation(outcome, rule, reason, detail, source, key, port, protocol, kind, route, tuple(endpoints), revision)


def _sentence(verdict: Verdict) -> str:
    return {
        "allow_rule": f"allowed by {verdict.rule}",
        "deny_rule": f"denied by {verdict.rule}",
        "l7_rule_on_tcp": f"denied by {verdict.rule}: it asks for HTTP, and the port carries none",
        "no_allow_matched": "denied: ALLOW policies select the destination, and none of their rules matches",
        "default_allow": "allowed: no policy selects the destination, and MeshConfig.defaultAction is ALLOW",
        "default_deny": "denied: no policy selects the destination, and MeshConfig.defaultAction is DENY",
        "needs_l7": f"depends on the request: {verdict.rule} asks for more; name a method and a path",
    }.get(verdict.reason, f"denied: {verdict.reason}")


def _endpoint(policies: PolicySet, state: State, key: str, peer: Peer, request: Request, *, http: bool) -> Endpoint:
    workload = state[key]
    node = workload.node if isinstance(workload, Workload) else ""
    if peer.spiffe is None and isinstance(workload, Workload) and workload.tls is TlsMode.STRICT:
        verdict = Verdict(Action.DENY, "", "strict_mtls: a peer without identity does not enter")
    else:
        verdict = authorize(policies, peer, key, request, http=http)
    names = tuple(f"{policy.namespace}/{policy.name} {policy.action}{_dry(policy)}" for policy in policies.selecting(key))
    return Endpoint(key, node, request.port, verdict, names)


def _dry(policy: Policy) -> str:
    return f" ({policy.dry_run})" if policy.dry_run is not None else ""


def _source(state: State, source: str) -> Evidence:
    if source == "unknown":
        return Evidence(None, 0, "", "", ("no certificate and no cgroup of the mesh: identity unknown",))
    key = source if source.startswith("Workload/") else f"Workload/{source}"
    workload = state.get(key)
    if isinstance(workload, Workload):
        proof = (
            f"on node {workload.node} its processes' cgroup is registered as {key}, identity {workload.identity}",
            f"to other nodes it shows a certificate for {workload.spiffe}",
        )
        return Evidence(workload.spiffe, workload.identity, key, next(iter(workload.addresses), ""), proof)
    uri = source if source.startswith(SCHEME) else f"{SCHEME}{source}"
    try:
        spiffe = str(SpiffeId.parse(uri))
    except IdentityError:
        raise ExplainError(f"no workload {source!r}{_near(state, source, 'Workload')}") from None
    config = state.get(CONFIG_KEY)
    trust_domain = config.trust_domain if isinstance(config, Config) else ""
    if trust_domain and not spiffe.startswith(f"{SCHEME}{trust_domain}/"):
        raise ExplainError(f"{spiffe}: this mesh is of the trust domain {trust_domain}, and no other enters")
    identity = state.get(f"Identity//{spiffe}")
    if not isinstance(identity, Identity):  # policies ask for names, so it can be said what awaits one who comes
        near = _near(state, spiffe, "Identity")
        meant = near if "did you mean" in near else ""
        return Evidence(spiffe, 0, "", "", (f"asked as {spiffe}: no workload runs as it now, so no endpoint asks{meant}",))
    return Evidence(spiffe, identity.id, "", "", (f"asked as {spiffe}, identity {identity.id}, from no particular address",))


def _destination(state: State, destination: str) -> tuple[str, Service | Workload]:
    name = destination
    if "/" not in name:
        service, _, namespace = name.removesuffix(".").removesuffix(".mesh").partition(".")
        name = f"{namespace or 'default'}/{service}"
    name = name.removeprefix("Service/").removeprefix("Workload/")
    prefixes = ("Workload",) if destination.startswith("Workload/") else ("Service", "Workload")
    for prefix in prefixes:
        item = state.get(f"{prefix}/{name}")
        if isinstance(item, Service | Workload):
            return f"{prefix}/{name}", item
    raise ExplainError(f"no service or workload {name!r}{_near(state, name, 'Service')}")


def _port(key: str, service: Service, port: int) -> ServicePort:
    for spec in service.ports:
        if port in (0, spec.port):
            return spec
    raise ExplainError(f"{key} has no port {port}; it has {', '.join(str(spec.port) for spec in service.ports) or 'none'}")


def _own_name(service: Service) -> str:
    return f"{service.name}.{service.namespace}.mesh"


def _near(state: State, name: str, kind: str) -> str:
    names = [key.removeprefix(f"{kind}/").removeprefix("/") for key in state if key.startswith(f"{kind}/")]
    scored = sorted(((_likeness(name, known), known) for known in names), reverse=True)
    if near := [known for likeness, known in scored[:NAMES_MAX] if likeness]:
        return f"; did you mean {', '.join(near)}?"
    return f"; none of the {len(names)} that are there is called like it" if names else "; there is none"


def _likeness(asked: str, known: str) -> float:
    """0 for names nobody would take for each other. All of a namespace begin alike, so that part is compared apart."""
    (namespace, own), (known_namespace, known_own) = (name.rpartition("/")[::2] for name in (asked, known))
    around = difflib.SequenceMatcher(None, namespace, known_namespace).ratio()
    itself = difflib.SequenceMatcher(None, own, known_own).ratio()
    return around + itself if own == known_own or min(around, itself) >= LIKENESS_MIN else 0.0
