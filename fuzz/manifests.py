"""Target resources: YAML and JSON as operators, or whoever writes for them, send it."""

from __future__ import annotations

import json
from collections.abc import Hashable
from random import Random

import yaml

from fuzz.messages import change
from fuzz.target import Disagreement, Target
from mesh import compile as compiler
from mesh import resources

DOCUMENTS = (
    {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
     "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}},
    {"apiVersion": "mesh.pillion.dev/v1alpha1", "kind": "Workload", "metadata": {"name": "web-1", "namespace": "shop",
        "labels": {"app": "web"}},
     "spec": {"node": "n1", "serviceAccount": "web", "addresses": ["10.77.1.1", "fd77:1::1"]}},
    {"apiVersion": "mesh.pillion.dev/v1alpha1", "kind": "NodeGrant", "metadata": {"name": "n1"},
     "spec": {"node": "n1", "serviceAccounts": ["shop/web", "shop/*"]}},
    {"apiVersion": "mesh.pillion.dev/v1alpha1", "kind": "AuthorizationPolicy", "metadata": {"name": "allow", "namespace": "shop"},
     "spec": {"selector": {"matchLabels": {"app": "web"}}, "action": "ALLOW", "rules": [
         {"from": [{"source": {"principals": ["mesh.local/ns/shop/sa/*"], "notIpBlocks": ["10.0.0.0/8"]}}],
          "to": [{"operation": {"methods": ["GET"], "paths": ["/a/*"], "hosts": ["*.mesh"], "ports": ["8080"]}}]}]}},
    {"apiVersion": "mesh.pillion.dev/v1alpha1", "kind": "PeerAuthentication", "metadata": {"name": "p", "namespace": "shop"},
     "spec": {"mtls": {"mode": "STRICT"}}},
    {"apiVersion": "mesh.pillion.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"},
        "spec": {"trustDomain": "mesh.local"}},
    {"apiVersion": "mesh.pillion.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"}, "spec": {
        "outboundAllow": [{"cidr": "10.0.0.0/8", "ports": [80]}], "dnsUpstreams": ["192.0.2.1:53", "[2001:db8::1]:53"],
        "dnsForward": ["*.test", {"names": ["a.test"], "principals": ["mesh.local/ns/shop/sa/web"]}], "policyLeaseSeconds": 60,
        "budgets": {"connections": 2000, "workerShare": 0.25, "bytesInFlight": 1048576}, "connectsUnderWay": 16}},
    {"apiVersion": "mesh.pillion.dev/v1alpha1", "kind": "ServiceEntry", "metadata": {"name": "bank", "namespace": "shop"},
     "spec": {"hosts": ["api.bank.test", "*.cdn.bank.test"], "ports": [{"number": 443, "protocol": "TLS"},
        {"number": 4433, "protocol": "UDP"}], "principals": ["mesh.local/ns/shop/sa/web"]}},
    {"apiVersion": "mesh.pillion.dev/v1alpha1", "kind": "IdentityBudget", "metadata": {"name": "batch", "namespace": "shop"},
     "spec": {"principals": ["mesh.local/ns/shop/sa/batch"], "budgets": {"requestsPerSecond": 200, "descriptors": 2}}},
    {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r", "namespace": "shop"},
     "spec": {"parentRefs": [{"kind": "Service", "group": "", "name": "web", "port": 80}], "rules": [
         {"matches": [{"path": {"type": "RegularExpression", "value": "/a+"}, "headers": [{"name": "x", "value": "y"}]}],
          "backendRefs": [{"name": "web", "port": 80, "weight": 1}]}]}},
)  # fmt: skip


class Manifests(Target):
    name = "resources"
    tokens = (b"\xff", b"\xed\xa0\x80") + tuple(  # noqa: RUF005  # plainer so
        token.encode()
        for token in (
            "---\n", "...\n", "&a ", "*a", "!!python/object:os.system ", "!!binary ", "<<: ", "? ", "- ", ": ", "{", "}", "[",
                "]", "|\n", ">\n",
            "'", '"', "#", "\t", "%YAML 1.1\n", "null", "~", "yes", "0x10", "1e3", ".inf", ".nan", "2001-01-01", "1_000", "0o7",
                "é",
            "\u2028", "\ufeff", "\x85", "\x00", "\x07", "{" * 40, "[" * 40, "[" * 5000, "- " * 2000, "a: " * 50, "9" * 30,
                "\\ud800",
            "apiVersion: v1\n", "kind: Service\n", '"\\u0000"', "@", "`", "\U0010ffff",
        )
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.compared = {"accepted": 0, "as-json": 0}
        self.texts = [yaml.safe_dump(document, sort_keys=False) for document in DOCUMENTS]

    def generate(self, rng: Random) -> bytes:
        out = []
        for _ in range(1 + int(rng.random() ** 2 * 3)):
            document: object = DOCUMENTS[int(rng.random() * len(DOCUMENTS))]
            for _ in range(int(rng.random() * 3)):
                document = change(rng, document)
            if rng.random() < 0.5:
                out.append(
                    json.dumps(document, indent="\t" if rng.random() < 0.2 else None, ensure_ascii=rng.random() < 0.7) + "\n"
                )
                if rng.random() < 0.7:
                    break
            else:
                out.append(yaml.safe_dump(document, sort_keys=False, default_flow_style=rng.random() < 0.2, allow_unicode=True))
        return "---\n".join(out).encode("utf-8", "surrogatepass")

    def check(self, case: bytes, *, deep: bool = False) -> Hashable:  # noqa: ARG002  # of every target
        text = case.decode("utf-8", "surrogatepass" if len(case) % 2 else "replace") if _decodes(case) else case.decode("latin-1")
        try:
            loaded = resources.load(text, "fuzz")
        except resources.ResourceErrors as error:
            for one in error.errors:
                if not one.message or not one.remedy or one.line < 1:
                    raise Disagreement("pillion", "an error that helps nobody", repr(one)) from error
            return error.errors[0].message[:24]
        self.compared["accepted"] += 1
        again = resources.load(resources.dump_yaml(loaded))
        if [resources.dump(one) for one in again] != [resources.dump(one) for one in loaded]:
            raise Disagreement("pillion", "resources change when written again")
        self._as_json(text, loaded)
        try:
            wanted = compiler.needs(loaded, "mesh.local")
            allocations = compiler.Allocations(
                {name: 256 + n for n, name in enumerate(wanted.identities)},
                {name: 256 + n for n, name in enumerate(wanted.workloads)},
                {name: 256 + n for n, name in enumerate(wanted.services)},
                {name: (f"240.0.0.{n + 1}", f"fd50:494c::{n + 1:x}") for n, name in enumerate(wanted.services)},
                ("PEM",),
            )
            compiler.compile_state(loaded, allocations)
        except compiler.CompileError as error:
            return str(error)[:24]
        return tuple(sorted(one.key[0] for one in loaded))

    def _as_json(self, text: str, loaded: list[resources.Resource]) -> None:
        """What is JSON means what JSON says."""
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return
        self.compared["as-json"] += 1
        if not isinstance(value, dict) or len(loaded) != 1:
            raise Disagreement("json", "another document", text[:200])
        try:
            other = resources.dump(resources.from_dict(value))
        except resources.ResourceErrors as error:
            raise Disagreement("json", "refused when read as JSON", str(error)) from error
        if other != resources.dump(loaded[0]):
            raise Disagreement("json", "another resource", f"{other}, Pillion {resources.dump(loaded[0])}"[:1000])


def _no_constant(name: str) -> object:
    """Python's json takes Infinity and NaN, which JSON has not."""
    raise ValueError(name)


def _decodes(case: bytes) -> bool:
    try:
        case.decode("utf-8", "surrogatepass")
    except UnicodeError:
        return False
    return True
