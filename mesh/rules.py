"""Policies compiled: rules taken apart into clauses, indexed by what they ask of the peer's identity.

Internal to `mesh.policy`. Rules of policies that select together are indexed once (`Index`); what a peer's identity and a
port decide is decided once (`View`); a request then walks only the clauses that are about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mesh import matching
from mesh.matching import IpNetwork
from mesh.model import Action, Operation, Policy, Source
from mesh.verdict import NO_ALLOW_RULE, L7Fields, Request, Verdict

NO_ALLOW = Verdict(Action.DENY, NO_ALLOW_RULE, "no_allow_matched")
_ANY_SOURCE, _ANY_OPERATION = Source(), Operation()


class Clause:
    """One source × one operation of a rule; what remains to be asked once identity and port match."""

    __slots__ = ("action", "blocks", "l7", "needs_l7", "not_blocks", "operation", "order", "rule", "source", "tcp", "verdict")

    def __init__(self, order: int, rule: str, action: Action, source: Source, operation: Operation) -> None:
        self.order = order  # of the rule, in the order of names: the first that matches is the one named
        self.rule = rule
        self.action = action
        self.source = source
        self.operation = operation
        self.blocks: tuple[IpNetwork, ...] = matching.compile_blocks(source.ip_blocks) if source.ip_blocks else ()
        self.not_blocks: tuple[IpNetwork, ...] = matching.compile_blocks(source.not_ip_blocks) if source.not_ip_blocks else ()
        self.l7 = matching.has_l7(operation)
        # Made once, so that a decision makes no object
        self.verdict = Verdict(action, rule, "allow_rule" if action is Action.ALLOW else "deny_rule")
        self.tcp = self.needs_l7 = self.verdict
        if not self.unconditional:
            self.tcp = Verdict(Action.DENY, rule, "l7_rule_on_tcp")
            self.needs_l7 = Verdict(Action.DENY, rule, "needs_l7", needs_l7=True)

    @property
    def unconditional(self) -> bool:
        """Whether identity and port were all it asked for."""
        return not (self.l7 or self.blocks or self.not_blocks)

    def test(self, address: str, request: Request, path: str, host: str, http: bool) -> bool | None:
        """True, False, or None where a fact is missing."""
        unknown = False
        if self.blocks or self.not_blocks:
            if not address:
                unknown = True
            elif not self._from_block(address):
                return False
        if self.l7:
            if request.method is None:
                if not http:
                    if self.action is not Action.DENY:
                        return False
                else:
                    unknown = True
            else:
                every_line = self.action is Action.ALLOW
                if not matching.matches_l7(self.operation, request.method, path, host, request.headers, every_line=every_line):
                    return False
        return None if unknown else True

    def _from_block(self, address: str) -> bool:
        inside = not self.blocks or matching.in_blocks(self.blocks, address)
        return inside and not (self.not_blocks and matching.in_blocks(self.not_blocks, address))


class View:
    """The clauses that remain for one peer identity and port, in the order of names."""

    __slots__ = ("allows", "audits", "denies", "dry_allow_rule", "dry_allows", "hosts", "otherwise", "simple")

    def __init__(self, index: Index, principal: str | None, namespace: str | None, port: int, default: Verdict) -> None:
        self.denies = index.denies.select(principal, namespace, port)
        self.allows = index.allows.select(principal, namespace, port)
        self.audits = index.audits.select(principal, namespace, port) + index.dry_denies.select(principal, namespace, port)
        self.dry_allows = index.dry_allows.select(principal, namespace, port)
        self.dry_allow_rule = index.dry_allow_rule
        self.hosts = any(clause.operation.hosts or clause.operation.not_hosts for clause in self.clauses())
        self.otherwise = NO_ALLOW if index.has_allow else default
        # What no request can change, the common case of L4 policies
        self.simple: Verdict | None = None
        if not self.audits and not index.dry_allow_rule:
            if self.denies and self.denies[0].unconditional:
                self.simple = self.denies[0].verdict
            elif not self.denies and not self.allows:
                self.simple = self.otherwise
            elif not self.denies and self.allows[0].unconditional:
                self.simple = self.allows[0].verdict

    def clauses(self) -> tuple[Clause, ...]:
        """Everything a request may be asked, audits included."""
        return (*self.denies, *self.allows, *self.audits, *self.dry_allows)


class ClauseTable:
    """Clauses by what they ask of the peer's identity, so that a peer meets only those that could match it."""

    __slots__ = ("anyone", "by_namespace", "by_principal")

    def __init__(self) -> None:
        self.by_principal: dict[str, list[Clause]] = {}
        self.by_namespace: dict[str, list[Clause]] = {}
        self.anyone: list[Clause] = []

    def add(self, clause: Clause) -> None:
        source = clause.source
        if source.principals and not any("*" in pattern for pattern in source.principals):
            for principal in dict.fromkeys(source.principals):
                self.by_principal.setdefault(principal, []).append(clause)
        elif source.namespaces and not any("*" in pattern for pattern in source.namespaces):
            for namespace in dict.fromkeys(source.namespaces):
                self.by_namespace.setdefault(namespace, []).append(clause)
        else:
            self.anyone.append(clause)

    def select(self, principal: str | None, namespace: str | None, port: int) -> tuple[Clause, ...]:
        """Clauses whose identity and port match, cut after the first that asks for nothing more."""
        candidates = list(self.anyone)
        if principal is not None:
            candidates += self.by_principal.get(principal, ())
        if namespace is not None:
            candidates += self.by_namespace.get(namespace, ())
        candidates.sort(key=_order)
        out: list[Clause] = []
        for clause in candidates:
            if matching.matches_port(clause.operation, port) and matching.matches_identity(clause.source, principal, namespace):
                out.append(clause)
                if clause.unconditional:
                    break
        return tuple(out)

    def __iter__(self) -> Iterator[Clause]:
        for lists in (self.by_principal.values(), self.by_namespace.values(), (self.anyone,)):
            for clauses in lists:
                yield from clauses


def _order(clause: Clause) -> int:
    return clause.order


class Index:
    """The policies that select together, compiled. Workloads selected by the same policies share one."""

    __slots__ = ("allows", "audits", "denies", "dry_allow_rule", "dry_allows", "dry_denies", "has_allow", "policies", "ports")

    def __init__(self, policies: Iterable[Policy]) -> None:
        self.policies = sorted(policies, key=lambda policy: (policy.namespace, policy.name))
        self.denies, self.allows, self.audits = ClauseTable(), ClauseTable(), ClauseTable()
        self.dry_denies, self.dry_allows = ClauseTable(), ClauseTable()
        self.has_allow = False
        self.dry_allow_rule = ""  # the first ALLOW policy in audit mode
        self.ports: dict[int, tuple[L7Fields, bool]] = {}
        order = 0
        for policy in self.policies:
            name = f"{policy.namespace}/{policy.name}"
            if policy.action is Action.ALLOW:
                self.has_allow = True
            elif policy.action is Action.AUDIT and policy.dry_run is Action.ALLOW and not self.dry_allow_rule:
                self.dry_allow_rule = name
            table = self._table(policy)
            action = policy.dry_run or policy.action
            for number, rule in enumerate(policy.rules):
                for source in rule.sources or (_ANY_SOURCE,):
                    for operation in rule.operations or (_ANY_OPERATION,):
                        table.add(Clause(order, f"{name}#{number}", action, source, operation))
                        order += 1

    def _table(self, policy: Policy) -> ClauseTable:
        if policy.action is Action.AUDIT:
            if policy.dry_run is None:
                return self.audits
            return self.dry_denies if policy.dry_run is Action.DENY else self.dry_allows
        return self.denies if policy.action is Action.DENY else self.allows

    def port_fields(self, port: int) -> tuple[L7Fields, bool]:
        """What DENY and ALLOW rules ask of HTTP on this port, and whether anything but identity and port is asked
        by any rule, audits included."""
        known = self.ports.get(port)
        if known is None:
            known = self.ports[port] = self._port_fields(port)
        return known

    def _port_fields(self, port: int) -> tuple[L7Fields, bool]:
        asked = [
            clause for table in (self.denies, self.allows) for clause in table if matching.matches_port(clause.operation, port)
        ]
        operations = [clause.operation for clause in asked if clause.l7]
        fields = L7Fields(
            methods=any(op.methods or op.not_methods for op in operations),
            paths=any(op.paths or op.not_paths for op in operations),
            hosts=any(op.hosts or op.not_hosts for op in operations),
            headers=frozenset(name for op in operations for name, _ in op.headers),
        )
        audited = any(policy.action is Action.AUDIT for policy in self.policies)
        return fields, audited or any(not clause.unconditional for clause in asked)
