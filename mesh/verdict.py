"""What is asked of policies, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.matching import Headers
from mesh.model import Action

DEFAULT_RULE = "mesh-default"  # named in verdicts that Config.default_action decided
NO_ALLOW_RULE = "no-allow-rule"  # named in verdicts where ALLOW policies select and none matches


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks: the identity a certificate or the kernel proved, and the address it was seen with ("" if unknown)."""

    spiffe: str | None
    identity: int
    address: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked. ``port`` is the destination workload's. ``method`` None: only layer 4 is known."""

    port: int
    method: str | None = None
    path: str = ""
    host: str = ""
    headers: Headers = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``rule`` is "ns/name#index", DEFAULT_RULE or NO_ALLOW_RULE. ``reason`` is one of: allow_rule, deny_rule,
    l7_rule_on_tcp, no_allow_matched, default_allow, default_deny, needs_l7, unknown_workload.
    ``audits``: rules of AUDIT policies that match, and "… would DENY" or "… would ALLOW" of policies in
    audit mode whose enforcement would change the outcome.
    """

    action: Action
    rule: str
    reason: str
    needs_l7: bool = False
    audits: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        return self.action is Action.ALLOW

    @property
    def possible(self) -> bool:
        """Allowed, or it might be if more were known."""
        return self.action is Action.ALLOW or self.needs_l7


@dataclass(frozen=True, slots=True)
class L7Fields:
    """What rules ask of requests to a port. Where ``paths``, ``hosts`` or ``headers`` are asked for, a request must be
    in canonical form, or server and policy read two things."""

    methods: bool = False
    paths: bool = False
    hosts: bool = False
    headers: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return self.methods or self.paths or self.hosts or bool(self.headers)
