"""The one question before a workload certificate: may this node have it, now?"""

from __future__ import annotations

from controller.events import Refused, not_granted
from controller.registry import Registry
from mesh.identity import SpiffeId


class Grants:
    """Identities an operator granted to a node *and* that a registered workload runs under there."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def check_sign(self, node: str, spiffe: SpiffeId, source: str) -> None:
        """Raises Refused: foreign_trust_domain, identity_not_granted, identity_not_scheduled."""
        if spiffe.trust_domain != self._registry.trust_domain:
            raise Refused(
                "foreign_trust_domain",
                f"{spiffe} is not of the trust domain {self._registry.trust_domain}",
                node=node,
                spiffe=str(spiffe),
                source=source,
            )
        if not self._registry.granted(node, spiffe.namespace, spiffe.service_account):
            raise not_granted(node, spiffe.namespace, spiffe.service_account, str(spiffe), source)
        if not self._registry.scheduled(node, spiffe.namespace, spiffe.service_account):
            raise Refused(
                "identity_not_scheduled",
                f"no workload of {spiffe.short} is registered on node {node}; register it before asking for its certificate",
                node=node,
                spiffe=str(spiffe),
                source=source,
            )
