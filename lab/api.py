"""HTTP over a unix socket: how the lab talks to controller and agents."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from lab.pace import PATIENCE
from lab.state import LabError

BODY_BYTES_MAX = 256 << 20


class ApiError(LabError):
    """The other side said no: `status` and its body."""

    def __init__(self, status: int, method: str, path: str, body: str) -> None:
        super().__init__(f"{method} {path}: {status} {body.strip()[:2000]}")
        self.status = status
        self.body = body


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def request(path: Path, method: str, target: str, body: Any = None, timeout_s: float = 30.0 * PATIENCE) -> tuple[int, str]:
    """One exchange; `body` is text as it is, or a value sent as JSON. Raises OSError if nobody answers."""
    headers = {}
    data: bytes | None = None
    if isinstance(body, str):
        data, headers["content-type"] = body.encode(), "application/yaml"
    elif body is not None:
        data, headers["content-type"] = json.dumps(body).encode(), "application/json"
    connection = _UnixConnection(path, timeout_s)
    try:
        connection.request(method, target, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(BODY_BYTES_MAX).decode(errors="replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"{path}: {error!r}") from error
    finally:
        connection.close()


def call(path: Path, method: str, target: str, body: Any = None, timeout_s: float = 30.0 * PATIENCE) -> Any:
    """The decoded JSON (or the text, if it is none) of a 2xx answer. Raises ApiError otherwise, LabError if nobody answers."""
    try:
        status, text = request(path, method, target, body, timeout_s)
    except OSError as error:
        raise LabError(f"{path} does not answer: {error}", "see: pillion lab status, and the logs beside it") from error
    if not 200 <= status < 300:
        raise ApiError(status, method, target, text)
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text
