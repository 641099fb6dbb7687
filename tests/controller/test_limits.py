"""What nodes and strangers may use up: the mesh's numbers, and the room in the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from controller import allowance, events, registry, sparing
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


@contextlib.asynccontextmanager
async def started(directory: Path) -> AsyncIterator[Registry]:
    """Each is a start of the controller on the same disk."""
    store = await SqliteStore.open(directory / "db")
    try:
        yield await Registry.open(store, await Authority.open(store, directory / "ca", "mesh.local"), "mesh.local")
    finally:
        await store.close()


async def as_often_as_it_may(registry: Registry, node: str) -> int:
    """How many numbers a node gets."""
    before = sum(registry.given().values())
    with contextlib.suppress(Refused):
        for _ in range(allowance.NUMBERS_AT_ONCE):
            await register(registry, node, "1")
            await registry.unregister(node, "shop", f"w-{node}-1")
    return sum(registry.given().values()) - before


async def clock_goes_on(directory: Path, by_s: float) -> None:
    """As what is on the disk has it."""
    store = await SqliteStore.open(directory / "db")
    for entry in (await store.list("allowance/"))[1]:
        await store.put(entry.key, json.dumps(json.loads(entry.value) - by_s).encode())
    await store.close()


async def test_a_restart_gives_nobody_new_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "NUMBERS_AT_ONCE", 10)
    monkeypatch.setattr(allowance, "NUMBERS_PER_S", 0.001)
    async with started(tmp_path) as registry:
        await registry.apply(SHOP + "---" + SHOP.split("---")[0].replace("n1", "n2"), "shop")
        await register(registry, "n1", "1")
        await registry.unregister("n1", "shop", "w-n1-1")
    async with started(tmp_path) as registry:
        assert await as_often_as_it_may(registry, "n1") == 8
    await clock_goes_on(tmp_path, 2 / allowance.NUMBERS_PER_S)  # while the controller was away the allowance grew
    async with started(tmp_path) as registry:
        assert (await as_often_as_it_may(registry, "n1"), await as_often_as_it_may(registry, "n2")) == (2, 10)
    await clock_goes_on(tmp_path, -1e9)  # one that went back costs no more than all there is at once
    async with started(tmp_path) as registry:
        assert await as_often_as_it_may(registry, "n1") == 0
        assert registry._allowance.take("n1", 1) == pytest.approx(1 / allowance.NUMBERS_PER_S, rel=0.1)


async def test_what_came_back_in_full_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(tmp_path) as registry:
        await registry.apply(SHOP, "shop")
        await register(registry, "n1", "1")
        for now, kept in ((time.time(), 1), (time.time() + 3 / allowance.NUMBERS_PER_S, 0)):
            await registry.prune(now)
            assert len((await registry._store.list("allowance/"))[1]) == kept


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


async def test_no_stranger_pushes_out_the_events_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by asking often nor by asking for long, nor does a node push out another's."""
    monkeypatch.setattr(sparing, "WINDOW_S", 0.01)
    telemetry = Telemetry()
    telemetry.refused(Refused("node_cut", "no", node="n1"), 1, known="node n1")
    telemetry.refused(Refused("bad_request", "no"), 1, known="operator ann")
    with capture_logs():
        for lap in range(3 * events.EVENTS_MAX // sparing.LINES_MAX):
            for number in range(2 * sparing.LINES_MAX):
                telemetry.refused(Refused(f"reason_{lap % 7}", "no", source=f"10.0.0.{number}"), 1)
                telemetry.refused(Refused(f"reason_{lap % 7}", "no", node="n2"), 1, known="node n2")
            telemetry.sparing.close()  # a window later
    kept = list(telemetry.events)
    assert [event.reason for event in kept[:2]] == ["node_cut", "bad_request"]
    assert len(kept) == events.EVENTS_MAX and kept == sorted(kept, key=lambda event: event.time)
    assert sum(event.node == "n2" for event in kept) == pytest.approx(events.EVENTS_MAX / 2, abs=2)


async def test_of_a_flood_some_events_are_kept_and_the_rest_is_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparing, "WINDOW_S", 0.2)
    telemetry, most = Telemetry(), sparing.LINES_MAX
    with capture_logs():
        for number in range(500):
            telemetry.refused(Refused("wrong_role", "no", source=f"10.0.0.{number % 250}"), 1)
        for _ in range(most):
            telemetry.refused(Refused("bad_request", "no", node="n1"), 1, known="node n1")
        assert [event.reason for event in telemetry.events] == ["wrong_role"] * most + ["bad_request"] * most

        async def summed_up() -> bool:
            return len(telemetry.events) == 2 * most + 1

        await eventually(summed_up, 5)
    last = list(telemetry.events)[-1]
    assert (last.verdict, last.reason, last.source, last.more) == ("denied", "wrong_role", "unknown", 500 - most)
    assert not any(event.more for event in list(telemetry.events)[:-1])


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
        kept = (await operator.ok("GET", "/v1/events"))["items"]
        assert sparing.LINES_MAX <= len(kept) <= 4 * (sparing.LINES_MAX + 1) < asked
    controller.stop()
    lines = [json.loads(line) for line in controller.log().splitlines()[before:]]
    assert len(lines) <= 2 * (sparing.LINES_MAX + 1) + 2, lines
    assert sum(line.get("more", 1) for line in lines if line["event"].startswith("refused")) == asked
