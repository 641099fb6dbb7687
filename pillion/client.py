"""HTTP to a controller or an agent, over its unix socket or mutual TLS. Answers are limited; errors name the remedy."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from pillion.errors import CliError

ANSWER_BYTES_MAX = 512 << 20
LINE_BYTES_MAX = 1 << 20
TIMEOUT_S = 60.0


class Refused(CliError):
    """The other side answered with an error: its status and body (decoded if it was JSON)."""

    def __init__(self, status: int, body: Any) -> None:
        text = body.get("error") if isinstance(body, dict) else None
        text = str(text or (body if isinstance(body, str) else json.dumps(body))).strip()
        what, _, remedy = text.partition("; ")  # servers of ours put it there
        super().__init__(f"refused ({status}): {what}", remedy or _remedy(status))
        self.status, self.body = status, body


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "use root on the controller's machine, or an operator certificate (PILLION_CERT, PILLION_KEY, PILLION_CA)"
    if status == 404:
        return "look at what there is: pillion get KIND, pillion status"
    if status >= 500:
        return "see the controller's and the agents' logs, and: pillion status"
    return "correct the request and repeat it; nothing was changed"


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """One endpoint. Every call is a connection of its own."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            return _Unix(parts.path, timeout_s)
        context = ssl.create_default_context(cafile=os.environ.get("PILLION_CA"))
        if certificate := os.environ.get("PILLION_CERT"):
            context.load_cert_chain(certificate, os.environ.get("PILLION_KEY"))
        return http.client.HTTPSConnection(parts.hostname or "", parts.port or 15443, timeout=timeout_s, context=context)

    def _open(
        self, method: str, target: str, body: Any, timeout_s: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        headers: dict[str, str] = {}
        data: bytes | None = None
        if isinstance(body, str):
            data, headers["content-type"] = body.encode(), "application/yaml"
        elif body is not None:
            data, headers["content-type"] = json.dumps(body).encode(), "application/json"
        try:
            connection = self._connection(timeout_s)
            connection.request(method, target, data, headers)
            return connection, connection.getresponse()
        except PermissionError as error:
            raise CliError(f"{self.url}: {error.strerror}", "run this as root") from error
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason
            remedy = "name the mesh's roots (PILLION_CA) and an operator certificate (PILLION_CERT, PILLION_KEY)"
            raise CliError(f"{self.url}: no TLS: {reason}", remedy) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise CliError(
                f"{self.url} does not answer: {reason}", "is it running? see: pillion check, pillion lab status"
            ) from error

    def call(self, method: str, target: str, body: Any = None, timeout_s: float = TIMEOUT_S) -> Any:
        """The decoded answer of a 2xx; text if it is not JSON. Raises Refused or CliError."""
        connection, response = self._open(method, target, body, timeout_s)
        try:
            data = response.read(ANSWER_BYTES_MAX)
        except (OSError, http.client.HTTPException) as error:
            raise CliError(f"{self.url} broke off: {error}", "repeat the command; see the logs if it happens again") from error
        finally:
            connection.close()
        decoded = _decode(data)
        if not 200 <= response.status < 300:
            raise Refused(response.status, decoded)
        return decoded

    def get(self, target: str, timeout_s: float = TIMEOUT_S) -> Any:
        return self.call("GET", target, timeout_s=timeout_s)

    def raw(self, target: str) -> bytes:
        """The body of a GET as it came."""
        connection, response = self._open("GET", target, None, TIMEOUT_S)
        try:
            data = response.read(ANSWER_BYTES_MAX)
        finally:
            connection.close()
        if response.status != 200:
            raise Refused(response.status, _decode(data))
        return data

    def lines(self, target: str) -> Iterator[dict[str, Any]]:
        """A stream of JSON lines, until the other side ends it."""
        connection, response = self._open("GET", target, None, 3600.0)
        try:
            if response.status != 200:
                raise Refused(response.status, _decode(response.read(LINE_BYTES_MAX)))
            while line := response.readline(LINE_BYTES_MAX):
                if line.strip():
                    yield json.loads(line)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise CliError(f"{self.url} broke off: {error}", "repeat the command") from error
        finally:
            connection.close()


def _decode(data: bytes) -> Any:
    text = data.decode(errors="replace")
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text
