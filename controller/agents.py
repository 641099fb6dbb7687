"""The agent API: join with a token, certificates for the node and its workloads, registration, the stream."""

from __future__ import annotations

import asyncio
import time

import msgspec
from aiohttp import web

from controller import tokens
from controller.ca import Authority, Issued, Request
from controller.events import Refused, Telemetry
from controller.grants import Grants
from controller.messages import certificate, decode, label, parse
from controller.publish import Publisher
from controller.registry import Registry
from controller.server import CALLER, answer, body_of
from controller.store import Check, Conflict, Put, Store
from controller.streams import NodeStream
from mesh.identity import IdentityError, NodeId, SpiffeId

JOINS_MAX = 16  # at once; a join costs public key work before anything is known of the asker
LIVE_CERTIFICATES_MAX = 20_000  # of one node: what a cut would have to revoke


class JoinBody(msgspec.Struct, forbid_unknown_fields=True):
    node: str
    secret: str
    csr: str


class RenewBody(msgspec.Struct, forbid_unknown_fields=True):
    csr: str


class SignBody(msgspec.Struct, forbid_unknown_fields=True):
    csr: str
    spiffe: str


class WorkloadBody(msgspec.Struct, forbid_unknown_fields=True):
    service_account: str
    addresses: list[str] = []
    labels: dict[str, str] = {}


class AgentApi:
    def __init__(
        self, store: Store, authority: Authority, registry: Registry, grants: Grants, publisher: Publisher, telemetry: Telemetry
    ) -> None:
        self._store, self._authority, self._registry, self._grants = store, authority, registry, grants
        self._publisher, self._telemetry = publisher, telemetry
        self._joins = asyncio.Semaphore(JOINS_MAX)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/join", self.join),
            web.post("/v1/agent/renew", self.renew),
            web.post("/v1/agent/sign", self.sign),
            web.put("/v1/agent/workloads/{namespace}/{name}", self.register),
            web.delete("/v1/agent/workloads/{namespace}/{name}", self.unregister),
            web.get("/v1/agent/stream", self.stream),
        ]

    async def join(self, request: web.Request) -> web.Response:
        source = request[CALLER].address
        body = decode(await body_of(request), JoinBody)
        async with self._joins:
            return await self._join(body, source)

    async def _join(self, body: JoinBody, source: str) -> web.Response:
        node = label(body.node, "node")
        record_key = f"token/{tokens.digest(body.secret)}"
        entry = await self._store.get(record_key)
        if entry is None:  # before any public key work for a stranger
            raise self._refuse(tokens.judge(None, node, 0, "", 0.0), node, source)
        record = msgspec.json.decode(entry.value, type=tokens.Record)
        asked = await parse(body.csr)
        refusal = tokens.judge(record, node, self._registry.grant_made(node), asked.fingerprint, time.time())
        if refusal is not None:
            raise self._refuse(refusal, node, source)
        issued = await self._issue_node(asked, node)
        used = msgspec.structs.replace(record, used_key=asked.fingerprint)
        checks = [Check(record_key, entry.revision)]
        try:
            await self._registry.admit(
                node, checks, [Put(record_key, msgspec.json.encode(used)), issued.index()], readmit=record.readmit
            )
        except Conflict:  # another use of the same token was quicker
            raise self._refuse(tokens.judge(used, node, record.grant, asked.fingerprint, 0.0), node, source) from None
        self._telemetry.signed.labels("node").inc()
        return self._issued(issued)

    async def renew(self, request: web.Request) -> web.Response:
        node = request[CALLER].name
        asked = await parse(decode(await body_of(request), RenewBody).csr)
        issued = await self._issue_node(asked, node)
        await self._record(issued, node)
        self._telemetry.signed.labels("node").inc()
        return self._issued(issued)

    async def sign(self, request: web.Request) -> web.Response:
        caller = request[CALLER]
        body = decode(await body_of(request), SignBody)
        try:
            spiffe = SpiffeId.parse(body.spiffe)
        except IdentityError as error:
            raise Refused("bad_request", str(error), 400, node=caller.name, source=caller.address) from error
        asked = await parse(body.csr)
        self._grants.check_sign(caller.name, spiffe, caller.address)
        issued = await asyncio.to_thread(
            self._authority.sign, asked, str(spiffe), f"node:{caller.name}", ttl_s=self._registry.leaf_ttl_s
        )
        await self._record(issued, caller.name, spiffe)
        self._telemetry.signed.labels("workload").inc()
        return self._issued(issued)

    async def register(self, request: web.Request) -> web.Response:
        caller = request[CALLER]
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        body = decode(await body_of(request), WorkloadBody)
        revision = await self._registry.register(
            caller.name, namespace, name, body.service_account, body.addresses, body.labels, source=caller.address
        )
        return answer({"revision": revision})

    async def unregister(self, request: web.Request) -> web.Response:
        caller = request[CALLER]
        revision = await self._registry.unregister(caller.name, request.match_info["namespace"], request.match_info["name"])
        return answer({"revision": revision})

    async def stream(self, request: web.Request) -> web.WebSocketResponse:
        caller = request[CALLER]
        try:
            revision = int(request.query.get("revision", "0"))
        except ValueError:
            raise Refused("bad_request", "revision must be a number", 400, node=caller.name) from None
        view = self._publisher.node(caller.name)

        def refused() -> str:
            if self._registry.is_cut(caller.name):
                return "cut"
            return "certificate_revoked" if caller.serial in self._registry.revoked else ""

        stream = NodeStream(self._publisher, self._telemetry, view, caller.expires, refused)
        return await stream.serve(request, revision)

    async def _issue_node(self, asked: Request, node: str) -> Issued:
        spiffe = str(NodeId(self._registry.trust_domain, node))
        return await asyncio.to_thread(self._authority.sign, asked, spiffe, f"node:{node}")

    async def _record(self, issued: Issued, node: str, spiffe: SpiffeId | None = None) -> None:
        """Indexes a certificate if the node may still have it: a cut or a lost grant meanwhile wins."""
        async with self._registry.lock:
            if self._registry.is_cut(node):
                raise Refused("node_cut", f"node {node} is cut; an operator must admit it again with a new token", node=node)
            if spiffe is not None:
                self._grants.check_sign(node, spiffe, "")
            _, live = await self._store.list(f"serial/node:{node}/")
            if len(live) >= LIVE_CERTIFICATES_MAX:
                raise Refused(
                    "too_many_certificates",
                    f"node {node} has {len(live)} live certificates; wait for some to expire, or cut it if that is a surprise",
                    429,
                    node=node,
                )
            await self._store.transaction([], [issued.index()])

    def _issued(self, issued: Issued) -> web.Response:
        return certificate(issued, self._authority, trust_domain=self._registry.trust_domain)

    @staticmethod
    def _refuse(refusal: tokens.Refusal | None, node: str, source: str) -> Refused:
        refusal = refusal or tokens.Refusal("token_used", "the token was used already; ask an operator for a new one")
        return Refused(refusal.reason, refusal.message, node=node, source=source)
