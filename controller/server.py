"""The listening side: TLS from our own authority, limits on everything a peer can grow, and who is asking.

A client certificate is optional in the handshake and checked for each route: it must be one we issued (its serial is
in the index), honoured still, for the role the route wants. The unix socket is root's and needs none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog
from aiohttp import web

from controller.ca import Authority, Leaf, key_pem, new_key, request_for, serial_text
from controller.events import STRANGER, Refused, Telemetry
from controller.listener import Limits, TlsListener
from controller.registry import Registry
from controller.store import Store, StoreError
from mesh.identity import ControllerId, IdentityError, NodeId, OperatorId, parse

BODY_BYTES_MAX = 4 << 20
HEAD_BYTES_MAX = 8190  # of a line, and of a field
HEAD_FIELDS_MAX = 64
IDLE_TIMEOUT_S = 15.0  # also of a head that does not end
BODY_TIMEOUT_S = 20.0
LINGER_S = 1.0  # for a body nobody wants
REQUEST_TIMEOUT_S = 60.0
HANDSHAKE_TIMEOUT_S = 10.0
HANDSHAKES_MAX, HANDSHAKES_PER_SOURCE_MAX = 512, 64  # at a time, on one listener
CONNECTIONS_MAX, CONNECTIONS_PER_SOURCE_MAX = 4096, 1024  # nodes may share an address: theirs to the outside
BACKLOG = 512

log = structlog.get_logger()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Caller:
    """Who asks. role: node | operator | nobody. ``expires``: unix seconds at which the certificate ``serial`` ends."""

    role: str
    name: str
    expires: float
    address: str
    serial: str = ""


CALLER: web.RequestKey[Caller] = web.RequestKey("caller", Caller)


def answer(body: object, status: int = 200) -> web.Response:
    """JSON, newline at the end for people with curl."""
    return web.Response(body=msgspec.json.encode(body) + b"\n", status=status, content_type="application/json")


async def body_of(request: web.Request) -> bytes:
    """The whole body, within the limits of size and time."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise Refused("body_timeout", f"the body did not arrive within {BODY_TIMEOUT_S:g} s", 408) from None


class Tls:
    """The server's TLS context, renewed without closing the listener."""

    def __init__(self, authority: Authority, store: Store, trust_domain: str, addresses: Sequence[str]) -> None:
        self._authority, self._store, self._addresses = authority, store, list(addresses)
        self._spiffe = str(ControllerId(trust_domain))
        self._current = _context(authority.bundle, None, None)  # has no certificate until `renew`
        self.renew_at = 0.0

    async def renew(self) -> None:
        """A new key and certificate, and the authority's bundle as it is now. New connections use them."""
        key = new_key()
        issued = await asyncio.to_thread(
            self._authority.sign, request_for(key), self._spiffe, "controller", addresses=self._addresses
        )
        await self._store.transaction([], [issued.index()])
        self._current = _context(self._authority.bundle, issued.chain, key_pem(key))
        self.renew_at = time.time() + (issued.not_after - time.time()) / 2

    def listening(self) -> ssl.SSLContext:
        """The context to listen with; each handshake is moved to the newest one."""
        context = _context(self._authority.bundle, None, None)

        def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            del name
            connection.context = self._current

        context.sni_callback = choose
        return context


def _context(bundle: Sequence[str], chain: str | None, key: bytes | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["http/1.1"])
    context.load_verify_locations(cadata="".join(bundle))
    if chain is not None and key is not None:
        # OpenSSL reads files only; a memfd is one that no disk ever sees.
        descriptor = os.memfd_create("pillion-controller-key", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, key + chain.encode())
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    return context


class Gate:
    """The middleware: who asks, is it allowed on this route, how long may it take, and errors as JSON."""

    def __init__(self, store: Store, authority: Authority, registry: Registry, telemetry: Telemetry, trust_domain: str) -> None:
        self._store, self._authority, self._registry, self._telemetry = store, authority, registry, telemetry
        self._trust_domain = trust_domain

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = resource.canonical if resource else "none"
        known = ""
        try:
            caller = await self._identify(request)
            request[CALLER] = caller
            known = f"{caller.role} {caller.name}" if caller.name else ""
            _allow(route, caller)
            if route in UNTIMED:
                response = await handler(request)
            else:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    response = await handler(request)
        except Refused as refusal:
            self._telemetry.refused(refusal, self._registry.revision, known)
            response = answer({"error": str(refusal), "reason": refusal.reason}, refusal.status)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            response = answer({"error": f"{error.reason}: {request.method} {request.path[:200]}"}, error.status)
        except TimeoutError:
            response = answer({"error": f"not done within {REQUEST_TIMEOUT_S:g} s; look at the controller's log"}, 504)
        except StoreError as error:
            if self._telemetry.sparing.passes("store failed", route, known or STRANGER):
                log.error("store failed", route=route, error=str(error))
            response = answer({"error": str(error)}, 503)
        except Exception:
            if self._telemetry.sparing.passes("request failed", route, known or STRANGER):
                log.exception("request failed", route=route)
            response = answer({"error": "the controller failed on this request; its log has the trace"}, 500)
        self._telemetry.requests.labels(route, str(response.status)).inc()
        return response

    async def _identify(self, request: web.Request) -> Caller:
        transport = request.transport
        if transport is None:
            raise Refused("gone", "the connection is gone", 400)
        raw: socket.socket = transport.get_extra_info("socket")
        if raw.family == socket.AF_UNIX:
            _, uid, _ = struct.unpack("iII", raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in (0, os.getuid()):
                raise Refused("not_root", f"uid {uid} may not use the controller's socket; use root or an operator certificate")
            return Caller("operator", "root", float("inf"), "unix")
        address = str((transport.get_extra_info("peername") or ("?",))[0])
        certificate = transport.get_extra_info("peercert")
        if not certificate:
            return Caller(STRANGER, "", float("inf"), address)
        return await self._certified(certificate, address)

    async def _certified(self, certificate: dict[str, Any], address: str) -> Caller:
        """The role of a certificate OpenSSL found good. Only what the index knows is believed."""
        names = certificate.get("subjectAltName", ())
        if len(names) != 1 or names[0][0] != "URI":
            raise Refused("certificate_san", "the client certificate must carry exactly one URI SAN", source=address)
        spiffe = names[0][1]
        try:
            who = parse(spiffe)
        except IdentityError as error:
            raise Refused("certificate_san", f"client certificate: {error}", source=address) from error
        if who.trust_domain != self._trust_domain or not isinstance(who, NodeId | OperatorId):
            raise Refused(
                "certificate_role", f"{spiffe} is neither a node nor an operator of this mesh", spiffe=spiffe, source=address
            )
        role = "node" if isinstance(who, NodeId) else "operator"
        serial = serial_text(certificate["serialNumber"])
        found = await self._store.get(f"serial/{role}:{who.name}/{serial}")
        refusal = {"spiffe": spiffe, "source": address, "node": who.name if role == "node" else ""}
        if found is None:
            raise Refused(
                "certificate_unknown", f"certificate {serial} is not in the index of issued ones; join again", **refusal
            )
        leaf = msgspec.json.decode(found.value, type=Leaf)
        if role == "node" and self._registry.is_cut(who.name):
            raise Refused("node_cut", f"node {who.name} is cut; an operator must admit it again with a new token", **refusal)
        if serial in self._registry.revoked or leaf.spiffe != spiffe or leaf.generation not in self._authority.generations:
            raise Refused("certificate_revoked", f"certificate {serial} is revoked; join again with a new token", **refusal)
        if leaf.not_after <= time.time():
            raise Refused("certificate_expired", f"certificate {serial} has expired; join again with a new token", **refusal)
        return Caller(role, who.name, leaf.not_after, address, serial)


UNTIMED = {"/v1/agent/stream", "/v1/wait"}  # they limit themselves
OPEN = {"/v1/join"}


def _allow(route: str, caller: Caller) -> None:
    """A node may use the agent API only, an operator everything else; the rest of the world may join."""
    if route in OPEN:
        return
    wanted = "node" if route.startswith("/v1/agent/") else "operator"
    if caller.role != wanted:
        shown = f"{caller.role} {caller.name}".strip()
        raise Refused(
            "wrong_role",
            f"{route} is for a certificate of a{'n operator' if wanted == 'operator' else ' node'}, this is {shown}",
            401 if caller.role == STRANGER else 403,
            node=caller.name if caller.role == "node" else "",
            source=caller.address,
        )


class _Turned(asyncio.Protocol):
    """What a connection past the limit gets: the end."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class Listener(Protocol):
    """`close` ends accepting, and no connection."""

    def close(self) -> None: ...


class ListenContext(Protocol):
    """See `Tls`."""

    def listening(self) -> ssl.SSLContext: ...


async def serve(
    app: web.Application,
    listen: Sequence[tuple[str, int]],
    tls: ListenContext,
    unix: Path,
    turned_away: Callable[[], None] = lambda: None,  # told of each connection that finds no room
) -> tuple[web.AppRunner, list[Listener]]:
    """Starts every listener; OSError names the address that is taken."""
    runner = web.AppRunner(
        app,
        access_log=None,
        keepalive_timeout=IDLE_TIMEOUT_S,
        lingering_time=LINGER_S,
        shutdown_timeout=3.0,
        max_line_size=HEAD_BYTES_MAX,
        max_field_size=HEAD_BYTES_MAX,
        max_headers=HEAD_FIELDS_MAX,
        auto_decompress=False,
    )
    await runner.setup()
    server = runner.server
    if server is None:
        raise RuntimeError("aiohttp made no server")
    loop, context = asyncio.get_running_loop(), tls.listening()
    servers: list[Listener] = []
    limits = Limits(HANDSHAKE_TIMEOUT_S, HANDSHAKES_MAX, HANDSHAKES_PER_SOURCE_MAX, CONNECTIONS_PER_SOURCE_MAX)

    def full() -> bool:
        return len(server.connections) >= CONNECTIONS_MAX

    def local() -> asyncio.Protocol:
        if not full():
            return server()
        turned_away()
        return _Turned()

    for host, port in listen:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        servers.append(
            TlsListener(
                socket.create_server((host, port), family=family, backlog=BACKLOG), context, server, full, limits, turned_away
            )
        )
    with contextlib.suppress(FileNotFoundError):
        unix.unlink()
    old = os.umask(0o177)  # the socket must not be anybody's for an instant
    try:
        servers.append(await loop.create_unix_server(local, str(unix), backlog=BACKLOG))
    finally:
        os.umask(old)
    return runner, servers
