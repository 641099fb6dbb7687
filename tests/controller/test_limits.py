"""What nodes and strangers may use up: the mesh's numbers, and the room in the log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from controller import allowance, registry, sparing
from controller.allowance import Allowance
from controller.ca import Authority
from controller.events import Refused, Telemetry
from controller.registry import Registry
from controller.sqlite import SqliteStore
from tests.controller.rig import SHOP, Controller, eventually


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Registry]:
    store = await SqliteStore.open(tmp_path / "db")
    authority = await Authority.open(store, tmp_path / "ca", "mesh.local")
    opened = await Registry.open(store, authority, "mesh.local")
    await opened.apply(SHOP + "---" + SHOP.split("---")[0].replace("n1", "n2"), "shop")
    yield opened
    await store.close()


async def register(registry: Registry, node: str, name: str, account: str = "web") -> int:
    address = f"10.0.{node[1:]}.{1 + int(name)}"
    return await registry.register(node, "shop", f"w-{node}-{name}", account, [address], {}, source="test")


async def test_a_node_can_not_use_up_the_numbers(opened: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """By registering and removing, again and again: numbers do not come back."""
    monkeypatch.setattr(allowance, "NUMBERS_AT_ONCE", 10)

    async def again_and_again() -> None:
        for _ in range(20):
            await register(opened, "n1", "1")
            await opened.unregister("n1", "shop", "w-n1-1")

    with pytest.raises(Refused) as refused:
        await again_and_again()
    assert (refused.value.reason, refused.value.status, refused.value.node) == ("too_many_numbers", 429, "n1")
    assert 256 + 5 == opened.given()["workload"] + 256 == opened.given()["identity"] + 256  # one of each, five times
    # Nobody else pays, and what takes no number is free
    for _ in range(2):
        await register(opened, "n2", "1", "pay")
    assert opened.given()["workload"] == 6


async def test_another_account_is_another_number(opened: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "NUMBERS_AT_ONCE", 10)
    await register(opened, "n1", "1")

    async def to_and_fro() -> None:
        for number in range(20):
            await register(opened, "n1", "1", ("pay", "web")[number % 2])

    with pytest.raises(Refused, match="too fast") as refused:
        await to_and_fro()
    assert refused.value.reason == "too_many_numbers" and opened.given() == {"identity": 9, "workload": 1, "service": 1}


def test_an_allowance_comes_back_with_time() -> None:
    now = 0.0
    allowed = Allowance(lambda: now)
    assert allowed.take("n1", allowance.NUMBERS_AT_ONCE) == 0
    assert allowed.take("n1", 3) == pytest.approx(3 / allowance.NUMBERS_PER_S)
    assert allowed.take("n2", 3) == allowed.take("n1", 0) == 0
    now = 3 / allowance.NUMBERS_PER_S
    assert allowed.take("n1", 3) == 0 < allowed.take("n1", 1)
    now += 10 * allowance.NUMBERS_AT_ONCE / allowance.NUMBERS_PER_S
    assert allowed.take("n1", allowance.NUMBERS_AT_ONCE) == 0 < allowed.take("n1", 1)  # never more than at once


async def test_a_mesh_that_is_full_takes_no_workload(opened: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    await register(opened, "n1", "1")
    monkeypatch.setattr(registry, "RESOURCES_MAX", len(opened.get()))
    with pytest.raises(Refused) as refused:
        await register(opened, "n1", "2")
    assert (refused.value.reason, refused.value.status) == ("too_many_resources", 429)
    await register(opened, "n1", "1", "pay")  # that one is there already


def count(telemetry: Telemetry, reason: str) -> float:
    return telemetry.refusals.labels(reason)._value.get()


async def test_refusals_do_not_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparing, "WINDOW_S", 0.2)
    telemetry, most = Telemetry(), sparing.LINES_MAX
    with capture_logs() as lines:
        for number in range(1000):
            telemetry.refused(Refused("wrong_role", "no", source=f"10.0.0.{number % 250}"), 1)
        telemetry.refused(Refused("token_unknown", "no", source="10.0.0.1"), 1)
        for _ in range(100):
            telemetry.refused(Refused("wrong_role", "no", node="n1"), 1, known="node n1")
        assert len([line for line in lines if line["reason"] == "wrong_role" and not line["node"]]) == most
        assert len([line for line in lines if line["node"] == "n1"]) == most  # no stranger hides what a node did
        assert len([line for line in lines if line["reason"] == "token_unknown"]) == 1

        async def summed_up() -> bool:
            return len(lines) == 2 * most + 1 + 2

        await eventually(summed_up, 5)
        told = {(line["reason"], line["caller"]): line["more"] for line in lines[-2:]}
        assert told == {("wrong_role", "nobody"): 1000 - most, ("wrong_role", "node n1"): 100 - most}
        await asyncio.sleep(0)
        telemetry.refused(Refused("wrong_role", "no"), 1)
        assert lines[-1]["event"] == "refused" and "more" not in lines[-1]  # a new window
    assert (count(telemetry, "wrong_role"), count(telemetry, "token_unknown")) == (1101, 1)


async def test_what_was_left_out_is_told_at_the_end() -> None:
    telemetry = Telemetry()
    with capture_logs() as lines:
        for _ in range(sparing.LINES_MAX + 7):
            telemetry.refused(Refused("wrong_role", "no"), 1)
        telemetry.sparing.close()
    assert lines[-1]["more"] == 7


async def test_strangers_at_the_door(controller: Controller) -> None:
    """Requests without a certificate, and what is no handshake: answered and counted each, a handful of lines in the log."""
    asked, before = 200, len(controller.log().splitlines())
    async with controller.client() as nobody:
        for _ in range(asked):
            assert (await nobody.call("GET", "/v1/status"))[0] == 401
    for noise in (b"\x16\x03\x01\x02\x00junk", b"GET / HTTP/1.1\r\n\r\n", b""):
        for _ in range(30):
            _, writer = await asyncio.open_connection("127.0.0.1", controller.port)
            writer.write(noise)
            writer.close()
    async with controller.operator() as operator:
        metrics = (await operator.call("GET", "/metrics"))[1]
        assert f'pillion_controller_refusals_total{{reason="wrong_role"}} {asked}.0' in metrics
    controller.stop()
    lines = [json.loads(line) for line in controller.log().splitlines()[before:]]
    assert len(lines) <= 2 * (sparing.LINES_MAX + 1) + 2, lines
    assert sum(line.get("more", 1) for line in lines if line["event"].startswith("refused")) == asked
