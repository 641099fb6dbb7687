"""The operator API: applying is all or nothing, errors are a person's, numbers are never given twice."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import pytest

from controller.server import BODY_BYTES_MAX
from tests.controller.rig import SHOP, Client, Controller, csr_for, new_key, pem_of

ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: split, namespace: shop}
spec:
  parentRefs: [{kind: Service, name: web}]
  rules:
  - backendRefs: [{name: %s, port: %d}]
"""
POLICY = """
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: only, namespace: shop}
spec: {targetRefs: [{kind: Service, name: nothing}], rules: [{}]}
"""
GRANT = SHOP.split("---")[0]
WORKLOAD = """
apiVersion: mesh.pillion.dev/v1alpha1
kind: Workload
metadata: {name: %s, namespace: shop, labels: {app: web}}
spec: {node: n1, serviceAccount: %s, addresses: [%s]}
"""


async def everything(operator: Client) -> Any:
    return await operator.ok("GET", "/v1/resources"), await operator.ok("GET", "/v1/state")


async def test_apply_says_what_it_did(controller: Controller) -> None:
    async with controller.operator() as operator:
        first = await operator.ok("POST", "/v1/apply", SHOP)
        assert [result["result"] for result in first["results"]] == ["created"] * 3
        again = await operator.ok("POST", "/v1/apply", SHOP)
        assert [result["result"] for result in again["results"]] == ["unchanged"] * 3
        assert again["revision"] == first["revision"]
        changed = await operator.ok("POST", "/v1/apply", SHOP.replace("8080", "8081"))
        assert [result["result"] for result in changed["results"]] == ["unchanged", "configured", "unchanged"]
        assert changed["revision"] > first["revision"]
        items = (await operator.ok("GET", "/v1/resources?kind=Service&namespace=shop&name=web"))["items"]
        assert items[0]["spec"]["ports"][0]["targetPort"] == 8081
        await operator.ok("GET", f"/v1/wait?revision={changed['revision']}&timeout=5")
        state = await operator.ok("GET", "/v1/state")
        assert state["revision"] == changed["revision"]


async def test_a_dry_run_says_the_same_and_writes_nothing(controller: Controller) -> None:
    """On what is new, on what stands, and on a grant that would go; and a mistake is one in both."""
    dry, narrower = "/v1/apply/dry-run", SHOP.replace(", shop/pay", "")
    async with controller.operator() as operator:
        for text in (SHOP, SHOP, SHOP.replace("8080", "8081"), narrower):
            before = await everything(operator)
            said = await operator.ok("POST", dry, text)
            assert said["revision"] == before[0]["revision"] and await everything(operator) == before
            done = await operator.ok("POST", "/v1/apply", text)
            assert said["results"] == done["results"]
            await operator.ok("GET", f"/v1/wait?revision={done['revision']}&timeout=5")
        for wrong in (SHOP + "---" + ROUTE % ("gone", 80), SHOP.replace("kind: Service", "kind: Servce"), ""):
            refused = await operator.call("POST", dry, wrong)
            assert refused[0] == 400 and refused == await operator.call("POST", "/v1/apply", wrong)
        both = "---".join([SHOP, WORKLOAD % ("a", "web", "10.0.0.9"), WORKLOAD % ("b", "web", "10.0.0.9")])
        assert "10.0.0.9" in (await operator.call("POST", dry, both))[1]["errors"][0]["message"]


MESH = """
apiVersion: mesh.pillion.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {trustDomain: x.y}
"""
NARROW = """
apiVersion: mesh.pillion.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec:
  outboundAllow:
  - {cidr: 10.0.0.0/8, ports: [1, 2, 3, 4, 5, 6, 7, 8]}
  - {cidr: 192.0.2.0/24, ports: [443]}
  - {cidr: 10.1.0.0/16, ports: [9]}
"""


@pytest.mark.parametrize(
    ("text", "field", "at"),
    [
        (SHOP + "---" + ROUTE % ("gone", 80), "spec.rules[0].backendRefs[0].name", "backendRefs"),
        (SHOP + "---" + ROUTE % ("web", 81), "spec.rules[0].backendRefs[0].port", "backendRefs"),
        (SHOP + "---" + POLICY, "spec.targetRefs[0].name", "targetRefs"),
        (SHOP + "---" + WORKLOAD % ("w", "root", "10.0.0.9"), "spec.serviceAccount", "serviceAccount: root"),
        (SHOP + "---" + WORKLOAD % ("w", "web", "240.0.0.9"), "spec.addresses[0]", "addresses"),
        (SHOP.replace("port: 80,", "port: 99999,"), "spec.ports[0].port", "99999"),
        (SHOP.replace("kind: Service", "kind: Servce"), "kind", "Servce"),
        (SHOP + "---\nkind: {", "", "kind: {"),
        (SHOP + "---" + MESH, "spec.trustDomain", "trustDomain"),
        (SHOP + "---" + NARROW, "spec.outboundAllow[2]", "10.1.0.0/16"),
    ],
)
async def test_bad_input_changes_nothing(shared: Controller, text: str, field: str, at: str) -> None:
    async with shared.operator() as operator:
        before = await everything(operator)
        status, answer = await operator.call("POST", "/v1/apply?filename=shop.yaml", text)
        assert status == 400
        error = answer["errors"][0]
        assert (error["file"], error["field"]) == ("shop.yaml", field), answer
        assert abs(error["line"] - text[: text.rindex(at)].count("\n") - 1) <= (1 if not field else 0), answer
        assert error["message"] and error["remedy"], answer
        assert await everything(operator) == before


async def test_an_empty_text_is_an_error(shared: Controller) -> None:
    async with shared.operator() as operator:
        assert (await operator.call("POST", "/v1/apply", ""))[0] == 400


async def test_two_workloads_on_one_port_are_refused(controller: Controller) -> None:
    async with controller.operator() as operator:
        text = "---".join([SHOP, WORKLOAD % ("a", "web", "10.0.0.9"), WORKLOAD % ("b", "web", "10.0.0.9")])
        status, answer = await operator.call("POST", "/v1/apply", text)
        assert status == 400 and "10.0.0.9" in answer["errors"][0]["message"]
        assert (await operator.ok("GET", "/v1/resources"))["items"] == []


async def test_what_is_named_can_not_go(controller: Controller) -> None:
    async with controller.operator() as operator:
        await operator.ok("POST", "/v1/apply", SHOP + "---" + ROUTE % ("web", 80))
        status, answer = await operator.call("DELETE", "/v1/resources/Service/shop/web")
        assert status == 409 and "HTTPRoute/shop/split" in answer["error"]
        status, answer = await operator.call("POST", "/v1/apply", SHOP.split("---")[1].replace("port: 80,", "port: 81,"))
        assert status == 400 and "HTTPRoute/shop/split" in answer["errors"][0]["message"]
        await operator.ok("DELETE", "/v1/resources/HTTPRoute/shop/split")
        await operator.ok("DELETE", "/v1/resources/Service/shop/web")
        assert (await operator.call("DELETE", "/v1/resources/Service/shop/web"))[0] == 404


async def test_numbers_are_never_given_twice(controller: Controller) -> None:
    async def ids() -> dict[str, int]:
        async with controller.operator() as operator:
            return {item["spiffe"]: item["id"] for item in (await operator.ok("GET", "/v1/identities"))["items"]}

    async def replace(account: str) -> dict[str, int]:
        async with controller.operator() as operator:
            await operator.ok("POST", "/v1/apply", WORKLOAD % ("w", account, "10.0.0.9"))
            return await ids()

    async with controller.operator() as operator:
        await operator.ok("POST", "/v1/apply", SHOP)
    assert await replace("web") == {"spiffe://mesh.local/ns/shop/sa/web": 256}
    assert await replace("pay") == {"spiffe://mesh.local/ns/shop/sa/pay": 257}
    async with controller.operator() as operator:
        await operator.ok("DELETE", "/v1/resources/Workload/shop/w")
    assert await ids() == {}
    controller.kill()
    controller.start()
    assert await replace("web") == {"spiffe://mesh.local/ns/shop/sa/web": 258}
    async with controller.operator() as operator:
        await operator.ok("GET", "/v1/wait?timeout=5")
        state = await operator.ok("GET", "/v1/state")
    assert state["items"]["Workload/shop/w"]["id"] == 257  # of its own counter: 256 was the one that went


@pytest.mark.parametrize("query", ["revision=x", "timeout=-1", "timeout=nan", "timeout=1e9", "revision=100000"])
async def test_wait_refuses_nonsense(shared: Controller, query: str) -> None:
    async with shared.operator() as operator:
        status, answer = await operator.call("GET", f"/v1/wait?{query}")
        assert status == 400 and answer["error"]


async def test_limits_of_requests(shared: Controller) -> None:
    async with shared.operator() as operator:
        assert (await operator.call("POST", "/v1/apply", "#" * (BODY_BYTES_MAX + 1)))[0] == 413
        assert (await operator.call("GET", "/nowhere"))[0] in (401, 404)
        assert (await operator.call("PATCH", "/v1/status"))[0] == 405
        assert (await operator.call("POST", "/v1/apply", "a: &x [*x, *x]"))[0] == 400
        assert (await operator.call("POST", "/v1/nodes/UPPER/token"))[0] == 400
        assert (await operator.call("POST", "/v1/nodes/n1/token", {"ttl_s": "1"}))[0] == 400


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_no_answer_tells_what_serves_it(shared: Controller) -> None:
    async with shared.client() as nobody:
        for path in ("/v1/status", "/nowhere"):
            async with nobody.session.get(shared.url + path, ssl=shared.context()) as answer:
                assert answer.headers["Server"] == "pillion"


async def test_old_tls_is_refused(shared: Controller) -> None:
    def dial(maximum: ssl.TLSVersion) -> str | None:
        context = shared.context()
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = maximum
        context.set_ciphers("ALL:@SECLEVEL=0")
        with (
            socket.create_connection(("127.0.0.1", shared.port), 5) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as secure,
        ):
            return secure.version()

    assert await asyncio.to_thread(dial, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert await asyncio.to_thread(dial, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises(ssl.SSLError):
        await asyncio.to_thread(dial, ssl.TLSVersion.TLSv1_1)


async def test_an_operator_may_bring_a_key_of_their_own(controller: Controller) -> None:
    key = new_key()
    async with controller.operator() as root:
        assert (await root.call("POST", "/v1/operators/ann"))[0] == 400  # nobody makes it for them
        made = await root.ok("POST", "/v1/operators/ann", {"csr": csr_for(key)})
        assert "key" not in made
    async with controller.client(made["chain"], pem_of(key)) as ann:
        assert (await ann.ok("GET", "/v1/status"))["trust_domain"] == "mesh.local"
