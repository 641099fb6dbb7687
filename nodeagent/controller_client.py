"""The agent's line to the controller: HTTP calls and the state stream, over mTLS with the node's certificate.

The stream resumes from a revision, is taken for dead after 15 s of silence, and is opened anew with a growing, jittered
pause, at the next of the controllers. What arrives is handed over as it is; `reconcile` judges it.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import aiohttp
import structlog

from mesh import snapshot
from nodeagent.lease import boot_s
from nodeagent.svid import SignRefused
from nodeagent.workloads import Spec

log = structlog.get_logger()

SILENCE_S = 15.0
CONNECT_S = 5.0
CALL_S = 10.0
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.2, 4.0
STEADY_S = 2.0  # a stream that held so long resets the pause
SENT_MAX = 1024  # frames waiting for a slow stream; past it the stream is opened anew
CALLS_AT_ONCE_MAX = 8
ERROR_CHARS_MAX = 500


class CallFailed(RuntimeError):
    """No controller answered, or not with an answer: try again."""


class CallRefused(SignRefused):
    """The controller said no; ``reason`` is its enum."""


def _text(value: object) -> str:
    """Of an answer, fit for a log line."""
    return "".join(c if c.isprintable() else " " for c in str(value))[:ERROR_CHARS_MAX]


async def call(
    session: aiohttp.ClientSession, method: str, url: str, context: ssl.SSLContext, body: object = None
) -> dict[str, Any]:
    """One request; the JSON object of a 2xx answer. Raises CallRefused for 4xx, CallFailed for anything else."""
    try:
        timeout = aiohttp.ClientTimeout(total=CALL_S, sock_connect=CONNECT_S)
        async with session.request(method, url, json=body, ssl=context, timeout=timeout) as response:
            try:
                answer = await response.json(content_type=None)
            except ValueError:
                answer = {}
            if not isinstance(answer, dict):
                answer = {}
            if response.status < 300:
                return answer
            message = _text(answer.get("error") or answer.get("errors") or f"HTTP {response.status} from {url}")
            if 400 <= response.status < 500 and response.status not in (408, 429):
                raise CallRefused(_text(answer.get("reason") or f"http_{response.status}"), message)
            raise CallFailed(message)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise CallFailed(f"{url}: {_text(error) or type(error).__name__}") from error


class ControllerClient:
    """``context`` is asked for at every use: certificate and bundle change. Calls go to the controller that answered last."""

    def __init__(
        self,
        urls: list[str],
        context: Callable[[], ssl.SSLContext],
        *,
        silence_s: float = SILENCE_S,
        rng: random.Random | None = None,
    ) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._context, self._silence_s = context, silence_s
        self._rng = rng or random.Random()
        self._at = 0
        self._session: aiohttp.ClientSession | None = None
        self._calls = asyncio.Semaphore(CALLS_AT_ONCE_MAX)
        self._outbox: asyncio.Queue[bytes] | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self.heard_at = 0.0  # `lease.boot_s`; 0: never
        self.last_error = ""

    @property
    def connected(self) -> bool:
        return self._outbox is not None

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No connection is kept: certificates change, and calls are rare.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=CALLS_AT_ONCE_MAX + 2))
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ---- calls

    async def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        failure: CallFailed | None = None
        async with self._calls:
            for _ in self._urls:
                url = self._urls[self._at % len(self._urls)]
                try:
                    return await call(self._http(), method, url + path, self._context(), body)
                except CallFailed as error:
                    failure = error
                    self._at += 1
        raise failure or CallFailed("no controller is known; join first")

    async def sign(self, csr: str, spiffe: str) -> str:
        """The chain, PEM. Raises CallRefused, CallFailed."""
        return str((await self._call("POST", "/v1/agent/sign", {"csr": csr, "spiffe": spiffe})).get("chain", ""))

    async def renew(self, csr: str) -> dict[str, Any]:
        """``{chain, bundle}``. Raises CallRefused, CallFailed."""
        return await self._call("POST", "/v1/agent/renew", {"csr": csr})

    async def register(self, spec: Spec) -> int:
        """The first revision that holds the workload. Raises CallRefused (identity_not_granted, …), CallFailed."""
        body = {"service_account": spec.service_account, "addresses": list(spec.addresses), "labels": spec.labels}
        answer = await self._call("PUT", f"/v1/agent/workloads/{quote(spec.namespace, '')}/{quote(spec.name, '')}", body)
        revision = answer.get("revision")
        if not isinstance(revision, int):
            raise CallFailed("the controller's answer to a registration has no revision")
        return revision

    async def unregister(self, key: str) -> None:
        """Raises CallRefused, CallFailed. A workload that is unknown there is fine."""
        _, namespace, name = key.split("/", 2)
        try:
            await self._call("DELETE", f"/v1/agent/workloads/{quote(namespace, '')}/{quote(name, '')}")
        except CallRefused as error:
            if error.reason not in ("http_404", "not_found"):
                raise

    # ---- the stream

    def send(self, message: snapshot.AgentMessage) -> None:
        """Dropped when no stream is open: the next one starts with all that matters."""
        if self._outbox is None:
            return
        try:
            self._outbox.put_nowait(snapshot.encode(message))
        except asyncio.QueueFull:
            self.reconnect()

    def reconnect(self) -> None:
        """End the open stream; another is opened after the pause."""
        if self._socket is not None and self._socket._response.connection is not None:
            self._socket._response.close()  # at once: a polite close would wait for a peer that may be dead

    async def follow(
        self,
        resume: Callable[[], int],
        on_up: Callable[[], None],
        on_message: Callable[[snapshot.ServerMessage | snapshot.SnapshotError], None],
        on_down: Callable[[str], None],
        on_refused: Callable[[str], Awaitable[bool]],
    ) -> None:
        """Runs until cancelled. ``on_refused`` gets the reason when the controller does not let the node in, and says whether
        that has changed."""
        pause = BACKOFF_FIRST_S
        while True:
            url = self._urls[self._at % len(self._urls)]
            opened = time.monotonic()
            error, again = "closed by the controller", False
            try:
                await self._stream(url, resume(), on_up, on_message)
            except aiohttp.WSServerHandshakeError as refusal:
                reason, message = await self._why_refused(url)
                error = f"{url} refused the stream: {message or f'HTTP {refusal.status}'}"
                again = await on_refused(reason)
            except TimeoutError:
                error = f"{url} was silent for {self._silence_s:g} s" if self.connected else f"{url} did not answer"
            except (aiohttp.ClientError, OSError) as failure:
                error = f"{url}: {_text(failure) or type(failure).__name__}"
            finally:
                was_up, self._outbox, self._socket = self.connected, None, None
                if was_up:
                    on_down(error)
            if self.last_error != error:
                log.warning("controller_lost", error=error)
            self.last_error = error
            if was_up and time.monotonic() - opened > STEADY_S:
                pause = BACKOFF_FIRST_S
            if again:
                pause = BACKOFF_FIRST_S
                continue
            self._at += 1
            await asyncio.sleep(pause * self._rng.uniform(0.5, 1.0))
            pause = min(pause * 2, BACKOFF_MAX_S)

    async def _why_refused(self, url: str) -> tuple[str, str]:
        """A handshake carries no body; the same question without the upgrade does."""
        try:
            await call(self._http(), "GET", f"{url}/v1/agent/stream", self._context())
        except CallRefused as error:
            return error.reason, str(error)
        except CallFailed as error:
            return "", str(error)
        return "", ""

    async def _stream(
        self,
        url: str,
        revision: int,
        on_up: Callable[[], None],
        on_message: Callable[[snapshot.ServerMessage | snapshot.SnapshotError], None],
    ) -> None:
        async with asyncio.timeout(CONNECT_S * 2):
            socket = await self._http().ws_connect(
                f"{url}/v1/agent/stream?revision={revision}",
                ssl=self._context(),
                timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
                max_msg_size=snapshot.MESSAGE_BYTES_MAX,
                autoping=True,
            )
        try:
            self._socket, self._outbox = socket, asyncio.Queue(SENT_MAX)
            self.heard_at, self.last_error = boot_s(), ""
            sender = asyncio.create_task(self._send_all(socket, self._outbox))
            log.info("controller_connected", url=url, resume=revision)
            on_up()
            try:
                await self._read_all(socket, on_message)
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
        finally:
            socket._response.close()

    async def _send_all(self, socket: aiohttp.ClientWebSocketResponse, outbox: asyncio.Queue[bytes]) -> None:
        while True:
            data = await outbox.get()
            async with asyncio.timeout(self._silence_s):
                await socket.send_frame(data, aiohttp.WSMsgType.TEXT)

    async def _read_all(
        self,
        socket: aiohttp.ClientWebSocketResponse,
        on_message: Callable[[snapshot.ServerMessage | snapshot.SnapshotError], None],
    ) -> None:
        while True:
            async with asyncio.timeout(self._silence_s):
                frame = await socket.receive()
            if frame.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                return  # closed, or broken beyond repair
            self.heard_at = boot_s()
            message: snapshot.ServerMessage | snapshot.SnapshotError
            try:
                message = snapshot.decode_server(frame.data)
            except snapshot.SnapshotError as error:
                message = error
            if isinstance(message, snapshot.Ping):
                self.send(snapshot.Pong())
            else:
                on_message(message)
