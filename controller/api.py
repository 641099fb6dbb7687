"""The operator API: resources, status, nodes, identities, the state as a whole, certificates, metrics."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import asdict

import msgspec
from aiohttp import web
from prometheus_client import generate_latest

from controller import revocation, tokens
from controller.allocate import Exhausted
from controller.ca import Authority, BadRequest
from controller.events import Refused, Telemetry
from controller.messages import certificate, decode, label, parse
from controller.publish import Publisher
from controller.registry import Registry
from controller.server import CALLER, Tls, answer, body_of
from controller.status import WAIT_S_MAX, WAITERS_MAX, Status
from controller.store import Put, Store
from mesh.compile import needs
from mesh.identity import OperatorId
from mesh.resources import ResourceErrors, dump
from mesh.snapshot import encode_state

OPERATOR_TTL_S = 30 * 86400.0
FILENAME_CHARS_MAX = 256


class TokenBody(msgspec.Struct, forbid_unknown_fields=True):
    ttl_s: float = tokens.TTL_S_MAX
    readmit: bool = False


class CutBody(msgspec.Struct, forbid_unknown_fields=True):
    force: bool = False  # also a node nobody has heard of


class OperatorBody(msgspec.Struct, forbid_unknown_fields=True):
    csr: str  # PEM; the key stays where it was made


class RotateBody(msgspec.Struct, forbid_unknown_fields=True):
    step: str  # prepare | activate | retire
    generation: int = 0


class OperatorApi:
    def __init__(
        self,
        store: Store,
        authority: Authority,
        registry: Registry,
        publisher: Publisher,
        status: Status,
        telemetry: Telemetry,
        tls: Tls,
        controllers: list[str],
    ) -> None:
        self._store, self._authority, self._registry, self._publisher = store, authority, registry, publisher
        self._status, self._telemetry, self._tls, self._controllers = status, telemetry, tls, controllers

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/apply", self.apply),
            web.post("/v1/apply/dry-run", self.dry_run),  # no parameter of apply: who does not know one would apply
            web.get("/v1/resources", self.resources),
            web.delete("/v1/resources/{kind}/{namespace}/{name}", self.delete),
            web.get("/v1/status", self.status),
            web.get("/v1/wait", self.wait),
            web.post("/v1/nodes/{name}/token", self.token),
            web.post("/v1/nodes/{name}/cut", self.cut),
            web.get("/v1/identities", self.identities),
            web.get("/v1/state", self.state),
            web.get("/v1/events", self.events),
            web.get("/v1/operators", self.operators),
            web.post("/v1/operators/{name}", self.operator),
            web.delete("/v1/operators/{name}", self.revoke_operator),
            web.post("/v1/certificates/{serial}/revoke", self.revoke),
            web.get("/v1/ca", self.ca),
            web.post("/v1/ca/rotate", self.rotate),
            web.get("/metrics", self.metrics),
        ]

    async def apply(self, request: web.Request) -> web.Response:
        return await self._apply(request, dry_run=False)

    async def dry_run(self, request: web.Request) -> web.Response:
        """What `apply` would answer, at the revision that stays."""
        return await self._apply(request, dry_run=True)

    async def _apply(self, request: web.Request, *, dry_run: bool) -> web.Response:
        filename = request.query.get("filename", "<text>")[:FILENAME_CHARS_MAX]
        try:
            text = (await body_of(request)).decode()
            revision, results = await self._registry.apply(text, filename, dry_run=dry_run)
        except UnicodeDecodeError as error:
            return _errors(
                [{"file": filename, "line": 1, "field": "", "message": f"not UTF-8: {error}", "remedy": "save it as UTF-8"}]
            )
        except ResourceErrors as errors:
            return _errors([asdict(error) for error in errors.errors])
        except Exhausted as error:
            return _errors([{"file": filename, "line": 0, "field": "", "message": str(error), "remedy": "make another mesh"}])
        return answer({"revision": revision, "results": results})

    async def resources(self, request: web.Request) -> web.Response:
        query = request.query
        namespace = query.get("namespace", "")
        wanted = query.get("kind", ""), "" if namespace == "-" else namespace, query.get("name", "")
        revision = self._registry.revision
        items = await asyncio.to_thread(lambda: [dump(stored.resource) for stored in self._registry.get(*wanted)])
        return answer({"revision": revision, "items": items})

    async def delete(self, request: web.Request) -> web.Response:
        match = request.match_info
        namespace = "" if match["namespace"] == "-" else match["namespace"]
        return answer({"revision": await self._registry.delete(match["kind"], namespace, match["name"])})

    async def status(self, _: web.Request) -> web.Response:
        return answer(
            {
                "revision": self._registry.revision,
                "published": self._publisher.revision,
                "error": self._publisher.error,
                "trust_domain": self._registry.trust_domain,
                "nodes": self._status.nodes(),
            }
        )

    async def wait(self, request: web.Request) -> web.Response:
        try:
            revision = int(request.query.get("revision", str(self._registry.revision)))
            timeout_s = float(request.query.get("timeout", "30"))
        except ValueError as error:
            raise Refused("bad_request", f"revision is a whole number, timeout a number of seconds: {error}", 400) from error
        if not math.isfinite(timeout_s) or not 0 <= timeout_s <= WAIT_S_MAX:
            raise Refused("bad_request", f"timeout must be 0 to {WAIT_S_MAX:g} s", 400)
        if revision > await self._store.revision():
            raise Refused("bad_request", f"revision {revision} does not exist yet; the newest is {self._registry.revision}", 400)
        if self._status.waiting >= WAITERS_MAX:
            raise Refused("too_many_waiters", f"{WAITERS_MAX} clients wait already; try again", 429)
        # A revision past the last one nodes could notice (a token's, say) is reached when that one is.
        late = await self._status.wait(min(revision, self._registry.revision), timeout_s)
        if not late:
            return answer({"revision": revision, "published": self._publisher.revision})
        names = ", ".join(f"{item['name']} (at {item['acked']})" for item in late)
        return answer({"error": f"revision {revision} is not applied by: {names}", "laggards": late}, 504)

    async def token(self, request: web.Request) -> web.Response:
        node = label(request.match_info["name"], "node")
        body = decode(await body_of(request), TokenBody)
        if self._registry.is_cut(node) and not body.readmit:
            raise Refused("node_cut", f'node {node} is cut; say {{"readmit": true}} to admit it again', 409, node=node)
        try:
            secret, record = tokens.issue(node, self._registry.grant_made(node), body.ttl_s, readmit=body.readmit)
        except ValueError as error:
            raise Refused("bad_request", str(error), 400) from error
        _, outstanding = await self._store.list("token/")
        if len(outstanding) >= tokens.OUTSTANDING_MAX:
            raise Refused("too_many_tokens", f"{len(outstanding)} tokens are outstanding; wait for some to expire", 429)
        await self._store.transaction([], [Put(f"token/{tokens.digest(secret)}", msgspec.json.encode(record))])
        token = tokens.encode(self._controllers, "".join(self._authority.bundle), node, secret)
        return answer({"token": token, "expires": record.expires})

    async def cut(self, request: web.Request) -> web.Response:
        node = label(request.match_info["name"], "node")
        body = decode(await body_of(request), CutBody)
        if not body.force and not await self._known(node):
            raise Refused("not_found", f"no node {node} has joined, is granted anything or has a token; is the name right?", 404)
        revision = await self._registry.cut(node)
        view = self._publisher.nodes.get(node)
        if view is not None and view.close is not None:
            view.close("cut")
        return answer({"revision": revision})

    async def _known(self, node: str) -> bool:
        """Whether the node is in, or could come in."""
        registry, now = self._registry, time.time()
        if node in registry.nodes or registry.is_cut(node) or registry.grant_made(node):
            return True
        _, entries = await self._store.list("token/")
        records = (msgspec.json.decode(entry.value, type=tokens.Record) for entry in entries)
        return any(record.node == node and not record.used_key and record.expires > now for record in records)

    async def identities(self, _: web.Request) -> web.Response:
        revision = self._registry.revision
        return answer({"revision": revision, "items": await asyncio.to_thread(self._identities)})

    def _identities(self) -> list[dict[str, object]]:
        registry = self._registry
        live: dict[str, list[str]] = {}
        for stored in registry.get("Workload"):
            for spiffe in needs([stored.resource], registry.trust_domain).identities:
                live.setdefault(spiffe, []).append("/".join(stored.resource.key[1:]))
        return [
            {"spiffe": spiffe, "id": number, "workloads": sorted(live.get(spiffe, []))}
            for spiffe, number in sorted(registry.identities().items())
        ]

    async def state(self, _: web.Request) -> web.Response:
        revision, state = await asyncio.to_thread(self._publisher.whole)
        items = await asyncio.to_thread(encode_state, state)
        return answer({"revision": revision, "items": msgspec.Raw(items)})

    async def events(self, _: web.Request) -> web.Response:
        return answer({"items": list(self._telemetry.events)})

    async def operator(self, request: web.Request) -> web.Response:
        name = label(request.match_info["name"], "operator")
        body = decode(await body_of(request), OperatorBody)
        asked = await parse(body.csr)
        spiffe = str(OperatorId(self._registry.trust_domain, name))
        issued = await asyncio.to_thread(self._authority.sign, asked, spiffe, f"operator:{name}", ttl_s=OPERATOR_TTL_S)
        await self._store.transaction([], [issued.index()])
        self._telemetry.signed.labels("operator").inc()
        return certificate(issued, self._authority, controller=self._controllers)

    async def operators(self, _: web.Request) -> web.Response:
        items = [
            {
                "name": found.owner.removeprefix("operator:"),
                "serial": found.serial,
                "not_after": found.leaf.not_after,
                "revoked": found.serial in self._registry.revoked,
            }
            for found in await revocation.issued(self._store, "operator:")
        ]
        return answer({"items": items})

    async def revoke_operator(self, request: web.Request) -> web.Response:
        name = label(request.match_info["name"], "operator")
        return answer({"revision": await self._registry.revoke(revocation.of_operator(name))})

    async def revoke(self, request: web.Request) -> web.Response:
        """One certificate: nodes end what it has open, and its owner gets another if it may still have one."""
        found = await revocation.by_serial(self._store, request.match_info["serial"])
        revision = await self._registry.revoke(revocation.one(found))
        return answer({"revision": revision, "serial": found.serial, "spiffe": found.leaf.spiffe, "owner": found.owner})

    async def ca(self, _: web.Request) -> web.Response:
        return answer({"active": self._authority.active.id, "generations": sorted(self._authority.generations)})

    async def rotate(self, request: web.Request) -> web.Response:
        """One step of a root rotation; between the steps wait for the revision, and before retiring for the leaves."""
        if request[CALLER].name != "root":
            raise Refused("not_root", "the authority's roots are changed on the controller's own socket only")
        body = decode(await body_of(request), RotateBody)
        number = body.generation
        try:
            match body.step:
                case "prepare":
                    number = await self._authority.prepare_rotation()
                case "activate":
                    await self._authority.activate(number)
                case "retire":
                    await self._authority.retire(number)
                case _:
                    raise BadRequest("step is prepare, activate or retire")
        except BadRequest as error:
            raise Refused("bad_request", str(error), 409) from error
        await self._tls.renew()
        return answer({"generation": number, "revision": await self._registry.bundle_changed()})

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._telemetry.registry), headers={"Content-Type": "text/plain; version=0.0.4"})


def _errors(errors: list[dict[str, object]]) -> web.Response:
    return answer({"errors": errors}, 400)
