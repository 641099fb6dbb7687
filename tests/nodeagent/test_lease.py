"""The lease's arithmetic."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from mesh.dataplane import NodePlan
from mesh.model import CONFIG_KEY, Action, Config, Policy
from nodeagent import lease
from nodeagent import reconcile_events as ev
from nodeagent.datapath_fake import FakeDatapath
from nodeagent.kernel_work import KernelWork
from nodeagent.lease import Lease
from tests.nodeagent.fakes import until
from tests.nodeagent.test_agent import Node, node, serving

__all__ = ["node", "serving"]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(lease, "boot_s", lambda: clock[0])
    return clock


def test_it_runs_from_the_controllers_last_word(now: list[float]) -> None:
    made = Lease()
    made.heard(1000.0)
    now[0] = 1007.0
    assert made.age_s() == 7.0
    assert made.until_ns(10.0) == 1010_000_000_000
    made.heard(1006.0)
    made.heard(0.0)  # a new stream that has not spoken takes nothing back
    assert made.until_ns(10.0) == 1016_000_000_000


def test_no_limit_is_no_lease(now: list[float]) -> None:
    made = Lease()
    made.granted(5)
    made.heard(now[0])
    assert made.until_ns(0.0) == 0


def test_a_new_agent_grants_nothing_the_former_did_not(now: list[float]) -> None:
    made = Lease()
    made.restored(time.time())
    made.granted(1002_000_000_000)
    assert made.until_ns(60.0) == 1002_000_000_000
    now[0] = 1100.0
    assert made.until_ns(60.0) == 1002_000_000_000
    made.heard(now[0])
    assert made.until_ns(60.0) == 1160_000_000_000


def test_a_limit_that_was_lowered_holds_for_what_the_former_agent_granted(now: list[float]) -> None:
    made = Lease()
    made.granted(5000_000_000_000)
    assert made.until_ns(10.0) == int((now[0] + 10.0) * 1e9)


def test_after_a_boot_the_state_on_disk_is_as_old_as_it_is(now: list[float]) -> None:
    made = Lease()
    made.restored(time.time() - 40.0)
    age = made.age_s()
    assert age is not None and 39.0 < age < 42.0
    assert made.until_ns(60.0) > now[0] * 1e9
    assert made.until_ns(30.0) < now[0] * 1e9


def test_without_any_policy_there_is_no_age_and_the_lease_is_over(now: list[float]) -> None:
    made = Lease()
    assert made.age_s() is None
    assert 0 < made.until_ns(60.0) < now[0] * 1e9


def test_a_machine_that_booted_after_the_state_was_written_long_ago(now: list[float]) -> None:
    made = Lease()
    made.restored(time.time() - 1e6)  # before boot: below zero on this clock
    assert made.until_ns(60.0) == 1


# ---- in the agent


async def limit(serving: Node, seconds: float) -> None:
    config = serving.controller.held.state[CONFIG_KEY]
    assert isinstance(config, Config)
    await serving.controller.change(**{CONFIG_KEY: msgspec.structs.replace(config, policy_lease_s=seconds)})


async def test_kernel_and_workers_hear_of_it(serving: Node) -> None:
    assert serving.datapath.lease_until_ns == serving.worker.leased_ns == 0
    serving.worker.order.clear()
    await limit(serving, 60.0)
    await until(lambda: serving.datapath.lease_until_ns > 0)
    order = serving.worker.order
    assert order.index("Lease") < order.index("Update"), "a worker never has a limit without a lease"
    now = lease.boot_s()
    assert now + 50 < serving.datapath.lease_until_ns / 1e9 <= now + 60
    await until(lambda: serving.worker.leased_ns == serving.datapath.lease_until_ns)
    status = (await serving.call("GET", "/v1/status"))[1]
    assert status["policy_lease_s"] == 60.0 and status["policy_age_s"] < 60.0
    assert "pillion_agent_policy_lease_seconds 60.0" in (await serving.call("GET", "/metrics"))[1]
    before = serving.datapath.lease_until_ns
    await serving.controller.send(b'{"type":"ping"}')
    await until(lambda: serving.datapath.lease_until_ns > before)
    await limit(serving, 0.0)
    await until(lambda: serving.datapath.lease_until_ns == 0)


async def test_it_is_not_extended_while_the_kernel_refuses_what_the_controller_says(serving: Node) -> None:
    await limit(serving, 60.0)
    await until(lambda: serving.datapath.lease_until_ns > 0)
    serving.datapath.entries_max = 0
    await serving.controller.change(**{"Policy/shop/no": Policy(name="no", namespace="shop", action=Action.DENY)})
    await until(lambda: serving.agent.core.kernel_error)
    standing = serving.agent.lease.until_ns(60.0)
    await serving.controller.send(b'{"type":"ping"}')
    await until(lambda: serving.agent.membership.heard_at + 60 > standing / 1e9)
    serving.agent._renew_lease()
    assert serving.agent.lease.until_ns(60.0) == standing
    serving.datapath.entries_max = None
    await until(lambda: serving.agent.lease.until_ns(60.0) > standing)


async def test_the_enforced_state_can_be_read(serving: Node) -> None:
    status, body = await serving.call("GET", "/v1/state")
    assert status == 200 and body["revision"] == serving.controller.held.revision
    assert body["items"].keys() == serving.controller.held.state.keys()


def test_a_netns_nobody_is_in_is_let_go_after_its_connections_ended(tmp_path: Path) -> None:
    held: list[bool] = []

    class Datapath(FakeDatapath):
        def end_denied(self, plan: NodePlan) -> int:
            held.append(bool(self._netns))
            return super().end_denied(plan)

    datapath = Datapath()
    work = KernelWork(datapath, "n1", tmp_path)
    cookie = work._cookie(None)
    work._open.add(cookie)
    work.apply(ev.ApplyKernel(1, 1, {CONFIG_KEY: Config("mesh.local")}, (), 1))
    work.end_denied()
    assert held == [True]
    assert not datapath._netns
    assert work._cookie(None) != 0 and not work._leaving
