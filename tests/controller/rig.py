"""A real controller process on loopback, and clients with and without certificates."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lab.pace import PATIENCE
from mesh.snapshot import Ack, Delta, Nack, Ready, ServerMessage, Snapshot, Versioned, decode_server, encode

ROOT = Path(__file__).parents[2]
SHOP = """
apiVersion: mesh.pillion.dev/v1alpha1
kind: NodeGrant
metadata: {name: n1}
spec: {node: n1, serviceAccounts: [shop/web, shop/pay]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080, name: http}]}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: all, namespace: shop}
spec: {action: ALLOW, rules: [{}]}
"""


def free_port() -> int:
    """None that the kernel would give to a connection of another test, before the controller has it or while it is away."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def csr_for(key: ec.EllipticCurvePrivateKey) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem_of(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()


class Client:
    """HTTP to one controller, with a certificate or none, or over the unix socket."""

    def __init__(self, session: aiohttp.ClientSession, base: str, context: ssl.SSLContext | None) -> None:
        self.session, self._base, self._context = session, base, context

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        data = body.encode() if isinstance(body, str) else None if body is None else json.dumps(body).encode()
        options: dict[str, Any] = {"ssl": self._context} if self._context else {}
        async with self.session.request(method, self._base + path, data=data, **options) as response:
            raw = await response.read()
            return response.status, json.loads(raw) if response.content_type == "application/json" else raw.decode()

    async def ok(self, method: str, path: str, body: object = None) -> Any:
        status, answer = await self.call(method, path, body)
        assert status == 200, answer
        return answer

    @contextlib.asynccontextmanager
    async def stream(self, revision: int = 0) -> AsyncIterator[Stream]:
        socket_ = await self.session.ws_connect(
            f"{self._base}/v1/agent/stream?revision={revision}", ssl=self._context or True, max_msg_size=64 << 20
        )
        try:
            yield Stream(socket_)
        finally:
            await socket_.close()


class Stream:
    """An agent's end of the stream, which holds what a node would."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        self.websocket = websocket
        self.has = Versioned.empty()

    async def frame(self, timeout_s: float = 10.0 * PATIENCE) -> ServerMessage:
        """The next snapshot or delta."""
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self.websocket.receive()
                if message.type is not aiohttp.WSMsgType.TEXT:
                    raise ConnectionError(str(message))
                frame = decode_server(message.data)
                if isinstance(frame, Snapshot | Delta):
                    return frame

    async def take(self, *, ack: bool = True) -> ServerMessage:
        """Applies the next frame, and says so."""
        frame = await self.frame()
        assert isinstance(frame, Snapshot | Delta)
        self.has = Versioned.from_snapshot(frame) if isinstance(frame, Snapshot) else self.has.apply(frame)
        if ack:
            await self.say(Ack(self.has.revision, self.has.digest))
        return frame

    async def until(self, revision: int) -> None:
        while self.has.revision < revision:
            await self.take()

    async def say(self, message: Ack | Nack | Ready) -> None:
        await self.websocket.send_str(encode(message).decode())


class Controller:
    """The process. `start` returns when it serves."""

    def __init__(self, directory: Path, trust_domain: str = "mesh.local") -> None:
        self.directory, self.trust_domain = directory, trust_domain
        self.state, self.run = directory / "state", directory / "run"
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def argv(self) -> list[str]:
        options = ["--state-dir", str(self.state), "--run-dir", str(self.run), "--listen", f"127.0.0.1:{self.port}"]
        return [sys.executable, "-m", "controller", *options, "--trust-domain", self.trust_domain]

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(self.argv(), cwd=ROOT, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30 * PATIENCE
        ready = self.run / "ready"
        while not (ready.exists() and ready.read_text().strip() == str(self.process.pid)):
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, f"not serving: {self.log()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        if self.process is None or self.process.poll() is not None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(10 * PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @contextlib.asynccontextmanager
    async def operator(self) -> AsyncIterator[Client]:
        """Root's client, over the unix socket."""
        connector = aiohttp.UnixConnector(str(self.run / "controller.sock"))
        async with aiohttp.ClientSession(connector=connector) as session:
            yield Client(session, "http://controller", None)

    def context(self, chain: str = "", key: str = "", bundle: str = "") -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=bundle or (self.state / "bundle.pem").read_text())
        if chain:
            path = self.directory / f"client-{os.urandom(4).hex()}.pem"
            path.write_text(key + chain)
            context.load_cert_chain(path)
        return context

    @contextlib.asynccontextmanager
    async def client(self, chain: str = "", key: str = "") -> AsyncIterator[Client]:
        async with aiohttp.ClientSession() as session:
            yield Client(session, self.url, self.context(chain, key))

    async def token(self, node: str, **body: object) -> dict[str, Any]:
        """The decoded join token."""
        async with self.operator() as operator:
            answer = await operator.ok("POST", f"/v1/nodes/{node}/token", body)
        decoded: dict[str, Any] = json.loads(base64.urlsafe_b64decode(answer["token"]))
        return decoded

    async def join(self, node: str, **body: object) -> tuple[str, str]:
        """Joins a node; its chain and key, PEM."""
        token, key = await self.token(node, **body), new_key()
        async with self.client() as client:
            answer = await client.ok("POST", "/v1/join", {"node": node, "secret": token["secret"], "csr": csr_for(key)})
        return answer["chain"], pem_of(key)

    @contextlib.asynccontextmanager
    async def node(self, node: str) -> AsyncIterator[Client]:
        """A joined node's client."""
        chain, key = await self.join(node)
        async with self.client(chain, key) as client:
            yield client


async def eventually(condition: Callable[[], Any], timeout_s: float = 10.0 * PATIENCE) -> None:
    """Waits on a coroutine function that returns something true."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110  # another process's condition
            await asyncio.sleep(0.02)
