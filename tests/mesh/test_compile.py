import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import compile as compiler
from mesh import resources
from mesh.compile import Allocations, CompileError, Reach, compile_state, needs, reachable
from mesh.kinds import ServicePortSpec
from mesh.model import CONFIG_KEY, Action, DnsForward, Policy, Protocol, TlsMode
from mesh.policy import Peer, PolicySet, Request, authorize
from tests.mesh.build import TD, compiled, spiffe
from tests.mesh.shop import SHOP

STATE = compiled(SHOP)


def test_what_wants_a_number():
    wanted = needs(resources.load(SHOP), TD)
    assert wanted.services == ("Service/jobs/batch", "Service/shop/redis", "Service/shop/web")
    assert spiffe("shop", "web") in wanted.identities
    assert len(wanted.identities) == 4
    assert len(wanted.workloads) == 5


def test_a_service_knows_its_endpoints_and_they_their_ports():
    web = STATE["Service/shop/web"]
    assert web.endpoints == ("Workload/shop/web-1", "Workload/shop/web-2")
    assert web.vips == ("240.0.0.3", "fd50:494c::3")
    assert web.add_headers == ("traceparent", "x-request-id")
    assert (web.ports[0].port, web.ports[0].target_port, web.ports[0].protocol) == (80, 8080, Protocol.HTTP)
    assert STATE["Workload/shop/web-1"].ports == (8080,)
    assert STATE["Workload/shop/redis-1"].ports == (6379, 8125)
    assert STATE["Workload/evil/intruder"].ports == ()


GUARDED = """
---
apiVersion: v1
kind: Service
metadata: {name: guarded, namespace: shop}
spec: {selector: {app: web}, serviceAccounts: [%s], ports: [{port: 80, targetPort: 9090}]}
"""


def test_a_service_may_say_whose_workloads_are_behind_it():
    """By labels alone a node that was taken over puts its own there: it says them, and is granted accounts."""
    state = compiled(SHOP + GUARDED % "redis, web")
    assert state["Service/shop/guarded"].endpoints == ("Workload/shop/web-1", "Workload/shop/web-2")
    state = compiled(SHOP + GUARDED % "redis")
    assert state["Service/shop/guarded"].endpoints == ()
    assert 9090 not in state["Workload/shop/web-1"].ports


def test_every_workload_has_its_identity():
    web = STATE["Workload/shop/web-1"]
    assert STATE[f"Identity//{web.spiffe}"].id == web.identity
    assert STATE["Workload/shop/web-2"].identity == web.identity


@pytest.mark.parametrize(
    ("fields", "protocol"),
    [
        ({"appProtocol": "http"}, Protocol.HTTP),
        ({"appProtocol": "HTTP"}, Protocol.HTTP),
        ({"appProtocol": "redis", "name": "http"}, Protocol.TCP),
        ({"name": "http-metrics"}, Protocol.HTTP),
        ({"name": "mysql"}, Protocol.TCP),
        ({"name": "httpx"}, Protocol.AUTO),
        ({"name": "main"}, Protocol.AUTO),
        ({"protocol": "UDP", "name": "http"}, Protocol.UDP),
        ({}, Protocol.AUTO),
    ],
)
def test_what_a_port_speaks(fields, protocol):
    assert compiler.protocol(ServicePortSpec.model_validate({"port": 80, **fields})) is protocol


def test_peer_authentication_of_the_workload_before_namespace_before_mesh():
    def mode(*entries):
        text = SHOP
        for name, namespace, spec in entries:
            text += (
                "---\napiVersion: mesh.pillion.dev/v1alpha1\nkind: PeerAuthentication\n"
                f"metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
            )
        return compiled(text)["Workload/shop/web-1"].tls

    everywhere = ("all", "pillion-system", "{mtls: {mode: PERMISSIVE}}")
    namespace = ("ns", "shop", "{mtls: {mode: STRICT}}")
    own = ("own", "shop", "{selector: {matchLabels: {app: web}}, mtls: {mode: PERMISSIVE}}")
    other = ("other", "shop", "{selector: {matchLabels: {app: db}}, mtls: {mode: PERMISSIVE}}")
    assert mode() is TlsMode.STRICT
    assert mode(everywhere) is TlsMode.PERMISSIVE
    assert mode(everywhere, namespace) is TlsMode.STRICT
    assert mode(everywhere, namespace, own) is TlsMode.PERMISSIVE
    assert mode(other) is TlsMode.STRICT
    assert STATE["Workload/shop/redis-1"].tls is TlsMode.PERMISSIVE


def test_policies():
    assert STATE["Policy/pillion-system/no-evil"].every_namespace
    assert STATE["Policy/shop/redis"].services == ("Service/shop/redis",)
    text = SHOP.replace("spec:\n  selector: {matchLabels: {app: web}}\n  rules", "spec:\n  mode: audit\n  action: DENY\n  rules")
    audited = compiled(text)["Policy/shop/web"]
    assert (audited.action, audited.dry_run, audited.selector) == (Action.AUDIT, Action.DENY, {})


def test_the_order_of_resources_does_not_matter():
    loaded = resources.load(SHOP)
    wanted = needs(loaded, TD)
    numbers = Allocations(
        *(
            {name: 256 + index for index, name in enumerate(names)}
            for names in (wanted.identities, wanted.workloads, wanted.services)
        )
    )
    assert compile_state(loaded, numbers) == compile_state(loaded[::-1], numbers)


def test_a_missing_number_is_the_controllers_fault():
    with pytest.raises(CompileError, match="no number"):
        compile_state(resources.load(SHOP), Allocations())


def test_another_trust_domain_is_refused():
    with pytest.raises(CompileError, match="runs mesh"):
        compiled(SHOP.replace("  dnsUpstreams", "  trustDomain: other.local\n  dnsUpstreams"))


def test_who_may_ask_which_names_outside():
    rules = '  dnsForward: ["*.Example.com", {names: [api.pay.test], principals: ["mesh.local/ns/shop/sa/web"]}]\n'
    config = compiled(SHOP.replace("  dnsUpstreams", rules + "  dnsUpstreams"))[CONFIG_KEY]
    assert config.dns_forward == (
        DnsForward(("*.example.com",)),
        DnsForward(("api.pay.test",), ("mesh.local/ns/shop/sa/web",)),
    )


def test_two_workloads_may_share_an_address_but_not_a_port():
    shared = SHOP.replace("10.77.1.3", "10.77.1.2").replace("fd77:1::3", "fd77:1::2")
    assert compiled(shared)
    with pytest.raises(CompileError, match=r"both claim 10\.77\.1\.2 port 8080"):
        compiled(shared.replace("port: 6379", "port: 6379, targetPort: 8080"))


class TestReach:
    def test_a_node_gets_its_part(self):
        assert sorted(reachable(STATE, "n4")) == [
            "Config//mesh",
            f"Identity//{spiffe('evil', 'intruder')}",
            f"Identity//{spiffe('jobs', 'batch')}",
            "Policy/pillion-system/no-evil",
            "Service/jobs/batch",  # denied by a named rule, which can so be named
            "Workload/evil/intruder",
            "Workload/jobs/batch-1",
        ]
        part = reachable(STATE, "n1")
        assert "Workload/jobs/batch-1" in part  # may call web
        assert "Workload/evil/intruder" not in part
        assert reachable(STATE, "n9") == {"Config//mesh": STATE["Config//mesh"]}

    def test_a_route_leads_to_its_backends(self):
        text = SHOP.replace("backendRefs: [{name: web, port: 80}]", "backendRefs: [{name: redis, port: 6379}]")
        part = reachable(compiled(text), "n3")
        assert {"Route/shop/web", "Service/shop/redis", "Workload/shop/redis-1", "Policy/shop/redis"} <= part.keys()

    @given(
        st.sets(st.sampled_from(sorted(key for key in STATE if key.startswith("Policy/")))),
        st.sampled_from([Action.ALLOW, Action.DENY]),
    )
    def test_a_node_decides_as_the_whole_mesh_would(self, dropped, default):
        whole = {key: item for key, item in STATE.items() if key not in dropped}
        text = (
            SHOP
            if default is Action.DENY
            else SHOP.replace("spec:\n  outboundAllow", "spec:\n  defaultAction: ALLOW\n  outboundAllow")
        )
        whole["Config//mesh"] = compiled(text)["Config//mesh"]
        reach, everything = Reach(whole), PolicySet(whole)
        for node in reach.nodes():
            part = reach.of(node)
            policies = PolicySet(part)
            sources = [item for item in whole.values() if getattr(item, "node", None) == node]
            for key, target in part.items():
                local = getattr(target, "node", None) == node
                for port in getattr(target, "ports", ()) if key.startswith("Workload/") else ():
                    peers = [item for item in whole.values() if hasattr(item, "node")] if local else sources
                    for peer in peers:
                        asked = Peer(peer.spiffe, peer.identity, peer.addresses[0])
                        for request in (Request(port), Request(port, "GET", "/api/x")):
                            expected = authorize(everything, asked, key, request)
                            assert authorize(policies, asked, key, request) == expected
                        # whoever may come in is known, or its claimed address could not be checked
                        if local and authorize(everything, asked, key, Request(port, "GET", "/api/x")).allowed:
                            assert f"Workload/{peer.namespace}/{peer.name}" in part

    def test_every_policy_of_a_kept_destination_is_kept(self):
        part = reachable(STATE, "n3")
        assert {key for key, item in part.items() if isinstance(item, Policy)} >= {
            "Policy/shop/web",
            "Policy/pillion-system/no-evil",
        }


def test_express_is_chosen_for_the_mesh_a_service_and_a_workload():
    keys = (CONFIG_KEY, "Service/shop/web", "Workload/shop/web-1")
    off = {"mesh", "web", "web-1"}

    def switched(data):
        chosen = data["kind"] in ("MeshConfig", "Service", "Workload") and data["metadata"]["name"] in off
        return {**data, "spec": {**data["spec"], "express": "off"}} if chosen else data

    every = [resources.from_dict(switched(resources.dump(resource))) for resource in resources.load(SHOP)]
    state = compiled(resources.dump_yaml(every))
    assert [STATE[key].express for key in keys] == ["auto"] * 3
    assert [state[key].express for key in keys] == ["off"] * 3
    assert [state[key].express for key in ("Service/shop/redis", "Workload/shop/web-2")] == ["auto"] * 2
