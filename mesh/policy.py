"""The one evaluator of authorization policies. Everything that allows or denies asks `authorize`.

Order: any DENY rule that matches denies; else, if any ALLOW policy selects the destination, one of its rules must
match; else ``Config.default_action`` decides. AUDIT policies never decide.

Facts may be missing. Where only layer 4 is known (``Request.method`` is None, or ``Peer.address`` is empty) a rule that
asks for more is a *maybe*: if the outcome depends on one, the verdict is a denial with ``needs_l7`` set, and whoever can
learn more asks again. A port that really speaks TCP is asked with ``http=False``: then an ALLOW rule with HTTP fields
matches nothing and a DENY rule with HTTP fields counts as matched, so that an L7 rule can not be passed by not speaking HTTP.

Cost: rules are indexed by principal and namespace once for each set of policies that selects together; what a peer's
identity and a port decide is decided once and kept (`View`). A request then walks only the rules that are about it.
"""

from __future__ import annotations

from mesh import matching
from mesh.identity import SCHEME, IdentityError, SpiffeId
from mesh.model import CONFIG_KEY, Action, Config, Item, Policy, Service, State, Workload
from mesh.rules import Clause, Index, View
from mesh.verdict import DEFAULT_RULE, NO_ALLOW_RULE, L7Fields, Peer, Request, Verdict

__all__ = [
    "DEFAULT_RULE",
    "NO_ALLOW_RULE",
    "L7Fields",
    "Peer",
    "PolicySet",
    "Request",
    "Verdict",
    "authorize",
    "could_connect",
    "l7_fields",
    "port_needs_l7",
    "port_needs_proxy",
]

VIEWS_MAX = 65_536  # kept (destination, peer, port) views; all are dropped when full

_UNKNOWN = Verdict(Action.DENY, DEFAULT_RULE, "unknown_workload")
_DEFAULT = {
    Action.ALLOW: Verdict(Action.ALLOW, DEFAULT_RULE, "default_allow"),
    Action.DENY: Verdict(Action.DENY, DEFAULT_RULE, "default_deny"),
}


class PolicySet:
    """The policies of a State by destination workload. Immutable to its users, but for `move`; builds its indexes when first
    asked."""

    def __init__(self, state: State) -> None:
        config = state.get(CONFIG_KEY)
        # Without a Config nothing is known about the mesh: deny
        default = config.default_action if isinstance(config, Config) else Action.DENY
        self._default = _DEFAULT[Action.ALLOW if default is Action.ALLOW else Action.DENY]
        self._workloads: dict[str, Workload] = {}
        self._behind: dict[str, list[str]] = {}  # workload key -> services
        scopes: dict[str | None, dict[tuple[tuple[str, str], ...], list[Policy]]] = {}
        self._by_service: dict[str, list[Policy]] = {}
        for key, item in state.items():
            if isinstance(item, Workload):
                self._workloads[key] = item
            elif isinstance(item, Service):
                for endpoint in item.endpoints:
                    self._behind.setdefault(endpoint, []).append(key)
            elif isinstance(item, Policy):
                if item.services:
                    for service in item.services:
                        self._by_service.setdefault(service, []).append(item)
                else:
                    scope = scopes.setdefault(None if item.every_namespace else item.namespace, {})
                    scope.setdefault(tuple(sorted(item.selector.items())), []).append(item)
        # Policies with one selector are tested once, together
        self._scopes = {scope: list(groups.items()) for scope, groups in scopes.items()}
        self._indexes: dict[tuple[int, ...], Index] = {}
        self._index_of: dict[str, Index] = {}
        self._views: dict[tuple[str, str | None, int], View] = {}

    def move(self, key: str, old: Item | None, new: Item | None) -> None:
        """Takes a workload or service for what was under ``key``, None for nothing; policies and Config stay. For who follows
        a State; not while another thread asks."""
        if isinstance(old, Workload):
            del self._workloads[key]
        if isinstance(new, Workload):
            self._workloads[key] = new
        before = frozenset(old.endpoints) if isinstance(old, Service) else frozenset()
        after = frozenset(new.endpoints) if isinstance(new, Service) else frozenset()
        for endpoint in before - after:
            self._behind[endpoint].remove(key)
            if not self._behind[endpoint]:
                del self._behind[endpoint]
        for endpoint in after - before:
            self._behind.setdefault(endpoint, []).append(key)
        for workload in {key, *(before ^ after)}:
            self._index_of.pop(workload, None)
        self._views.clear()

    @property
    def indexes(self) -> int:
        """Sets of policies that select together, those of workloads that went too."""
        return len(self._indexes)

    def index(self, workload_key: str) -> Index | None:
        """The compiled policies that select a workload; None if the State has no such workload."""
        index = self._index_of.get(workload_key)
        if index is None:
            workload = self._workloads.get(workload_key)
            if workload is None:
                return None
            groups: list[list[Policy]] = []
            for scope in (workload.namespace, None):
                for selector, policies in self._scopes.get(scope, ()):
                    if all(workload.labels.get(name) == value for name, value in selector):
                        groups.append(policies)
            groups += [self._by_service[key] for key in self._behind.get(workload_key, ()) if key in self._by_service]
            signature = tuple(sorted(id(group) for group in groups))  # the lists live as long as this set
            index = self._indexes.get(signature)
            if index is None:
                unique = {(policy.namespace, policy.name): policy for group in groups for policy in group}
                index = self._indexes[signature] = Index(unique.values())
            self._index_of[workload_key] = index
        return index

    def selecting(self, workload_key: str) -> list[Policy]:
        """The policies that select a workload, in the order of names."""
        index = self.index(workload_key)
        return list(index.policies) if index else []

    def view(self, workload_key: str, spiffe: str | None, port: int) -> View | None:
        """The rules about one peer at one port of a workload; None if the State has no such workload."""
        key = (workload_key, spiffe, port)
        view = self._views.get(key)
        if view is None:
            index = self.index(workload_key)
            if index is None:
                return None
            principal = namespace = None
            if spiffe is not None:
                try:
                    identity = SpiffeId.parse(spiffe)
                    principal, namespace = identity.principal, identity.namespace
                except IdentityError:  # a node or operator: known, of no namespace
                    principal = spiffe.removeprefix(SCHEME)
            view = View(index, principal, namespace, port, self._default)
            if len(self._views) >= VIEWS_MAX:
                self._views.clear()
            self._views[key] = view
        return view


def authorize(policies: PolicySet, peer: Peer, workload_key: str, request: Request, *, http: bool = True) -> Verdict:
    """Whether ``peer`` may ask ``request`` of a workload. ``http=False``: the port is known to carry no HTTP.

    A verdict with ``needs_l7`` is a denial for whoever can learn no more.
    """
    view = policies.view(workload_key, peer.spiffe, request.port)
    if view is None:
        return _UNKNOWN
    if view.simple is not None:
        return view.simple
    path = matching.without_query(request.path)
    host = matching.host_name(request.host) if view.hosts else ""
    verdict = _decide(view, peer.address, request, path, host, http)
    if (view.audits or view.dry_allow_rule) and not verdict.needs_l7:  # else asked again when more is known
        audits = _audit(view, verdict, peer.address, request, path, host, http)
        if audits:
            return Verdict(verdict.action, verdict.rule, verdict.reason, audits=audits)
    return verdict


def _decide(view: View, address: str, request: Request, path: str, host: str, http: bool) -> Verdict:
    maybe: Clause | None = None
    for clause in view.denies:
        result = clause.test(address, request, path, host, http)
        if result:
            return clause.tcp if clause.l7 and request.method is None else clause.verdict
        if result is None and maybe is None:
            maybe = clause
    found = view.otherwise
    for clause in view.allows:
        result = clause.test(address, request, path, host, http)
        if result:
            found = clause.verdict
            break
        if result is None and not found.needs_l7:
            found = clause.needs_l7
    if found.action is Action.ALLOW and maybe is not None:
        return maybe.needs_l7
    return found


def _audit(view: View, verdict: Verdict, address: str, request: Request, path: str, host: str, http: bool) -> tuple[str, ...]:
    out: dict[str, None] = {}
    for clause in view.audits:
        if clause.test(address, request, path, host, http):
            out[clause.rule if clause.action is Action.AUDIT else f"{clause.rule} would DENY"] = None
    # Enforced, a policy in audit mode would add its rules to those that allow, and deny what none of them matches
    if view.dry_allow_rule and verdict.reason in ("default_allow", "default_deny", "no_allow_matched"):
        matched = next((clause for clause in view.dry_allows if clause.test(address, request, path, host, http)), None)
        if matched is None and verdict.allowed:
            out[f"{view.dry_allow_rule} would DENY"] = None
        elif matched is not None and not verdict.allowed:
            out[f"{matched.rule} would ALLOW"] = None
    return tuple(out)


def could_connect(policies: PolicySet, peer: Peer, workload_key: str, port: int) -> bool:
    """Whether some request of the peer's identity to this port of a workload could be allowed."""
    return authorize(policies, peer, workload_key, Request(port)).possible


def l7_fields(policies: PolicySet, workload_key: str, port: int) -> L7Fields:
    """What enforced rules ask of HTTP requests to this port of a workload; empty if nothing."""
    index = policies.index(workload_key)
    return index.port_fields(port)[0] if index else L7Fields()


def port_needs_l7(policies: PolicySet, workload_key: str, port: int) -> bool:
    """Whether an enforced rule asks for HTTP on this port: it then carries HTTP or nothing."""
    return bool(l7_fields(policies, workload_key, port))


def port_needs_proxy(policies: PolicySet, workload_key: str, port: int) -> bool:
    """Whether the kernel can not decide alone: a rule asks for HTTP or addresses, or an audit wants to see."""
    index = policies.index(workload_key)
    return index is not None and index.port_fields(port)[1]
