import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.dataplane import (
    ANY_PORT,
    GROUP_DIRECT,
    NODE_NETNS,
    BackendEntry,
    BackendKey,
    Dest,
    DestKey,
    DestKind,
    Dial,
    Egress,
    KernelVerdict,
    PolicyKey,
    plan_egress,
    plan_node,
    rule_number,
)
from mesh.kinds import OUTBOUND_MAX
from mesh.link import LocalWorkload
from mesh.model import Action, Config, Identity, OutboundAllow, Protocol, Rule, Workload
from mesh.policy import Peer, PolicySet, Request, authorize
from mesh.snapshot import SnapshotError
from tests.mesh.build import compiled, policy, service, state, workload
from tests.mesh.shop import SHOP

STATE = compiled(SHOP)


def here(items, node="n1"):
    return [
        LocalWorkload(key, 1000 + index, 2000 + index)
        for index, key in enumerate(sorted(items))
        if getattr(items[key], "node", "") == node
    ]


def plan(items=STATE, node="n1"):
    return plan_node(items, node, here(items, node))


PLAN = plan()


def dest(address, port, protocol="tcp", of=PLAN):
    found = of.dests.get(DestKey(address, port, protocol))
    return found and found.kind


def test_an_l4_service_whose_endpoints_are_all_here_is_native():
    redis = STATE["Service/shop/redis"]
    for vip, address in zip(redis.vips, ("10.77.1.3", "fd77:1::3"), strict=True):
        found = PLAN.dests[DestKey(vip, 6379, "tcp")]
        assert (found.kind, found.backends) == (DestKind.NATIVE, 1)
        assert PLAN.backends[BackendKey(found.service, 6379, 0)] == BackendEntry(address, 6379, STATE["Workload/shop/redis-1"].id)


def test_every_backend_is_of_the_destinations_family_and_every_native_one_has_its_backends():
    for key, found in PLAN.dests.items():
        if found.kind is DestKind.NATIVE:
            assert found.backends > 0
            for slot in range(found.backends):
                assert (":" in PLAN.backends[BackendKey(found.service, key.port, slot)].address) == (":" in key.address)
    assert len(PLAN.backends) == sum(found.backends for found in PLAN.dests.values())


def test_http_and_unknown_protocols_go_through_the_proxy():
    assert dest("240.0.0.3", 80) is DestKind.PROXY
    assert dest("10.77.1.2", 8080) is DestKind.PROXY
    assert PLAN.dests[DestKey("240.0.0.3", 80, "tcp")].service == STATE["Service/shop/web"].id
    here = plan(node="n3")
    assert dest("240.0.0.1", 7000, of=here) is DestKind.NATIVE
    assert dest("240.0.0.1", 7001, of=here) is DestKind.PROXY  # to be learned


def test_endpoints_elsewhere_go_through_the_proxy_and_udp_not_at_all():
    there = plan(node="n2")
    assert dest("240.0.0.2", 6379, of=there) is DestKind.PROXY
    assert there.dests[DestKey("240.0.0.2", 8125, "udp")] == Dest(
        DestKind.DENY, STATE["Service/shop/redis"].id, reason="udp_remote"
    )
    assert there.dests[DestKey("10.77.1.3", 8125, "udp")].reason == "udp_remote"
    assert dest("240.0.0.2", 8125, "udp") is DestKind.NATIVE


def test_a_workloads_own_address():
    found = PLAN.dests[DestKey("10.77.1.3", 6379, "tcp")]
    number = STATE["Workload/shop/redis-1"].id
    assert (found.kind, found.service, found.backends) == (DestKind.NATIVE, GROUP_DIRECT | number, 1)
    assert PLAN.dests[DestKey("10.77.1.3", ANY_PORT, "tcp")] == Dest(DestKind.DENY, reason="port_undeclared")
    assert PLAN.dests[DestKey("10.77.2.2", ANY_PORT, "udp")].reason == "port_undeclared"


@pytest.mark.parametrize("rule", ["to: [{operation: {paths: [/x]}}]", "from: [{source: {ipBlocks: [10.0.0.0/8]}}]"])
@pytest.mark.parametrize("action", ["DENY", "ALLOW", "AUDIT"])
def test_a_rule_the_kernel_can_not_decide_moves_the_port_to_the_proxy(rule, action):
    text = SHOP + (
        "---\napiVersion: mesh.pillion.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: more, namespace: shop}\n"
        f"spec: {{action: {action}, selector: {{matchLabels: {{app: redis}}}}, rules: [{{{rule}}}]}}\n"
    )
    found = plan(compiled(text))
    assert dest("240.0.0.2", 6379, of=found) is DestKind.PROXY
    assert dest("10.77.1.3", 6379, of=found) is DestKind.PROXY


def test_a_service_nobody_is_behind():
    items = state(service("empty", protocol=Protocol.TCP, number=500), service("web", number=501))
    found = plan_node(items, "n1", ())
    assert found.dests[DestKey("240.0.0.1", 80, "tcp")] == Dest(DestKind.DENY, 500, reason="no_backend")
    assert found.dests[DestKey("240.0.0.2", 80, "tcp")].kind is DestKind.PROXY  # answers 503


def test_verdicts():
    redis, web = STATE["Workload/shop/redis-1"], STATE["Workload/shop/web-1"]
    entry = PLAN.policy[PolicyKey(redis.id, web.identity, 6379, "tcp")]
    assert (entry.verdict, PLAN.rules[entry.rule]) == (KernelVerdict.ALLOW, "shop/redis#0")
    batch = STATE["Workload/jobs/batch-1"]
    assert PLAN.policy[PolicyKey(web.id, batch.identity, 8080, "tcp")].verdict is KernelVerdict.L7
    assert PolicyKey(redis.id, batch.identity, 6379, "tcp") not in PLAN.policy


def test_unknown_peers_have_verdicts_under_permissive_only():
    open_to_all = compiled(SHOP.replace("rules: [{from: [{source: {principals: [mesh.local/ns/shop/sa/web]}}]}]", "rules: [{}]"))
    found = plan(open_to_all)
    redis, web = open_to_all["Workload/shop/redis-1"], open_to_all["Workload/shop/web-1"]
    assert found.policy[PolicyKey(redis.id, 0, 6379, "tcp")].verdict is KernelVerdict.ALLOW
    assert not [key for key in found.policy if key.workload == web.id and key.identity == 0]
    assert {member.permissive for member in found.members.values() if member.workload == redis.id} == {True}


@given(st.permutations(["shop/web", "shop/redis", "pillion-system/no-evil"]), st.integers(0, 3), st.booleans())
def test_the_table_says_what_authorize_says(names, count, open_mesh):
    items = {key: item for key, item in STATE.items() if key not in {f"Policy/{name}" for name in names[:count]}}
    if open_mesh:
        items["Config//mesh"] = Config("mesh.local", default_action=Action.ALLOW)
    policies = PolicySet(items)
    for node in ("n1", "n2", "n3", "n4"):
        found = plan(items, node)
        for local in here(items, node):
            target = items[local.key]
            for identity in (item for item in items.values() if isinstance(item, Identity)):
                for port in target.ports:
                    verdict = authorize(policies, Peer(identity.spiffe, identity.id), local.key, Request(port))
                    protocol = "udp" if port == 8125 else "tcp"
                    entry = found.policy.get(PolicyKey(target.id, identity.id, port, protocol))
                    expected = "allow" if verdict.allowed else "l7" if verdict.needs_l7 else None
                    assert (entry and entry.verdict) == expected
                    assert entry is None or entry.rule == rule_number(verdict.rule)


def test_nobody_the_controller_placed_elsewhere_has_a_part():
    found = plan_node(STATE, "n1", [LocalWorkload("Workload/shop/web-2", 1, 2), LocalWorkload("Workload/shop/none", 3, 4)])
    assert (found.members, found.policy, found.dials) == ({}, {}, frozenset())


def test_the_proxy_dials_what_policy_could_allow_and_nothing_else():
    netns = {local.key: local.netns for local in here(STATE)}
    web, redis = netns["Workload/shop/web-1"], netns["Workload/shop/redis-1"]
    own = {
        Dial(web, "10.77.1.2", 8080),
        Dial(web, "fd77:1::2", 8080),
        Dial(redis, "10.77.1.3", 6379),
        Dial(redis, "fd77:1::3", 6379),
    }
    resolver = Dial(NODE_NETNS, "192.0.2.53", 53)  # workloads have no way there
    assert own | {resolver} == PLAN.dials  # web and redis may call nobody elsewhere
    batch = plan(node="n3")
    assert {(dial.address, dial.port) for dial in batch.dials if dial.port == 15008} == {
        (address, 15008) for key in ("web-1", "web-2") for address in STATE[f"Workload/shop/{key}"].addresses
    }


class TestEgress:
    def config(self, *ranges):
        return Config("mesh.local", outbound_allow=tuple(OutboundAllow(cidr, ports) for cidr, ports in ranges))

    def test_a_narrower_range_keeps_what_the_wider_allows(self):
        assert PLAN.egress == {"192.0.2.0/24": Egress(True, (443,)), "192.0.2.7/32": Egress(True, (80, 443))}
        assert plan_egress(self.config(("10.0.0.0/8", ()), ("10.1.0.0/16", (80,)))) == {
            "10.0.0.0/8": Egress(True),
            "10.1.0.0/16": Egress(True),
        }

    def test_one_range_twice_adds_up(self):
        assert plan_egress(self.config(("10.0.0.0/8", (80,)), ("10.0.0.0/8", (81,)))) == {"10.0.0.0/8": Egress(True, (80, 81))}

    def test_the_families_do_not_mix(self):
        assert plan_egress(self.config(("::/0", (80,)), ("10.0.0.0/8", (81,))))["10.0.0.0/8"] == Egress(True, (81,))

    def test_an_open_mesh_is_not_narrowed(self):
        config = Config("mesh.local", outbound=Action.ALLOW, outbound_allow=(OutboundAllow("10.0.0.0/8", (80,)),))
        assert plan_egress(config) == {}

    def test_all_of_ipv6_is_not_ipv4(self):
        assert plan_egress(self.config(("::/0", ()))) == {"::/0": Egress(True), "0.0.0.0/0": Egress(False)}
        assert plan_egress(self.config(("::/0", ()), ("0.0.0.0/0", (80,))))["0.0.0.0/0"] == Egress(True, (80,))

    def test_never_more_than_asked_for(self):
        found = plan_egress(self.config(("10.0.0.0/8", tuple(range(1, 9))), ("10.1.0.0/16", tuple(range(5, 13)))))
        assert found["10.1.0.0/16"] == Egress(True, tuple(range(1, 9)))

    def test_as_many_ranges_as_may_be_are_planned_in_a_moment(self):
        many = [(f"10.{n >> 2}.{(n & 3) << 6}.0/{18 + n % 2}", (443,)) for n in range(OUTBOUND_MAX - 2)]
        start = time.process_time()
        found = plan_egress(self.config(("10.0.0.0/8", (80,)), ("10.128.0.0/9", ()), *many))
        assert time.process_time() - start < 0.5
        assert found["10.1.0.0/18"] == Egress(True, (80, 443)) and found["10.200.0.0/18"] == Egress(True)


def test_without_a_config_there_is_no_plan():
    with pytest.raises(SnapshotError):
        plan_node({}, "n1", ())


def test_a_thousand_policies_and_replicas_are_planned_in_a_moment():
    items = state(
        service("web", protocol=Protocol.TCP, endpoints=tuple(f"Workload/shop/web-{n}" for n in range(50))),
        *(Identity(1000 + n, f"spiffe://mesh.local/ns/shop/sa/c{n}") for n in range(2000)),
        *(workload(f"web-{n}", number=400 + n) for n in range(50)),
        *(policy(f"p{n}", Action.DENY, Rule(), selector={"app": f"other-{n}"}) for n in range(1000)),
    )
    items["Config//mesh"] = Config("mesh.local", default_action=Action.ALLOW)
    found = plan_node(items, "n1", [LocalWorkload(key, n, n) for n, key in enumerate(items) if isinstance(items[key], Workload)])
    assert len(found.policy) == 50 * 2000
