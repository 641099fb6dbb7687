"""The agent's surroundings in memory: a certificate authority, a controller on loopback, a proxy worker on its socket."""

from __future__ import annotations

import asyncio
import base64
import datetime
import ipaddress
import json
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lab.pace import PATIENCE
from mesh import link, snapshot
from mesh.model import CONFIG_KEY, Config, Identity, State, Workload
from mesh.snapshot import Versioned

DEADLINE_S = 10.0 * PATIENCE


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Returns when the condition holds; fails after a deadline."""
    end = time.monotonic() + DEADLINE_S
    while True:
        found = condition()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return
        assert time.monotonic() < end, what or "the condition never held"
        await asyncio.sleep(0.01)


class Authority:
    """A root that signs what it is asked for."""

    def __init__(self, ttl_s: float = 3600.0) -> None:
        self.ttl_s = ttl_s
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])
        self.root = self._pem(self._build(self._name, self._key.public_key(), [], ca=True))

    def _build(self, subject: x509.Name, public: Any, names: list[x509.GeneralName], ca: bool = False) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(seconds=0 if not ca else 60))
            .not_valid_after(now + datetime.timedelta(seconds=self.ttl_s if not ca else 86400))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    @staticmethod
    def _pem(certificate: x509.Certificate) -> str:
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    def sign(self, csr: str, uri: str) -> str:
        public = x509.load_pem_x509_csr(csr.encode()).public_key()
        return self._pem(self._build(x509.Name([]), public, [x509.UniformResourceIdentifier(uri)]))

    def server_context(self, scratch: Path) -> ssl.SSLContext:
        """Of a controller at 127.0.0.1 that asks for a client's certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier("spiffe://mesh.local/controller"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        chain, private, roots = scratch / "ctl.pem", scratch / "ctl.key", scratch / "roots.pem"
        chain.write_text(self._pem(self._build(x509.Name([]), key.public_key(), names)))
        pkcs8 = serialization.PrivateFormat.PKCS8
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption()))
        roots.write_text(self.root)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, private)
        context.load_verify_locations(roots)
        context.verify_mode = ssl.CERT_OPTIONAL
        return context


class FakeController:
    """Holds a State; `publish` sends what changed to the stream. Knobs: ``granted``, ``silent``, ``refuse_join``,
    ``refuse_stream``: reasons."""

    def __init__(self, authority: Authority, scratch: Path) -> None:
        self.authority, self._scratch = authority, scratch
        self.granted = {"web", "db"}
        self.silent = False
        self.refuse_join = self.refuse_stream = ""
        self.held = Versioned.of({CONFIG_KEY: Config(trust_domain="mesh.local", bundle=(authority.root,))}, 1)
        self.acks: list[snapshot.Ack] = []
        self.nacks: list[snapshot.Nack] = []
        self.ready: list[snapshot.Ready] = []
        self.resumed: list[int] = []
        self.deleted: list[str] = []
        self.signed = 0
        self.port = 0
        self._streams: list[web.WebSocketResponse] = []
        self._runner: web.AppRunner | None = None
        self._next_id = 300

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def token(self, node: str = "n1") -> str:
        body = {"controller": [self.url], "ca": self.authority.root, "node": node, "secret": "s"}
        return base64.urlsafe_b64encode(json.dumps(body).encode()).decode()

    async def start(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/join", self._join),
                web.post("/v1/agent/renew", self._renew),
                web.post("/v1/agent/sign", self._sign),
                web.put("/v1/agent/workloads/{namespace}/{name}", self._register),
                web.delete("/v1/agent/workloads/{namespace}/{name}", self._unregister),
                web.get("/v1/agent/stream", self._stream),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(
            self._runner, "127.0.0.1", self.port, ssl_context=self.authority.server_context(self._scratch), reuse_address=True
        )
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            for stream in self._streams:
                if stream._req is not None and stream._req.transport is not None:
                    stream._req.transport.abort()
            self._streams.clear()
            await self._runner.cleanup()
            self._runner = None

    async def publish(self, state: State) -> int:
        """The next revision, to every stream as a delta."""
        self.held, delta = self.held.next(state, self.held.revision + 1)
        await self.send(snapshot.encode(delta))
        return self.held.revision

    async def change(self, **items: Any) -> int:
        return await self.publish({**self.held.state, **items})

    async def send(self, frame: bytes) -> None:
        for stream in self._streams:
            await stream.send_str(frame.decode())

    async def _join(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.refuse_join:
            return web.json_response({"error": "no", "reason": self.refuse_join}, status=403)
        chain = self.authority.sign(body["csr"], f"spiffe://mesh.local/node/{body['node']}")
        return web.json_response({"chain": chain, "bundle": self.authority.root})

    async def _renew(self, request: web.Request) -> web.Response:
        chain = self.authority.sign((await request.json())["csr"], "spiffe://mesh.local/node/n1")
        return web.json_response({"chain": chain, "bundle": self.authority.root})

    async def _sign(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.signed += 1
        return web.json_response({"chain": self.authority.sign(body["csr"], body["spiffe"])})

    async def _register(self, request: web.Request) -> web.Response:
        assert request.transport is not None and request.transport.get_extra_info("peercert"), "agents authenticate"
        body = await request.json()
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        account = body["service_account"]
        if account not in self.granted:
            return web.json_response({"error": "ask an operator", "reason": "identity_not_granted"}, status=403)
        spiffe = f"spiffe://mesh.local/ns/{namespace}/sa/{account}"
        known = self.held.state.get(f"Identity//{spiffe}")
        identity = known if isinstance(known, Identity) else Identity(256 + len(self.held.state), spiffe)
        self._next_id += 1
        item = Workload(
            id=self._next_id,
            name=name,
            namespace=namespace,
            node="n1",
            identity=identity.id,
            spiffe=spiffe,
            addresses=tuple(body["addresses"]),
            labels=body["labels"],
        )
        if f"Workload/{namespace}/{name}" not in self.held.state:
            await self.publish({**self.held.state, f"Identity//{spiffe}": identity, f"Workload/{namespace}/{name}": item})
        return web.json_response({"revision": self.held.revision})

    async def _unregister(self, request: web.Request) -> web.Response:
        key = f"Workload/{request.match_info['namespace']}/{request.match_info['name']}"
        self.deleted.append(key)
        await self.publish({known: item for known, item in self.held.state.items() if known != key})
        return web.json_response({"revision": self.held.revision})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        if self.refuse_stream:
            return web.json_response({"error": "no", "reason": self.refuse_stream}, status=403)
        revision = int(request.query["revision"])
        self.resumed.append(revision)
        stream = web.WebSocketResponse()
        await stream.prepare(request)
        if self.silent:
            await asyncio.sleep(60)
        self._streams.append(stream)
        if revision != self.held.revision:
            await stream.send_str(snapshot.encode(self.held.snapshot()).decode())
        async for frame in stream:
            if frame.type is not WSMsgType.TEXT:
                break
            message = snapshot.decode_agent(frame.data)
            match message:
                case snapshot.Ack():
                    self.acks.append(message)
                case snapshot.Nack():
                    self.nacks.append(message)
                    await stream.send_str(snapshot.encode(self.held.snapshot()).decode())
                case snapshot.Ready():
                    self.ready.append(message)
        if stream in self._streams:
            self._streams.remove(stream)
        return stream


class FakeWorker:
    """Listens as a proxy worker does and keeps what it is told. ``answers``: whether it acknowledges."""

    def __init__(self, path: Path, index: int = 0, born: int = 0) -> None:
        self.path, self.index, self.born = path, index, born  # born: its proxy's generation
        self.answers = True
        self.lies = False
        self.connections = 0
        self.reset()
        self._task: asyncio.Task[None] | None = None
        self._connection: socket.socket | None = None

    def reset(self) -> None:
        self.hello: link.Hello | None = None
        self.state: State = {}
        self.local: tuple[link.LocalWorkload, ...] = ()
        self.generation = 0
        self.svids: dict[str, tuple[str, bytes]] = {}
        self.listeners: dict[str, link.Listener] = {}
        self.stock: dict[tuple[int, int], int] = {}
        self.order: list[str] = []
        self.drains: list[float] = []
        self.leased_ns = 0

    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listening.bind(str(self.path))
        listening.listen(4)
        self._task = asyncio.create_task(self._accept(listening))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self.path.unlink(missing_ok=True)

    def hang_up(self) -> None:
        if self._connection is not None:
            self._connection.shutdown(socket.SHUT_RDWR)

    def say(self, message: link.Message) -> None:
        assert self._connection is not None
        self._connection.send(link.encode(message))

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._connection, _ = await loop.sock_accept(listening)
                self.reset()
                self.connections += 1
                self.say(link.Ready(self.index, os.getpid(), self.born))
                await self._serve(self._connection)
                self._connection.close()
        finally:
            listening.close()
            if self._connection is not None:
                self._connection.close()

    async def _serve(self, connection: socket.socket) -> None:
        decoder = link.Decoder()
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(connection, readable.set)
        try:
            while True:
                await readable.wait()
                readable.clear()
                try:
                    data, fds, _, _ = socket.recv_fds(connection, 1 << 20, 253)
                except BlockingIOError:
                    continue
                except OSError:
                    return
                if not data:
                    return
                for message, taken in decoder.feed(data, fds):
                    self._take(message, taken)
                    for fd in taken:
                        os.close(fd)
                if loop.time():
                    readable.set()
        finally:
            loop.remove_reader(connection)

    def _take(self, message: link.Message, fds: list[int]) -> None:
        self.order.append(type(message).__name__)
        match message:
            case link.Hello():
                self.hello = message
            case link.Update():
                self.state = {} if message.full else dict(self.state)
                for key in message.delete:
                    del self.state[key]
                self.state.update(message.put)
                self.local, self.generation = message.local, message.generation
                if self.answers:
                    self.say(link.Ack(message.revision, "0" * 64 if self.lies else snapshot.digest(self.state)))
            case link.Listener():
                assert len(fds) == 1
                self.listeners[message.id] = message
            case link.CloseListener():
                del self.listeners[message.id]
            case link.Svid():
                self.svids[message.spiffe] = message.serial, os.pread(fds[0], 65536, 0)
            case link.DropSvid():
                del self.svids[message.spiffe]
            case link.Stock():
                key = message.netns, message.family
                self.stock[key] = self.stock.get(key, 0) + len(fds)
            case link.Drain():
                self.drains.append(message.seconds)
            case link.Lease():
                self.leased_ns = message.until_ns
            case link.Scrape():
                text = "# HELP pillion_requests_total r\n# TYPE pillion_requests_total counter\npillion_requests_total 3\n"
                self.say(link.Metrics(self.index, text))
