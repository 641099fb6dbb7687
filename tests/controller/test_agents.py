"""Joining, signing and registering, over TLS against a real process."""

from __future__ import annotations

import asyncio
import ssl
import time

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from tests.controller.rig import SHOP, Client, Controller, csr_for, eventually, new_key, pem_of

WEB = {"service_account": "web", "addresses": ["10.0.1.1"], "labels": {"app": "web"}}


async def join(
    client: Client, node: str, secret: str, key: ec.EllipticCurvePrivateKey | None = None
) -> tuple[int, dict[str, str]]:
    return await client.call("POST", "/v1/join", {"node": node, "secret": secret, "csr": csr_for(key or new_key())})


async def refusals(controller: Controller) -> str:
    async with controller.operator() as operator:
        return str(await operator.ok("GET", "/metrics"))


async def test_a_token_joins_its_node_once(controller: Controller) -> None:
    token, key = await controller.token("n1"), new_key()
    async with controller.client() as client:
        status, answer = await join(client, "n2", token["secret"])
        assert (status, answer["reason"]) == (403, "token_wrong_node")
        status, answer = await join(client, "n1", token["secret"], key)
        assert status == 200
        assert "BEGIN CERTIFICATE" in answer["chain"] and answer["bundle"] == token["ca"]
        status, again = await join(client, "n1", token["secret"], key)
        assert (status, again["reason"]) == (403, "token_used")
        status, other = await join(client, "n1", token["secret"])
        assert (status, other["reason"]) == (403, "token_other_key")
        status, answer = await join(client, "n1", "invented")
        assert (status, answer["reason"]) == (403, "token_unknown")
    text = await refusals(controller)
    for reason in ("token_wrong_node", "token_used", "token_other_key", "token_unknown"):
        assert f'pillion_controller_refusals_total{{reason="{reason}"}} 1.0' in text
    assert token["secret"].encode() not in b"".join(path.read_bytes() for path in controller.state.glob("pillion.db*"))


async def test_of_racing_uses_one_wins(controller: Controller) -> None:
    token = await controller.token("n1")
    async with controller.client() as client:
        answers = await asyncio.gather(*(join(client, "n1", token["secret"]) for _ in range(8)))
    assert sorted(status for status, _ in answers) == [200] + [403] * 7


async def test_a_token_expires(controller: Controller) -> None:
    token = await controller.token("n1", ttl_s=0.05)
    end = time.time() + 0.05

    async def over() -> bool:
        return time.time() > end

    await eventually(over)
    async with controller.client() as client:
        status, answer = await join(client, "n1", token["secret"])
    assert (status, answer["reason"]) == (403, "token_expired")


@pytest.mark.parametrize("ttl_s", [0, -1, 601, 1e9])
async def test_tokens_live_at_most_ten_minutes(shared: Controller, ttl_s: float) -> None:
    async with shared.operator() as operator:
        status, answer = await operator.call("POST", "/v1/nodes/n1/token", {"ttl_s": ttl_s})
    assert status == 400 and "600" in answer["error"]


async def test_a_token_dies_with_its_grant(controller: Controller) -> None:
    async with controller.operator() as operator:
        await operator.ok("POST", "/v1/apply", SHOP)
        token = await controller.token("n1")
        await operator.ok("DELETE", "/v1/resources/NodeGrant/-/n1")
    async with controller.client() as client:
        status, answer = await join(client, "n1", token["secret"])
    assert (status, answer["reason"]) == (403, "token_grant_changed")


async def test_only_what_is_granted_and_scheduled_is_signed(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1, controller.node("n2") as n2:

        async def sign(node: Client, spiffe: str) -> tuple[int, dict[str, str]]:
            return await node.call("POST", "/v1/agent/sign", {"csr": csr_for(new_key()), "spiffe": spiffe})

        web = "spiffe://mesh.local/ns/shop/sa/web"
        assert (await sign(n1, web))[1]["reason"] == "identity_not_granted"
        await operator.ok("POST", "/v1/apply", SHOP)
        assert (await sign(n1, web))[1]["reason"] == "identity_not_scheduled"
        await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB)
        status, issued = await sign(n1, web)
        assert status == 200
        leaf = x509.load_pem_x509_certificate(issued["chain"].encode())
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [name.value for name in names] == [web]
        usage = {oid._name for oid in leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value}
        assert usage == {"clientAuth", "serverAuth"}
        assert issued["serial"] == format(leaf.serial_number, "x")
        for node, spiffe, status, reason in [
            (n2, web, 403, "identity_not_granted"),
            (n1, "spiffe://mesh.local/ns/shop/sa/pay", 403, "identity_not_scheduled"),
            (n1, "spiffe://mesh.local/ns/bank/sa/web", 403, "identity_not_granted"),
            (n1, "spiffe://other.local/ns/shop/sa/web", 403, "foreign_trust_domain"),
            (n1, "spiffe://mesh.local/node/n1", 400, "bad_request"),
            (n1, "spiffe://mesh.local/operator/me", 400, "bad_request"),
        ]:
            found, answer = await sign(node, spiffe)
            assert (found, answer["reason"]) == (status, reason), spiffe
        assert (await n1.call("POST", "/v1/agent/sign", {"csr": "junk", "spiffe": web}))[1]["reason"] == "bad_csr"
        events = (await operator.ok("GET", "/v1/events"))["items"]
        assert {event["reason"] for event in events} >= {"identity_not_granted", "identity_not_scheduled"}
        assert any(event["node"] == "n2" and event["source"] == web for event in events)
        # A workload that leaves takes the right to its identity with it.
        await n1.ok("DELETE", "/v1/agent/workloads/shop/web-1")
        assert (await sign(n1, web))[1]["reason"] == "identity_not_scheduled"


async def test_a_lost_grant_revokes_what_was_issued_under_it(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1:
        await operator.ok("POST", "/v1/apply", SHOP)
        await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB)
        web = "spiffe://mesh.local/ns/shop/sa/web"
        issued = await n1.ok("POST", "/v1/agent/sign", {"csr": csr_for(new_key()), "spiffe": web})
        grant = SHOP.split("---")[0].replace("shop/web, ", "")
        revision = (await operator.ok("POST", "/v1/apply", grant))["revision"]
        await operator.ok("GET", f"/v1/wait?revision={revision}&timeout=5")
        items = (await operator.ok("GET", "/v1/state"))["items"]
        assert items["Config//mesh"]["revoked"] == [issued["serial"]]
        assert "Workload/shop/web-1" not in items


async def test_a_node_registers_within_its_grant_and_its_own(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1, controller.node("n2") as n2:
        await operator.ok("POST", "/v1/apply", SHOP + "---" + SHOP.split("---")[0].replace("n1", "n2"))
        first = await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB)
        assert await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB) == first
        for node, path, body, status, reason in [
            (n1, "shop/x", WEB | {"service_account": "root"}, 403, "identity_not_granted"),
            (n1, "bank/x", WEB, 403, "identity_not_granted"),
            (n2, "shop/web-1", WEB | {"addresses": ["10.0.2.1"]}, 409, "workload_taken"),
            (n2, "shop/web-2", WEB, 409, "address_taken"),
            (n2, "shop/web-2", WEB | {"addresses": ["240.1.2.3"]}, 400, "bad_request"),
            (n2, "shop/web-2", WEB | {"addresses": ["127.0.0.1"]}, 400, "bad_request"),
            (n2, "shop/web-2", WEB | {"addresses": []}, 400, "bad_request"),
            (n2, "shop/Bad_Name", WEB | {"addresses": ["10.0.2.1"]}, 400, "bad_request"),
            (n1, "shop/web-2", WEB, 409, "port_taken"),
        ]:
            found, answer = await node.call("PUT", f"/v1/agent/workloads/{path}", body)
            assert (found, answer.get("reason")) == (status, reason), (path, body, answer)
        status, answer = await n2.call("DELETE", "/v1/agent/workloads/shop/web-1")
        assert (status, answer["reason"]) == (403, "workload_taken")
        assert (await operator.ok("GET", "/v1/status"))["revision"] == first["revision"]


async def test_a_cut_node_is_out_at_once(controller: Controller) -> None:
    async with controller.operator() as operator:
        await operator.ok("POST", "/v1/apply", SHOP)
        chain, key = await controller.join("n1")
        async with controller.client(chain, key) as n1:
            await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB)
            web = "spiffe://mesh.local/ns/shop/sa/web"
            issued = await n1.ok("POST", "/v1/agent/sign", {"csr": csr_for(new_key()), "spiffe": web})
            async with n1.stream() as stream:
                await stream.take()
                revision = (await operator.ok("POST", "/v1/nodes/n1/cut"))["revision"]
                async with asyncio.timeout(5):
                    while not stream.websocket.closed:
                        await stream.websocket.receive()
            for method, path, body in [
                ("POST", "/v1/agent/sign", {"csr": csr_for(new_key()), "spiffe": web}),
                ("POST", "/v1/agent/renew", {"csr": csr_for(new_key())}),
                ("PUT", "/v1/agent/workloads/shop/web-2", WEB),
                ("GET", "/v1/agent/stream", None),
            ]:
                status, answer = await n1.call(method, path, body)
                assert (status, answer["reason"]) == (403, "node_cut")
        await operator.ok("GET", f"/v1/wait?revision={revision}&timeout=5")
        items = (await operator.ok("GET", "/v1/state"))["items"]
        leaf = x509.load_pem_x509_certificate(chain.encode())
        assert set(items["Config//mesh"]["revoked"]) == {"node:n1", issued["serial"], format(leaf.serial_number, "x")}
        assert "Workload/shop/web-1" not in items
        assert (await operator.ok("GET", "/v1/status"))["nodes"][0]["cut"] is True
        # Back only by an operator's word, and with new certificates.
        assert (await operator.call("POST", "/v1/nodes/n1/token"))[0] == 409
        async with controller.client(*(await controller.join("n1", readmit=True))) as n1:
            await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB)
        async with controller.client(chain, key) as old:
            assert (await old.call("PUT", "/v1/agent/workloads/shop/web-1", WEB))[1]["reason"] == "certificate_revoked"


async def test_renewal_gives_a_working_certificate(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1:
        await operator.ok("POST", "/v1/apply", SHOP)
        key = new_key()
        renewed = await n1.ok("POST", "/v1/agent/renew", {"csr": csr_for(key)})
        async with controller.client(renewed["chain"], pem_of(key)) as again:
            await again.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB)


async def test_roles_do_not_mix(controller: Controller) -> None:
    async with controller.operator() as root, controller.client() as nobody, controller.node("n1") as n1:
        own = new_key()
        made = await root.ok("POST", "/v1/operators/ann", {"csr": csr_for(own)})
        async with controller.client(made["chain"], pem_of(own)) as ann:
            await ann.ok("POST", "/v1/apply", SHOP)
            assert (await ann.call("PUT", "/v1/agent/workloads/shop/web-1", WEB))[0] == 403
            assert (await ann.call("POST", "/v1/ca/rotate", {"step": "prepare"}))[0] == 403
            assert (await n1.call("GET", "/v1/status"))[0] == 403
            assert (await n1.call("POST", "/v1/operators/n1"))[0] == 403
            assert (await nobody.call("GET", "/v1/status"))[0] == 401
            assert (await nobody.call("GET", "/v1/agent/stream"))[0] == 401
            assert (await root.call("PUT", "/v1/agent/workloads/shop/web-1", WEB))[0] == 403
            await root.ok("DELETE", "/v1/operators/ann")
            status, answer = await ann.call("GET", "/v1/status")
            assert (status, answer["reason"]) == (403, "certificate_revoked")


async def test_a_foreign_certificate_ends_the_handshake(controller: Controller) -> None:
    other = Controller(controller.directory.parent / "other")
    other.start()
    try:
        async with controller.client(*(await other.join("n1"))) as intruder:
            with pytest.raises((aiohttp.ClientError, ssl.SSLError, OSError)):
                await intruder.call("GET", "/v1/agent/stream")
    finally:
        other.stop()
