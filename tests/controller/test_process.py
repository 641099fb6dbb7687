"""The process: what was answered survives kill -9, one at a time, roots rotate under live nodes, damage is told."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time

import aiohttp
import pytest

from controller.ca import Authority, request_for
from controller.sqlite import SqliteStore
from tests.controller.rig import ROOT, SHOP, Client, Controller, csr_for, eventually, new_key, pem_of

SERVICE = (
    "apiVersion: v1\nkind: Service\nmetadata: {name: s%d, namespace: shop}\nspec: {selector: {app: web}, ports: [{port: 80}]}"
)


async def test_what_was_acknowledged_survives_kill_9(controller: Controller) -> None:
    acknowledged: dict[int, int] = {}
    for round_ in range(3):
        async with controller.operator() as operator:

            async def apply(number: int, operator: Client = operator) -> None:
                answer = await operator.ok("POST", "/v1/apply", SERVICE % number)
                acknowledged[number] = answer["revision"]

            async def many(first: int) -> None:
                for number in range(first, first + 1000):
                    await apply(number)

            writers = [asyncio.create_task(many(round_ * 10_000 + lane * 1000)) for lane in range(4)]

            async def enough(wanted: int = 40 * (round_ + 1)) -> bool:
                return len(acknowledged) >= wanted

            await eventually(enough)
            controller.kill()
            results = await asyncio.gather(*writers, return_exceptions=True)
            assert all(isinstance(result, aiohttp.ClientError | OSError) for result in results)
        controller.start()
        async with controller.operator() as operator:
            found = await operator.ok("GET", "/v1/resources?kind=Service")
            names = {item["metadata"]["name"] for item in found["items"]}
            assert {f"s{number}" for number in acknowledged} <= names
            assert found["revision"] >= max(acknowledged.values())
            state = (await operator.ok("GET", "/v1/state"))["items"]
            services = [item for item in state.values() if item["kind"] == "Service"]
            assert {item["name"] for item in services} == names
            assert len({item["id"] for item in services}) == len(services)
            assert len({vip for item in services for vip in item["vips"]}) == 2 * len(services)


async def test_a_node_goes_on_after_a_restart(controller: Controller) -> None:
    chain, key = await controller.join("n1")
    async with controller.operator() as operator:
        await operator.ok("POST", "/v1/apply", SHOP)
    controller.kill()
    controller.start()
    async with controller.client(chain, key) as n1, n1.stream(3) as stream:
        await stream.take()
        body = {"service_account": "web", "addresses": ["10.0.1.1"], "labels": {"app": "web"}}
        await stream.until((await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", body))["revision"])


def test_one_state_directory_one_controller(controller: Controller) -> None:
    second = Controller(controller.directory)
    result = subprocess.run(second.argv(), cwd=ROOT, capture_output=True, timeout=30)
    assert result.returncode == 1
    assert "in use by another controller" in json.loads(result.stderr.splitlines()[-1])["error"]


def test_damage_and_foreign_state_are_told(controller: Controller) -> None:
    assert controller.stop() == 0
    assert not (controller.run / "ready").exists()

    def refused() -> str:
        result = subprocess.run(controller.argv(), cwd=ROOT, capture_output=True, timeout=30)
        assert result.returncode == 1
        return str(json.loads(result.stderr.splitlines()[-1])["error"])

    controller.trust_domain = "other.local"
    assert "trust domain mesh.local" in refused()
    controller.trust_domain = "mesh.local"
    key = controller.state / "ca" / "1.intermediate.key"
    assert key.stat().st_mode & 0o777 == 0o600
    kept = key.read_bytes()
    key.unlink()
    assert "1.intermediate.key is missing" in refused()
    key.write_bytes(kept)
    database = controller.state / "pillion.db"
    assert database.stat().st_mode & 0o777 == 0o600
    data = bytearray(database.read_bytes())
    data[100:] = bytes(len(data) - 100)
    database.write_bytes(data)
    assert "damaged" in refused()


async def test_roots_rotate_under_live_nodes(controller: Controller) -> None:
    old_chain, old_key = await controller.join("n1")
    old_bundle = (controller.state / "bundle.pem").read_text()
    async with controller.operator() as operator:
        await operator.ok("POST", "/v1/apply", SHOP)
        made = await operator.ok("POST", "/v1/ca/rotate", {"step": "prepare"})
        await operator.ok("GET", f"/v1/wait?revision={made['revision']}&timeout=5")
        bundle = (await operator.ok("GET", "/v1/state"))["items"]["Config//mesh"]["bundle"]
        assert len(bundle) == 2 and bundle[0] == old_bundle
        await operator.ok("POST", "/v1/ca/rotate", {"step": "activate", "generation": made["generation"]})
        # A node that trusts both, with its old certificate, renews and gets a new root's.
        key = new_key()
        async with aiohttp.ClientSession() as session:
            context = controller.context(old_chain, old_key, "".join(bundle))
            url = f"{controller.url}/v1/agent/renew"
            async with session.post(url, json={"csr": csr_for(key)}, ssl=context) as response:
                assert response.status == 200
                renewed = await response.json()
        status, answer = await operator.call("POST", "/v1/ca/rotate", {"step": "retire", "generation": made["generation"]})
        assert status == 409, answer
        await operator.ok("POST", "/v1/ca/rotate", {"step": "retire", "generation": 1})
    body = {"service_account": "web", "addresses": ["10.0.1.1"], "labels": {"app": "web"}}

    async def register(chain: str, private: str) -> int:
        context = controller.context(chain, private, bundle[1])
        url = f"{controller.url}/v1/agent/workloads/shop/web-1"
        async with aiohttp.ClientSession() as session, session.put(url, json=body, ssl=context) as response:
            return response.status

    assert await register(renewed["chain"], pem_of(key)) == 200
    with pytest.raises((aiohttp.ClientError, OSError)):
        await register(old_chain, old_key)
    assert not (controller.state / "ca" / "1.root.key").exists()


async def test_an_expired_certificate_is_refused(controller: Controller) -> None:
    """Signed by the mesh's own key, indexed, but over."""
    chain, key = await controller.join("n1")
    controller.stop()
    store = await SqliteStore.open(controller.state / "pillion.db")
    authority = await Authority.open(store, controller.state / "ca", "mesh.local")
    private = new_key()
    expired = authority.sign(request_for(private), "spiffe://mesh.local/node/n1", "node:n1", ttl_s=1.0)
    await store.transaction([], [expired.index()])
    unknown = authority.sign(request_for(private), "spiffe://mesh.local/node/n1", "node:n1")
    await store.close()
    controller.start()
    async with controller.client(chain, key) as good:
        assert (await good.call("POST", "/v1/agent/renew", {"csr": csr_for(new_key())}))[0] == 200

    async def over() -> bool:
        return time.time() > expired.not_after

    await eventually(over)
    async with controller.client(expired.chain, pem_of(private)) as bad:
        with pytest.raises((aiohttp.ClientError, OSError)):
            await bad.call("POST", "/v1/agent/renew", {"csr": csr_for(new_key())})
    async with controller.client(unknown.chain, pem_of(private)) as stranger:
        status, answer = await stranger.call("POST", "/v1/agent/renew", {"csr": csr_for(new_key())})
        assert (status, answer["reason"]) == (403, "certificate_unknown")
