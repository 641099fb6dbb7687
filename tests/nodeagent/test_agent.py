"""The whole agent with everything around it faked: joins, enforces, serves, survives."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mesh import link, snapshot
from mesh.model import Action, Config, Policy
from nodeagent import api, flows, workloads
from nodeagent.agent import Agent
from nodeagent.api import serve
from nodeagent.datapath_fake import FakeDatapath
from nodeagent.options import Options
from tests.nodeagent.fakes import Authority, FakeController, FakeWorker, until

WEB = "spiffe://mesh.local/ns/shop/sa/web"
KEY = "Workload/shop/web-1"
DENY = Policy(name="no", namespace="shop", action=Action.DENY)


class Node:
    """A node: directories, a controller, a worker, and an agent that can be restarted."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.ancestor = scratch / "cg"
        self.controller = FakeController(Authority(), scratch)
        self.worker = FakeWorker(scratch / "run/proxy/worker-0.sock")
        self.file = scratch / "workloads.yaml"
        for name in ("web", "db"):
            (self.ancestor / "workloads" / name).mkdir(parents=True)
        self.write("web-1", "web")
        self.agent: Agent
        self.datapath: FakeDatapath
        self._task: asyncio.Task[None] | None = None
        self._runner: Any = None

    def write(self, name: str, account: str) -> None:
        entry = {"name": name, "namespace": "shop", "serviceAccount": account, "labels": {"app": account}}
        entry |= {"addresses": ["10.9.0.9"], "cgroup": str(self.ancestor / "workloads/web")}
        self.file.write_text(json.dumps({"workloads": [entry]}))

    async def start(self) -> None:
        (self.scratch / "run").mkdir(exist_ok=True)
        (self.scratch / "state").mkdir(exist_ok=True)
        (self.scratch / "token").write_text(self.controller.token())
        self.datapath = FakeDatapath()
        options = Options(
            node="n1",
            addresses=("10.9.0.9",),
            state_dir=self.scratch / "state",
            run_dir=self.scratch / "run",
            cgroup=self.ancestor,
            proxy_dir=self.scratch / "run/proxy",
            workloads=self.file,
            join_token_file=self.scratch / "token",
        )
        self.agent = Agent(options, self.datapath)
        self._runner = await serve(self.agent, self.scratch / "run/agent.sock")
        self._task = asyncio.create_task(self.agent.run())

    async def stop(self) -> None:
        if self._task is not None:
            self.agent.stop()
            await asyncio.wait_for(self._task, 10)
            await self._runner.cleanup()
            self._task = None

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connector = aiohttp.UnixConnector(str(self.scratch / "run/agent.sock"))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, "http://agent" + path, **{"data" if isinstance(body, bytes) else "json": body}) as response,
        ):
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def ready(self) -> bool:
        return (await self.call("GET", "/v1/ready"))[0] == 200


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path)
    await made.controller.start()
    made.worker.start()
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
        await made.worker.stop()
        await made.controller.stop()


@pytest.fixture
async def serving(node: Node) -> Node:
    await until(node.ready, "never ready")
    return node


async def test_from_nothing_to_ready(serving: Node) -> None:
    status = (await serving.call("GET", "/v1/status"))[1]
    assert status["ready"] and status["revision"] == serving.controller.held.revision
    (workload,) = status["workloads"]
    assert workload["spiffe"] == WEB and workload["svid"]["serial"]
    assert status["proxy"][0]["connected"] and status["programs"]["connect4"]
    worker = serving.worker
    assert worker.state == serving.controller.held.state
    assert [entry.key for entry in worker.local] == [KEY]
    assert {listener.kind for listener in worker.listeners.values()} == {"outbound", "hbone", "dns-udp", "dns-tcp"}
    assert worker.svids[WEB][1].startswith(b"-----BEGIN PRIVATE KEY-----")
    assert worker.order.index("Update") < worker.order.index("Listener")
    assert worker.stock[worker.local[0].netns, socket.AF_INET] > 0
    assert serving.controller.acks[-1] == snapshot.Ack(serving.controller.held.revision, serving.controller.held.digest)
    await until(lambda: serving.controller.ready and serving.controller.ready[-1].ready)


async def test_private_things_are_private(serving: Node) -> None:
    state = serving.scratch / "state"
    for path in [*state.rglob("*"), serving.scratch / "run/agent.sock"]:
        if path.name != "bundle.pem":
            assert path.stat().st_mode & 0o077 == 0, path


async def test_an_ack_means_that_kernel_and_proxy_have_it(serving: Node) -> None:
    revision = await serving.controller.change(**{"Policy/shop/no": DENY})
    await until(lambda: serving.controller.acks and serving.controller.acks[-1].revision == revision)
    assert serving.worker.state["Policy/shop/no"] == DENY
    assert serving.worker.generation == serving.datapath.generation == serving.agent.core.generation
    assert serving.controller.acks[-1].digest == serving.controller.held.digest


async def test_corruption_changes_nothing_is_counted_and_repaired(serving: Node) -> None:
    await serving.controller.send(b'{"type":"delta","from":1,"revision":99,"digest":"00"}')
    await until(lambda: serving.controller.nacks)
    await serving.controller.send(b"\x00 nonsense")
    await until(lambda: len(serving.controller.nacks) > 1)
    assert serving.agent.core.intake.corrupt >= 2
    assert serving.worker.state == serving.controller.held.state
    assert 'pillion_agent_events_total{kind="snapshot_corrupt"} ' in (await serving.call("GET", "/metrics"))[1]
    revision = await serving.controller.change(**{"Policy/shop/no": DENY})
    await until(lambda: serving.controller.acks[-1].revision == revision)


async def test_a_restart_with_a_dead_controller_serves_at_once(serving: Node) -> None:
    serial = serving.worker.svids[WEB][0]
    await serving.controller.stop()
    await serving.stop()
    await serving.start()
    await until(serving.ready, "a persisted state and certificate are enough")
    await until(lambda: WEB in serving.worker.svids)
    assert serving.worker.svids[WEB][0] == serial
    assert serving.datapath.members, "the workload is a member"
    await serving.controller.start()
    await until(lambda: serving.agent.core.connected)
    assert serving.controller.resumed[-1] == serving.controller.held.revision, "it resumes"


async def test_a_damaged_state_file_is_refused_and_counted(serving: Node) -> None:
    await serving.stop()
    path = serving.scratch / "state/state"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    await serving.start()
    await until(serving.ready)
    assert serving.agent.counts["state_corrupt"] == 1
    assert 0 in serving.controller.resumed[1:]


async def test_a_worker_that_dies_is_dialled_again_and_given_everything(serving: Node) -> None:
    listeners = set(serving.worker.listeners)
    serving.worker.hang_up()
    await until(lambda: serving.worker.connections == 2)
    await until(lambda: set(serving.worker.listeners) == listeners and WEB in serving.worker.svids)
    assert serving.worker.state == serving.controller.held.state
    await until(serving.ready)


async def test_a_lying_worker_makes_the_node_unready(serving: Node) -> None:
    serving.worker.lies = True
    await serving.controller.change(**{"Policy/shop/no": DENY})
    await until(lambda: serving.agent.core.workers.lagging or serving.agent.core.workers.counts["wrong_state"] > 1)
    await until(lambda: not serving.agent.core.readiness.ready)  # judged once a turn's events are dealt with
    assert not await serving.ready()
    serving.worker.lies = False
    await until(serving.ready)
    assert serving.controller.acks[-1].revision == serving.controller.held.revision


async def test_no_proxy_holds_up_no_revision(serving: Node) -> None:
    await serving.worker.stop()
    revision = await serving.controller.change(**{"Policy/shop/no": DENY})
    await until(lambda: serving.controller.acks[-1].revision == revision)
    assert not await serving.ready()


async def test_a_bad_workloads_file_keeps_the_old_one_and_says_so(serving: Node) -> None:
    serving.file.write_text("workloads: [{name: web-1, namespace: shop}]")
    await until(lambda: serving.agent.workloads.file.error)
    status = (await serving.call("GET", "/v1/status"))[1]
    assert "workloads[0]" in status["workloads_error"] and status["workloads"][0]["ready"]
    assert "file refused" in status["detail"]


async def test_a_restart_with_a_bad_workloads_file_keeps_the_old_one_too(serving: Node) -> None:
    await serving.stop()
    serving.file.write_text("workloads: [")
    await serving.start()
    await until(serving.ready)
    assert serving.agent.core.enrolled and serving.agent.workloads.file.error


async def test_an_ungranted_workload_is_never_enrolled(serving: Node) -> None:
    serving.write("web-1", "payments")
    await until(lambda: not serving.agent.core.enrolled)
    await until(lambda: serving.agent.core.roster.refused.get("identity_not_granted"))
    status = (await serving.call("GET", "/v1/status"))[1]
    assert "identity_not_granted" in status["workloads"][0]["detail"]
    await until(lambda: not serving.worker.svids and not serving.worker.listeners)
    assert not [member for member in serving.datapath.members if member.workload]


async def test_pillion_run_answers_when_enforced(serving: Node) -> None:
    cgroup = str(serving.ancestor / "workloads/db")
    body = {"name": "db-1", "namespace": "shop", "service_account": "db", "ports": [6379], "labels": {}, "cgroup": cgroup}
    code, answer = await serving.call("POST", "/v1/workloads", body)
    assert code == 201, answer
    assert answer["spiffe"].endswith("/sa/db") and answer["addresses"] == ["10.9.0.9"]
    assert len([member for member in serving.datapath.members if member.workload]) == 2
    assert answer["spiffe"] in {entry.item.spiffe for entry in serving.agent.core.enrolled}
    code, answer = await serving.call("POST", "/v1/workloads", {**body, "name": "db-2"})
    assert code == 400 and "cgroup" in answer["error"]
    for junk in (b"{", b'"\xff"', b"[" * 100_000):
        code, answer = await serving.call("POST", "/v1/workloads", junk)
        assert code == 400 and answer["error"].startswith("body: ")
    assert (await serving.call("DELETE", "/v1/workloads/shop/db-1"))[0] == 200
    await until(lambda: "Workload/shop/db-1" in serving.controller.deleted)
    assert (await serving.call("DELETE", "/v1/workloads/shop/db-1"))[0] == 404


async def test_pillion_run_outside_the_grant_is_refused(serving: Node) -> None:
    body = {"name": "pay-1", "namespace": "shop", "service_account": "payments", "cgroup": str(serving.ancestor / "workloads/db")}
    code, answer = await serving.call("POST", "/v1/workloads", body)
    assert (code, answer["reason"]) == (403, "identity_not_granted")
    assert "Workload/shop/pay-1" not in serving.agent.core.roster.placed
    assert not serving.agent.workloads.book.api


async def test_rotation_reaches_the_worker(serving: Node) -> None:
    serial = serving.worker.svids[WEB][0]
    assert (await serving.call("POST", "/v1/rotate"))[1]["rotating"] == 1
    await until(lambda: serving.worker.svids[WEB][0] != serial)


async def test_a_revoked_certificate_is_dropped_and_replaced(serving: Node) -> None:
    serial = serving.worker.svids[WEB][0]
    config = serving.controller.held.state["Config//mesh"]
    assert isinstance(config, Config)
    await serving.controller.change(
        **{"Config//mesh": Config(trust_domain="mesh.local", bundle=config.bundle, revoked=(serial,))}
    )
    await until(lambda: WEB in serving.worker.svids and serving.worker.svids[WEB][0] != serial)


async def test_a_cut_node_has_nothing_left(serving: Node) -> None:
    config = serving.controller.held.state["Config//mesh"]
    assert isinstance(config, Config)
    await serving.controller.change(
        **{"Config//mesh": Config(trust_domain="mesh.local", bundle=config.bundle, revoked=("node:n1",))}
    )
    await until(lambda: not serving.worker.svids and not serving.worker.listeners)
    assert set(serving.worker.state) == {"Config//mesh"}
    assert not [member for member in serving.datapath.members if member.workload]
    assert not list((serving.scratch / "state/svids").iterdir()), "its keys are deleted"

    async def says_so() -> bool:  # once it was applied, which ends after the workers' part
        return "cut" in (await serving.call("GET", "/v1/ready"))[1]["detail"]

    await until(says_so)


async def test_flows_of_kernel_and_proxy_come_together(serving: Node) -> None:
    connector = aiohttp.UnixConnector(str(serving.scratch / "run/agent.sock"))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get("http://agent/v1/flows?follow=1&limit=0") as response,
    ):
        serving.datapath.tell(link.Flow(time=1.0, verdict="denied", reason="policy_denied"))
        assert json.loads(await response.content.readline())["reason"] == "policy_denied"
        serving.worker.say(link.Flow(time=2.0, verdict="allowed", reason="shop/web#0", path="/\x1b[2J"))
        line = await response.content.readline()
        assert json.loads(line)["reason"] == "shop/web#0" and b"\x1b" not in line
    code, text = await serving.call("GET", "/v1/flows?limit=1")
    assert code == 200 and len(text.splitlines()) == 1


async def test_one_reader_of_flows_too_many_is_told(serving: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an answer of its own, or `pillion flows` would show the refusal as a flow."""
    monkeypatch.setattr(flows, "FOLLOWERS_MAX", 0)
    code, answer = await serving.call("GET", "/v1/flows?follow=1")
    assert (code, answer["reason"]) == (503, "too_many_followers")


async def test_a_worker_that_invents_verdicts_is_hung_up_on(serving: Node) -> None:
    """Or each would be a counter of its own, for ever."""
    before = serving.agent.fleet.counts["protocol_errors"]
    serving.worker.say(link.Flow(time=2.0, verdict="verdict number 4711", reason="x"))
    await until(lambda: serving.agent.fleet.counts["protocol_errors"] == before + 1)
    assert not any("4711" in verdict for verdict in serving.agent.ring.seen)


async def test_metrics_that_wait_for_the_kernel_hold_up_nobody(serving: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data path's lock is held while it compiles."""
    asked, answer = threading.Event(), threading.Event()

    def text() -> str:
        asked.set()
        assert answer.wait(3), "nobody else was served meanwhile"
        return ""

    monkeypatch.setattr(serving.datapath, "metrics_text", text)
    metrics = asyncio.create_task(serving.call("GET", "/metrics"))
    await until(asked.is_set)
    assert await serving.ready()
    answer.set()
    assert (await metrics)[0] == 200


async def test_a_workloads_file_is_read_beside_the_loop(serving: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long one takes seconds."""
    readers = set()

    def read(*given: Any, **named: Any) -> Any:
        readers.add(threading.current_thread())
        return parse(*given, **named)

    parse = workloads.parse
    monkeypatch.setattr(workloads, "parse", read)
    serving.write("web-2", "web")
    await until(lambda: readers)
    assert threading.main_thread() not in readers


async def test_the_local_api_waits_for_nobody_long(serving: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(serving.scratch / "run/agent.sock")
    monkeypatch.setattr(api, "BODY_TIMEOUT_S", 0.1)
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"POST /v1/workloads HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nConnection: close\r\n\r\n{")
    assert b"body_timeout" in await asyncio.wait_for(reader.read(), 3)
    writer.close()
    monkeypatch.setattr(api, "CONNECTIONS_MAX", 0)
    reader, writer = await asyncio.open_unix_connection(path)
    assert await asyncio.wait_for(reader.read(), 3) == b""
    writer.close()


async def test_metrics_carry_the_worker(serving: Node) -> None:
    text = (await serving.call("GET", "/metrics"))[1]
    assert 'pillion_requests_total{worker="0"} 3' in text
    assert "pillion_agent_ready 1.0" in text


async def test_a_worker_gets_sockets_of_this_nodes_netns_only(serving: Node) -> None:
    netns = serving.worker.local[0].netns
    before = serving.worker.stock[netns, socket.AF_INET]
    serving.worker.say(link.NeedStock(netns, socket.AF_INET, 300))
    await until(lambda: serving.worker.stock[netns, socket.AF_INET] == before + 300)
    serving.worker.say(link.NeedStock(999_999, socket.AF_INET, 10))
    serving.worker.say(link.NeedStock(netns, socket.AF_PACKET, 10))
    await until(lambda: serving.agent.fleet.counts["stock_refused"] == 20)
    assert set(serving.worker.stock) == {(netns, int(socket.AF_INET))}


async def test_a_worker_that_speaks_out_of_turn_is_closed(serving: Node) -> None:
    serving.worker.say(link.Hello("x", "", (), "", ()))
    await until(lambda: serving.agent.fleet.counts["protocol_errors"] == 1)
    await until(serving.ready)


async def test_a_vanished_cgroup_takes_its_workload_out_alone(serving: Node) -> None:
    shutil.rmtree(serving.ancestor / "workloads/web")
    await until(lambda: not serving.agent.core.enrolled)
    status = (await serving.call("GET", "/v1/status"))[1]
    assert "cgroup" in status["workloads"][0]["detail"]
    await until(lambda: not serving.agent.core.readiness.ready)
    (serving.ancestor / "workloads/web").mkdir()
    await until(serving.ready)


async def test_no_bug_was_met(serving: Node) -> None:
    assert serving.agent.counts["bugs"] == 0
