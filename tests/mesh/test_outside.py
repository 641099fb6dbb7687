"""ServiceEntries: what operators write, who gets what, which nodes hear of it."""

from __future__ import annotations

import pytest

from mesh.compile import Allocations, compile_state, needs, reachable
from mesh.dataplane import plan_node, rule_number
from mesh.link import LocalWorkload
from mesh.model import CONFIG_KEY, Config, ServiceEntry, State, Workload
from mesh.outside import GRANT_S_MAX, GRANT_S_MIN, WayOut, WaysOut, grant_s, outside
from mesh.resources import ResourceErrors, load
from tests.mesh.shop import SHOP

ENTRY = """---
apiVersion: mesh.pillion.dev/v1alpha1
kind: ServiceEntry
metadata: {name: bank, namespace: shop}
spec:
  hosts: [API.bank.example., "*.cdn.example"]
  ports: [{number: 443, protocol: TLS}, {number: 443, protocol: UDP}, {number: 443}]
  principals: ["mesh.local/ns/shop/sa/web"]
"""
WEB, REDIS, BATCH = (f"spiffe://mesh.local/ns/{name}" for name in ("shop/sa/web", "shop/sa/redis", "jobs/sa/batch"))


def compiled(text: str) -> State:
    resources = load(text)
    found = needs(resources, "mesh.local")
    numbers = {
        kind: {key: 256 + index for index, key in enumerate(getattr(found, kind))}
        for kind in ("identities", "workloads", "services")
    }
    return compile_state(resources, Allocations(**numbers))


def test_from_yaml_to_the_plan_of_the_node_that_needs_it() -> None:
    state = compiled(SHOP + ENTRY)
    entry = ServiceEntry(
        "bank", "shop", ("*.cdn.example", "api.bank.example"), ((443, "tcp"), (443, "udp")), ("mesh.local/ns/shop/sa/web",)
    )
    assert state["ServiceEntry/shop/bank"] == entry
    assert [node for node in ("n1", "n2", "n3", "n4") if "ServiceEntry/shop/bank" in reachable(state, node)] == ["n1", "n2"]
    web = state["Workload/shop/web-1"]
    assert isinstance(web, Workload)
    local = [LocalWorkload("Workload/shop/web-1", 7, 70), LocalWorkload("Workload/shop/redis-1", 8, 80)]
    plan = plan_node(reachable(state, "n1"), "n1", local)
    rules = ("shop/bank#*.cdn.example", "shop/bank#api.bank.example")
    assert plan.ways_out == {web.id: tuple(WayOut(rule, rule.partition("#")[2], entry.ports) for rule in rules)}
    assert {number: plan.rules[number] for number in map(rule_number, rules)} == {rule_number(rule): rule for rule in rules}


def test_whose_it_is() -> None:
    def entry(name: str, namespace: str, *principals: str) -> ServiceEntry:
        return ServiceEntry(name, namespace, (f"{name}.example",), ((443, "tcp"),), principals)

    items = (
        entry("all", "shop"),
        entry("web", "shop", "*/sa/web"),
        entry("foreign", "jobs", "mesh.local/ns/shop/sa/web"),
        entry("mesh", "root"),
        entry("some", "root", "mesh.local/ns/jobs/*"),
    )
    state: State = {f"ServiceEntry/{item.namespace}/{item.name}": item for item in items}
    ways = WaysOut({**state, CONFIG_KEY: Config(trust_domain="mesh.local", root_namespace="root")})
    found = {spiffe: {way.host.partition(".")[0] for way in ways.of(spiffe)} for spiffe in (WEB, REDIS, BATCH, "", "junk")}
    assert found == {
        WEB: {"mesh", "all", "web"}, REDIS: {"mesh", "all"}, BATCH: {"mesh", "some"}, "": set(), "junk": set()
    }  # fmt: skip
    assert ways and not WaysOut({})


@pytest.mark.parametrize(
    ("host", "name", "is_named"),
    [
        ("api.example.com", "api.example.com", True),
        ("api.example.com", "xapi.example.com", False),
        ("api.example.com", "api.example.com.evil.test", False),
        ("*.example.com", "api.example.com", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "evilexample.com", False),
    ],
)
def test_names(host: str, name: str, is_named: bool) -> None:
    assert WayOut("r", host, ()).names(name) is is_named


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("*.cdn.example", "*", "spec.hosts[1]"),
        ("*.cdn.example", "*.com", "spec.hosts[1]"),
        ("*.cdn.example", "a.*.example", "spec.hosts[1]"),
        ("*.cdn.example", "93.184.215.14", "spec.hosts[1]"),
        ("*.cdn.example", "2606::14", "spec.hosts[1]"),
        ("*.cdn.example", "web.shop.mesh", "spec.hosts[1]"),
        ("*.cdn.example", "localhost", "spec.hosts[1]"),
        ("number: 443}", "number: 53}", "spec.ports[2]"),
        ("number: 443}", "number: 15008}", "spec.ports[2]"),
        ("number: 443}", "number: 0}", "spec.ports[2].number"),
        ("protocol: UDP", "protocol: SCTP", "spec.ports[1].protocol"),
        ("mesh.local/ns/shop/sa/web", "spiffe://x", "spec.principals[0]"),
    ],
)
def test_what_is_no_entry(old: str, new: str, field: str) -> None:
    with pytest.raises(ResourceErrors) as caught:
        load(ENTRY.replace(old, new))
    assert [error.field for error in caught.value.errors] == [field]
    assert caught.value.errors[0].remedy


def test_for_how_long() -> None:
    assert [grant_s(ttl) for ttl in (0, 50, 1e12)] == [GRANT_S_MIN, 60, GRANT_S_MAX]


def test_outside() -> None:
    assert all(map(outside, ("93.184.215.14", "2606:2800::14", "::ffff:93.184.215.14", "64:ff9b::5db8:d70e")))
    with pytest.raises(ValueError, match="does not appear"):
        outside("api.example.com")


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1", "127.0.0.1", "169.254.169.254", "100.64.0.1", "192.0.0.10", "240.0.0.1", "224.0.0.1", "0.0.0.0",
        "255.255.255.255", "::", "::1", "::7f00:1", "::a9fe:a9fe", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::", "fe80::1", "fec0::1", "fd50:494c::1", "fc00::1", "ff02::1", "100::1",
        "5f00::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_what_is_not_outside(address: str) -> None:
    assert not outside(address)
