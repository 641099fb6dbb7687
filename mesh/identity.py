"""SPIFFE identities of workloads, nodes, operators and the controller, and the server name that carries one.

The forms, for a trust domain ``td``::

    spiffe://td/ns/<namespace>/sa/<service account>    a workload
    spiffe://td/node/<name>                            an agent
    spiffe://td/operator/<name>                        a person or a tool
    spiffe://td/controller                             the controller

Parsing is strict: one text for each identity, so that texts may be compared. Names are DNS labels (at most 63
of a-z, 0-9 and ``-``) because they also travel as a server name: ``<service account>.<namespace>.<td>``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LABEL_CHARS_MAX = 63
TRUST_DOMAIN_CHARS_MAX = 120  # sni(): two labels, two dots and this stay under DNS's 253
SPIFFE_CHARS_MAX = 2048  # of the SPIFFE standard; nothing of ours comes near it
SCHEME = "spiffe://"

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


class IdentityError(ValueError):
    """The text names no identity. The message says which part, and what was expected."""


def check_label(value: str, what: str) -> str:
    """``value`` if it is a DNS label; IdentityError that names ``what`` if not."""
    if not _LABEL.fullmatch(value):
        shown = value if len(value) <= LABEL_CHARS_MAX else value[:LABEL_CHARS_MAX] + "…"
        raise IdentityError(f"{what} {shown!r} is not a DNS label: 1 to 63 of a-z, 0-9 and '-', not '-' at an end")
    return value


def check_trust_domain(value: str) -> str:
    """``value`` if it is dot-separated DNS labels of at most 120 characters together."""
    if len(value) > TRUST_DOMAIN_CHARS_MAX:
        raise IdentityError(f"trust domain is {len(value)} characters long; at most {TRUST_DOMAIN_CHARS_MAX}")
    for label in value.split("."):
        check_label(label, f"trust domain {value!r}: part")
    return value


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """A workload's identity: a service account of a namespace."""

    trust_domain: str
    namespace: str
    service_account: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        check_label(self.namespace, "namespace")
        check_label(self.service_account, "service account")

    def __str__(self) -> str:
        return f"{SCHEME}{self.principal}"

    @property
    def principal(self) -> str:
        """The form policies use: without the scheme."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @property
    def short(self) -> str:
        """``ns/sa``, for metrics and people."""
        return f"{self.namespace}/{self.service_account}"

    def sni(self) -> str:
        """The server name under which a shared address serves this identity."""
        return f"{self.service_account}.{self.namespace}.{self.trust_domain}"

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """From ``spiffe://td/ns/x/sa/y``. Raises IdentityError for any other text, a node's identity included."""
        parsed = parse(text)
        if not isinstance(parsed, SpiffeId):
            raise IdentityError(
                f"{text} is not a workload's identity: expected spiffe://<trust domain>/ns/<namespace>/sa/<account>"
            )
        return parsed


@dataclass(frozen=True, slots=True, order=True)
class NodeId:
    """An agent's identity."""

    trust_domain: str
    name: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        check_label(self.name, "node")

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}/node/{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class OperatorId:
    """A person or tool that may use the operator API."""

    trust_domain: str
    name: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        check_label(self.name, "operator")

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}/operator/{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class ControllerId:
    """The controller's identity; all its replicas share it."""

    trust_domain: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}/controller"


AnyId = SpiffeId | NodeId | OperatorId | ControllerId


def parse(text: str) -> AnyId:
    """Any identity of the mesh from its URI. Raises IdentityError; accepts no second spelling of one."""
    if len(text) > SPIFFE_CHARS_MAX:
        raise IdentityError(f"identity is {len(text)} characters long; at most {SPIFFE_CHARS_MAX}")
    if not text.startswith(SCHEME):
        raise IdentityError(f"{text[:80]!r} does not start with {SCHEME}")
    match text[len(SCHEME) :].split("/"):
        case [domain, "ns", namespace, "sa", account]:
            return SpiffeId(domain, namespace, account)
        case [domain, "node", name]:
            return NodeId(domain, name)
        case [domain, "operator", name]:
            return OperatorId(domain, name)
        case [domain, "controller"]:
            return ControllerId(domain)
    raise IdentityError(f"{text[:200]!r} is none of spiffe://<td>/ns/<ns>/sa/<sa>, /node/<name>, /operator/<name>, /controller")
