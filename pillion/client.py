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

from mesh.ports import CONTROLLER_PORT
from pillion.errors import CliError

ANSWER_BYTES_MAX = 512 << 20
LINE_BYTES_MAX = 1 << 20
TIMEOUT_S = 60.0  # of an answer, and of a stream's beginning
ROOTS, CERTIFICATE, KEY = "PILLION_CA", "PILLION_CERT", "PILLION_KEY"  # files, by variables of the environment
OTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, …_IP_ADDRESS_MISMATCH
CREDENTIALS_REMEDY = f"`pillion operator add NAME`, as root on the controller's machine, makes {CERTIFICATE}, {KEY} and {ROOTS}"


class Refused(CliError):
    """The other side answered with an error: its status and body (decoded if it was JSON)."""

    def __init__(self, status: int, body: Any) -> None:
        text = body.get("error") if isinstance(body, dict) else None
        text = str(text or (body if isinstance(body, str) else json.dumps(body))).strip()
        what, _, remedy = text.partition("; ")  # servers of ours put it there
        if isinstance(body, dict) and str(body.get("reason")).startswith("certificate_"):
            remedy = CREDENTIALS_REMEDY  # theirs is for a node, which joins again
        super().__init__(f"refused ({status}): {what}", remedy or _remedy(status))
        self.status, self.body = status, body


def _remedy(status: int) -> str:
    if status in (401, 403):
        return f"use root on the controller's machine, or an operator certificate ({CERTIFICATE}, {KEY}, {ROOTS})"
    if status == 404:
        return "look at what there is: pillion get KIND, pillion status"
    if status >= 500:
        return "see the controller's and the agents' logs, and: pillion status"
    return "correct the request and repeat it; nothing was changed"


def _context() -> ssl.SSLContext:
    """Believes the mesh's roots and nobody else. Raises CliError where the environment names none, or what cannot be used."""
    roots, certificate, key = (os.environ.get(name) or None for name in (ROOTS, CERTIFICATE, KEY))
    if roots is None:
        raise CliError(f"{ROOTS} is not set, so nobody is believed to be the controller", CREDENTIALS_REMEDY)
    if key is not None and certificate is None:
        raise CliError(f"{KEY} is set and {CERTIFICATE} is not set: a key says nobody's name", CREDENTIALS_REMEDY)
    for name, path in ((ROOTS, roots), (CERTIFICATE, certificate), (KEY, key)):
        try:
            if path is not None:
                os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise CliError(f"{name}={path}: {error.strerror}", CREDENTIALS_REMEDY) from error
    try:
        context = ssl.create_default_context(cafile=roots)
    except OSError as error:  # TLS errors among them
        raise CliError(f"{ROOTS}={roots} holds no certificates: {error}", CREDENTIALS_REMEDY) from error
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except OSError as error:
        lacks = f"{CERTIFICATE}={certificate} holds no key, and {KEY} is not set"
        what = f"{CERTIFICATE}={certificate} and {KEY} do not belong together" if key else lacks
        raise CliError(what, CREDENTIALS_REMEDY) from error
    return context


def _tls_remedy(error: ssl.SSLError) -> str:
    if not isinstance(error, ssl.SSLCertVerificationError):
        return f"name this mesh's roots ({ROOTS}) and an operator certificate ({CERTIFICATE}, {KEY})"
    if error.verify_code in OTHER_NAME:
        return "name the controller by an address of its certificate, as `pillion operator add` prints it"
    return f"{ROOTS} must be this mesh's roots of today: `pillion operator add` writes them, as ca.crt"


def _silent(url: str, error: Exception, reason: str) -> tuple[str, str]:
    """What is wrong with one that takes no connection or gives no answer, and the remedy."""
    if url.startswith("unix:"):
        return f"{url} does not answer: {reason}", "is it running? see: pillion check, pillion lab status"
    if isinstance(error, ConnectionResetError | BrokenPipeError) and os.environ.get(CERTIFICATE):
        what = f"{url} hung up without an answer, as a controller does on a certificate that is over or another mesh's"
        return what, f"make another ({CERTIFICATE}) with `pillion operator add NAME`; if it is good, see the controller's log"
    return f"{url} does not answer: {reason}", "is the address right, and the controller up? on its machine: pillion check"


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
        return http.client.HTTPSConnection(
            parts.hostname or "", parts.port or CONTROLLER_PORT, timeout=timeout_s, context=_context()
        )

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
            raise CliError(f"{self.url}: no TLS: {reason}", _tls_remedy(error)) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise CliError(*_silent(self.url, error, reason)) from error

    def call(self, method: str, target: str, body: Any = None, timeout_s: float = TIMEOUT_S) -> Any:
        """The decoded answer of a 2xx; text if it is not JSON. Raises Refused or CliError."""
        return _decode(self._body(method, target, body, timeout_s))

    def get(self, target: str, timeout_s: float = TIMEOUT_S) -> Any:
        return self.call("GET", target, timeout_s=timeout_s)

    def raw(self, target: str) -> bytes:
        """The body of a GET as it came. Raises Refused or CliError."""
        return self._body("GET", target, None, TIMEOUT_S)

    def _body(self, method: str, target: str, body: Any, timeout_s: float) -> bytes:
        """Of a 2xx answer. Raises Refused or CliError."""
        connection, response = self._open(method, target, body, timeout_s)
        try:
            data = response.read(ANSWER_BYTES_MAX)
            if response.length:  # it ended early, or goes on for ever: read() minds neither
                raise http.client.IncompleteRead(data, response.length)
        except (OSError, http.client.HTTPException) as error:
            raise CliError(f"{self.url} broke off: {error}", "repeat the command; see the logs if it happens again") from error
        finally:
            connection.close()
        if not 200 <= response.status < 300:
            raise Refused(response.status, _decode(data))
        return data

    def lines(self, target: str) -> Iterator[dict[str, Any]]:
        """A stream of JSON lines, until the other side ends it; between two of them any time may pass."""
        connection, response = self._open("GET", target, None, TIMEOUT_S)
        try:
            if connection.sock is not None:
                connection.sock.settimeout(None)
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
