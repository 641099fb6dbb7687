"""The stream: snapshot, delta, ack, nack, resume, wait; and the node's filtered view of the mesh."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from mesh.model import Config
from mesh.snapshot import Ack, Delta, Nack, Ready, Snapshot
from tests.controller.rig import SHOP, Controller, eventually

WEB = {"service_account": "web", "addresses": ["10.0.1.1"], "labels": {"app": "web"}}
OTHER = (
    "apiVersion: v1\nkind: Service\nmetadata: {name: vault, namespace: bank}\nspec: {selector: {app: vault}, ports: [{port: 1}]}"
)


async def test_snapshot_then_deltas_then_wait(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1, n1.stream() as stream:
        first = await stream.take()
        assert isinstance(first, Snapshot) and isinstance(first.items["Config//mesh"], Config)
        revision = (await operator.ok("POST", "/v1/apply", SHOP))["revision"]
        assert (await operator.call("GET", f"/v1/wait?revision={revision}&timeout=0.1"))[0] == 504
        registered = (await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB))["revision"]
        assert registered > revision
        await stream.until(registered)
        assert await operator.ok("GET", f"/v1/wait?revision={registered}&timeout=5")
        items = stream.has.state
        assert {"Workload/shop/web-1", "Service/shop/web", "Policy/shop/all"} <= items.keys()
        assert items["Service/shop/web"].endpoints == ("Workload/shop/web-1",)  # type: ignore[union-attr]
        # What the node has is what it would be told anew.
        async with n1.stream() as again:
            await again.take()
            assert again.has.state == items
        await operator.ok("POST", "/v1/apply", OTHER)


async def test_a_change_reaches_a_node_as_a_delta_of_it_alone(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1, n1.stream() as stream:
        await operator.ok("POST", "/v1/apply", SHOP)
        await stream.until((await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB))["revision"])
        revision = (await operator.ok("DELETE", "/v1/resources/AuthorizationPolicy/shop/all"))["revision"]
        frame = await stream.take()
        assert isinstance(frame, Delta)
        assert (frame.revision, frame.delete, frame.put) == (revision, ("Policy/shop/all",), {})
        # Of another namespace, unreachable: the revision moves, nothing else does.
        revision = (await operator.ok("POST", "/v1/apply", OTHER))["revision"]
        frame = await stream.take()
        assert isinstance(frame, Delta)
        assert (frame.revision, frame.put, frame.delete) == (revision, {}, ())


async def test_a_stream_resumes_from_its_revision(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1:
        async with n1.stream() as stream:
            await stream.take()
            has = stream.has
            await eventually(lambda: acked(operator, has.revision))
        revision = (await operator.ok("POST", "/v1/apply", OTHER))["revision"]
        async with n1.stream(has.revision) as stream:
            stream.has = has
            frame = await stream.take()
            assert isinstance(frame, Delta) and (frame.from_revision, frame.revision) == (has.revision, revision)
        async with n1.stream(has.revision - 1) as stream:
            assert isinstance(await stream.take(), Snapshot)
        async with n1.stream(10**9) as stream:
            assert isinstance(await stream.take(), Snapshot)


async def acked(operator: object, revision: int) -> bool:
    nodes = (await operator.ok("GET", "/v1/status"))["nodes"]  # type: ignore[attr-defined]
    return bool(nodes) and nodes[0]["acked"] >= revision


async def test_nack_and_wrong_digest_show_and_are_repaired(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1, n1.stream() as stream:
        frame = await stream.frame()
        await stream.say(Nack(frame.revision, "map full"))  # type: ignore[union-attr]

        async def shown(word: str) -> bool:
            return word in (await operator.ok("GET", "/v1/status"))["nodes"][0]["error"]

        await eventually(lambda: shown("map full"))
        status, answer = await operator.call("GET", "/v1/wait?timeout=0")
        assert status == 504 and answer["laggards"][0]["name"] == "n1" and "map full" in answer["laggards"][0]["error"]
        repaired = await stream.frame()
        assert isinstance(repaired, Snapshot)
        await stream.say(Ack(repaired.revision, "0" * 64))
        await eventually(lambda: shown("digest"))
        assert (await operator.ok("GET", "/v1/status"))["nodes"][0]["digest_ok"] is False
        assert isinstance(await stream.take(), Snapshot)
        await stream.say(Ready(True, "all programs attached"))

        async def fine() -> bool:
            node = (await operator.ok("GET", "/v1/status"))["nodes"][0]
            return bool(node["ready"] and node["digest_ok"] and not node["error"] and node["connected"])

        await eventually(fine)
        await operator.ok("GET", "/v1/wait?timeout=5")


async def test_the_newest_stream_of_a_node_wins(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1, n1.stream() as old:
        await old.take()
        async with n1.stream() as new:
            await new.take()
            with pytest.raises(ConnectionError):
                await old.frame(5)
            revision = (await operator.ok("POST", "/v1/apply", SHOP))["revision"]
            await new.until(revision)
            await operator.ok("GET", f"/v1/wait?revision={revision}&timeout=5")


@pytest.mark.parametrize("junk", ["not json", '{"type":"snapshot"}', '{"type":"ack","revision":"x"}', "[" * 100_000])
async def test_a_frame_that_is_none_ends_the_stream(shared: Controller, junk: str) -> None:
    async with shared.node("n1") as n1, n1.stream() as stream:
        await stream.take()
        await stream.websocket.send_str(junk)
        with pytest.raises((ConnectionError, aiohttp.ClientError)):
            await stream.frame(5)


async def test_many_changes_are_gathered_and_none_is_lost(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1, n1.stream() as stream:
        await operator.ok("POST", "/v1/apply", SHOP)
        await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB)
        texts = [
            SHOP.replace("name: web,", f"name: web-{number},").replace("targetPort: 8080", "targetPort: 9090")
            for number in range(20)
        ]
        answers = await asyncio.gather(*(operator.ok("POST", "/v1/apply", text.split("---")[1]) for text in texts))
        last = max(answer["revision"] for answer in answers)
        await stream.until(last)
        assert sum(key.startswith("Service/") for key in stream.has.state) == 21


async def test_a_node_that_does_not_ack_does_not_stop_others(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1, controller.node("n2") as n2:  # noqa: SIM117
        async with n1.stream() as lazy, n2.stream() as good:
            await lazy.frame()
            for _ in range(10):
                revision = (await operator.ok("POST", "/v1/apply", SHOP))["revision"]
                await good.until(revision)
                revision = (await operator.ok("DELETE", "/v1/resources/AuthorizationPolicy/shop/all"))["revision"]
                await good.until(revision)
            status, answer = await operator.call("GET", f"/v1/wait?revision={revision}&timeout=0.1")
            assert status == 504 and [late["name"] for late in answer["laggards"]] == ["n1"]
