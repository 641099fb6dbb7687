"""The local API: HTTP on a unix socket that only root can open. Questions change nothing; workloads of `pillion run` come
and go here, and a POST answers when the workload is enforced and served, not before."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nodeagent.agent import Agent
from nodeagent.exposition import merge
from nodeagent.flows import FOLLOWERS_MAX, RING_FLOWS_MAX, TooManyFollowers
from nodeagent.loading import under_way
from nodeagent.optional import INSTEAD, report
from nodeagent.top import top
from nodeagent.workloads import WorkloadsError, check

BODY_BYTES_MAX = 256 << 10
HEAD_BYTES_MAX, HEAD_FIELDS_MAX = 8190, 64
IDLE_TIMEOUT_S = 15.0  # also of a head that does not end
BODY_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 30.0  # of a reader of flows that does not read
CONNECTIONS_MAX = 128
ENFORCED_S = 15.0  # how long a POST waits
FLOWS_DEFAULT = 100
PROTOCOL_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def _problem(status: int, reason: str, error: str) -> web.Response:
    return _json({"error": error, "reason": reason}, status)


class LocalApi:
    """Handlers over an `Agent`; `application` is what aiohttp serves."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._registry = CollectorRegistry()
        self._registry.register(_Own(agent))

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.add_routes(
            [
                web.get("/v1/status", self.status),
                web.get("/v1/ready", self.ready),
                web.get("/v1/state", self.state),
                web.get("/v1/flows", self.flows),
                web.get("/metrics", self.metrics),
                web.get("/v1/top", self.top),
                web.get("/v1/express", self.express),
                web.post("/v1/workloads", self.add),
                web.delete("/v1/workloads/{namespace}/{name}", self.remove),
                web.post("/v1/rotate", self.rotate),
            ]
        )
        return app

    # ---- questions

    async def status(self, _: web.Request) -> web.Response:
        agent, core = self._agent, self._agent.core
        age = agent.lease.age_s()
        workloads = []
        for key, placed in sorted(core.roster.placed.items()):
            spec = placed.spec
            enrolled = core.enrolled_as(key)
            spiffe = enrolled.item.spiffe if enrolled else ""
            held = agent.svids.held.get(spiffe)
            workloads.append(
                {
                    "name": spec.name,
                    "namespace": spec.namespace,
                    "spiffe": spiffe,
                    "netns": spec.netns or "",
                    "cgroup": spec.cgroup,
                    "cgroup_id": placed.cgroup,
                    "veth": spec.veth or "",
                    "addresses": spec.addresses,
                    "source": spec.source,
                    "svid": {"serial": held.leaf.serial, "not_after": held.leaf.not_after} if held else None,
                    "ready": not core.lacks(key),
                    "detail": core.lacks(key),
                }
            )
        links = agent.fleet.links
        return _json(
            {
                "node": agent.options.node,
                "revision": core.applied.revision if core.applied else 0,
                "digest": core.applied.digest if core.applied else "",
                "ready": core.readiness.ready,
                "detail": _detail(agent),
                "generation": core.generation,
                "policy_age_s": None if age is None else round(age, 3),
                "policy_lease_s": agent.lease_s(),
                "controller": {
                    "connected": core.connected,
                    "error": agent.membership.error,
                },
                "workloads": workloads,
                "workloads_error": agent.workloads.file.error or agent.workloads.book.error,
                "proxy": [
                    {
                        "worker": worker.index,
                        "pid": worker.pid,
                        "leaving": worker.leaving,
                        "connected": name in core.workers.views,
                        "revision": worker.acked_revision,
                        "digest_ok": name in core.workers.views and core.workers.holds(name),
                    }
                    for name, worker in sorted(links.items())
                ]
                + [
                    {"worker": name, "pid": 0, "connected": False, "revision": 0, "error": why}
                    for name, why in core.workers.lagging.items()
                ],
                "programs": dict(core.programs),
                "optional": report(agent.off()),
                "moves": agent.work.moves.report(),
            }
        )

    async def ready(self, _: web.Request) -> web.Response:
        readiness = self._agent.core.readiness
        return _json({"ready": readiness.ready, "detail": _detail(self._agent)}, 200 if readiness.ready else 503)

    async def state(self, _: web.Request) -> web.Response:
        """What is enforced here, item by item."""
        enforced = self._agent.core.enforced
        return _json({"revision": enforced.revision, "items": enforced.state})

    async def flows(self, request: web.Request) -> web.StreamResponse:
        try:
            limit = min(max(int(request.query.get("limit", FLOWS_DEFAULT)), 0), RING_FLOWS_MAX)
        except ValueError:
            return _problem(400, "bad_request", "limit must be a number")
        ring = self._agent.ring
        if request.query.get("follow", "0") not in ("1", "true"):
            body = b"".join(msgspec.json.encode(flow) + b"\n" for flow in ring.last(limit))
            return web.Response(body=body, content_type="application/x-ndjson")
        if ring.crowded:
            return _problem(503, "too_many_followers", f"{FOLLOWERS_MAX} readers follow the flows already; close one")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        follower = ring.follow(limit)
        try:
            await response.prepare(request)
            async for flow in follower:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await response.write(msgspec.json.encode(flow) + b"\n")
        except (ConnectionError, TooManyFollowers):
            pass  # the reader left, or came together with another, for whom there was room
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()  # it would not read a polite end either
        finally:
            await follower.aclose()  # type: ignore[attr-defined]  # an async generator
        return response

    async def metrics(self, _: web.Request) -> web.Response:
        workers = await self._agent.fleet.scrape()
        sources = [
            ({}, generate_latest(self._registry).decode()),
            ({}, await asyncio.to_thread(self._agent.kernel_metrics)),  # which may wait for a rollout, or a compiler
            ({"worker": "kernel"}, await self._agent.express.metrics()),
            *(({"worker": index}, text) for index, text in sorted(workers.items())),
        ]
        text = await asyncio.to_thread(merge, sources)
        return web.Response(body=text.encode(), headers={"Content-Type": PROTOCOL_TEXT})

    async def express(self, _: web.Request) -> web.Response:
        return _json(await self._agent.express.status())

    async def top(self, _: web.Request) -> web.Response:
        return _json(await asyncio.to_thread(top, self._agent.options.node, await self._agent.fleet.scrape()))

    # ---- changes

    async def add(self, request: web.Request) -> web.Response:
        """`pillion run`: registered, enforced and served when this answers 201."""
        agent, core = self._agent, self._agent.core
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = msgspec.json.decode(await request.read())
            if isinstance(body, dict) and (body.get("netns") or body.get("addresses")):
                raise WorkloadsError("a workload of the API lives in the node's netns and has its addresses; leave netns out")
            spec = check(
                body,
                "body",
                node_addresses=agent.options.addresses,
                ancestor=str(agent.options.cgroup),
                source="api",
            )
            if not Path(spec.cgroup).is_dir():
                raise WorkloadsError(f"cgroup {spec.cgroup} does not exist; make it first")
            await agent.add_workload(spec)
        except TimeoutError:
            return _problem(408, "body_timeout", f"the body did not arrive within {BODY_TIMEOUT_S:g} s")
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            return _problem(400, "bad_request", f"body: {error}")
        except WorkloadsError as error:
            return _problem(400, "bad_request", str(error))

        def settled() -> bool:
            return bool(self._refusal(spec.key)) or (not core.lacks(spec.key) and core.settled)

        done = await agent.until(settled, ENFORCED_S)
        refusal = self._refusal(spec.key)
        if refusal:
            await agent.remove_workload(spec.key)
            reason, _, message = refusal.partition(": ")
            return _problem(403, reason, message or refusal)
        if not done:
            lacks = core.lacks(spec.key) or core.readiness.detail or "the node has not settled"
            await agent.remove_workload(spec.key)
            return _problem(504, "not_enforced", f"not enforced within {ENFORCED_S:g} s, so it was not added: {lacks}")
        enrolled = next(entry for entry in core.enrolled if entry.spec.key == spec.key)
        answer: dict[str, Any] = {
            "name": spec.name,
            "namespace": spec.namespace,
            "spiffe": enrolled.item.spiffe,
            "addresses": enrolled.item.addresses,
            "cgroup": spec.cgroup,
            "revision": core.applied.revision if core.applied else 0,
        }
        return _json(answer, 201)

    def _refusal(self, key: str) -> str:
        registration = self._agent.core.roster.registrations.get(key)
        return registration.refused if registration else ""

    async def remove(self, request: web.Request) -> web.Response:
        key = f"Workload/{request.match_info['namespace']}/{request.match_info['name']}"
        if not await self._agent.remove_workload(key):
            return _problem(404, "not_found", f"{key} was not added here; those of the workloads file are removed there")
        return _json({})

    async def rotate(self, _: web.Request) -> web.Response:
        return _json({"rotating": self._agent.svids.rotate(), "at": time.time()})


def _detail(agent: Agent) -> str:
    parts = [under_way(), agent.core.readiness.detail]
    if agent.load_error:
        parts.append(agent.load_error)
    if agent.workloads.file.error:
        parts.append(f"workloads file refused: {agent.workloads.file.error}")
    return "; ".join(part for part in parts if part)


class _Own(Collector):  # type: ignore[misc]  # prometheus_client is not followed by mypy
    """The agent's own numbers, read when asked for."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def describe(self) -> list[Any]:
        return []  # names are not checked beforehand

    def collect(self) -> list[Any]:
        agent, core = self._agent, self._agent.core
        counts = core.counts
        events = {
            "snapshot_corrupt": core.intake.corrupt,
            "rollouts": counts.rollouts,
            "kernel_failed": counts.kernel_failed,
            "maps_repaired": counts.repaired,
            "connections_ended": counts.ended,
            "older_ended": agent.work.older_ended,
            **agent.work.moves.counts,
            "workloads_file_refused": agent.workloads.file.refused,
            "flows_missed": agent.ring.missed,
            **agent.counts,
            **{f"worker_{name}": value for name, value in core.workers.counts.items()},
            **{f"svid_{name}": value for name, value in agent.svids.counts.items()},
            **{f"node_{name}": value for name, value in agent.membership.identity.counts.items()},
            **{f"proxy_{name}": value for name, value in agent.fleet.counts.items()},
        }
        total = CounterMetricFamily("pillion_agent_events", "What happened to the agent, by kind.", labels=["kind"])
        for name, value in sorted(events.items()):
            total.add_metric([name], value)
        refusals = CounterMetricFamily(
            "pillion_agent_registrations_refused", "Workloads the controller refused.", labels=["reason"]
        )
        for reason, value in sorted({"identity_not_granted": 0, **core.roster.refused}.items()):
            refusals.add_metric([reason], value)
        flows = CounterMetricFamily("pillion_agent_flows", "Flows seen, by verdict.", labels=["verdict"])
        for verdict, value in sorted(agent.ring.seen.items()):
            flows.add_metric([verdict], value)
        parts = GaugeMetricFamily("pillion_agent_optional_on", "1: this node has this optional part.", labels=["part"])
        for part in INSTEAD:
            parts.add_metric([part], int(part not in agent.off()))
        age = agent.lease.age_s()
        gauges = {
            "pillion_agent_ready": (int(core.readiness.ready), "1 when the node enforces and serves everything it should."),
            "pillion_agent_revision": (core.applied.revision if core.applied else 0, "The revision in force."),
            "pillion_agent_generation": (core.generation, "Bumped when decisions about open connections may change."),
            "pillion_agent_controller_connected": (int(core.connected), "1 while a stream is open."),
            "pillion_agent_policy_age_seconds": (-1 if age is None else age, "Since the controller was last heard; -1: never."),
            "pillion_agent_policy_lease_seconds": (agent.lease_s(), "Past this age nothing new is let in; 0: no limit."),
            "pillion_agent_workloads": (len(core.enrolled), "Workloads enforced."),
            "pillion_agent_workers": (len(core.workers.views), "Proxy workers connected."),
        }
        return [
            total,
            refusals,
            flows,
            parts,
            *(GaugeMetricFamily(name, text, value=value) for name, (value, text) in gauges.items()),
        ]


class _Site(web.UnixSite):
    """A connection past the limit is closed at once."""

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        if server is None:
            raise RuntimeError("aiohttp made no server")

        def protocol() -> asyncio.Protocol:
            return server() if len(server.connections) < CONNECTIONS_MAX else _Turned()

        self._server = await asyncio.get_running_loop().create_unix_server(protocol, self._path, backlog=self._backlog)


class _Turned(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


async def serve(agent: Agent, path: Path) -> web.AppRunner:
    """Listen on ``path`` (0600). A socket left by a former agent is replaced. Raises OSError."""
    runner = web.AppRunner(
        LocalApi(agent).application(),
        access_log=None,
        handle_signals=False,
        shutdown_timeout=1.0,
        keepalive_timeout=IDLE_TIMEOUT_S,
        lingering_time=1.0,
        max_line_size=HEAD_BYTES_MAX,
        max_field_size=HEAD_BYTES_MAX,
        max_headers=HEAD_FIELDS_MAX,
        auto_decompress=False,
    )
    await runner.setup()
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        await _Site(runner, str(path)).start()
    finally:
        os.umask(before)
    return runner
