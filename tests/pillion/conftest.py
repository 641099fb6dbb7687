"""A controller and an agent on unix sockets that answer what a test tells them to, and the CLI run against them."""

from __future__ import annotations

import json
import signal
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from pillion import endpoints
from pillion.__main__ import main
from pillion.context import chosen


@dataclass
class Fake:
    """`answers["GET /v1/status"]` = (status, value); requests are kept in `asked` as (method, target, body)."""

    path: Path
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def on(self, request: str, value: Any, status: int = 200) -> None:
        self.answers[request] = (status, value)


class Handler(BaseHTTPRequestHandler):
    fake: Fake

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0"))).decode()
        self.fake.asked.append((self.command, self.path, body))
        asked = f"{self.command} {self.path.split('?')[0]}"
        status, value = self.fake.answers.get(asked, (404, {"error": f"no {asked}; ask for something else"}))
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _any

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(path: Path) -> tuple[Fake, socketserver.ThreadingUnixStreamServer]:
    fake = Fake(path)
    handler = type("BoundHandler", (Handler,), {"fake": fake})
    server = socketserver.ThreadingUnixStreamServer(str(path), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return fake, server


@pytest.fixture(autouse=True)
def _no_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test talks to what happens to run on this machine."""
    for name in ("PILLION_CONTROLLER", "PILLION_AGENT", "PILLION_LAB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoints, "HOST_CONTROLLER", f"unix://{tmp_path}/none")
    monkeypatch.setattr(endpoints, "HOST_AGENT", f"unix://{tmp_path}/none")
    discover = endpoints.discover
    monkeypatch.setattr(endpoints, "discover", lambda *given: discover(*given[:4], root=tmp_path / "labs"))
    chosen.controller = chosen.agent = chosen.lab = None


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Fake]:
    fake, server = serve(tmp_path / "c.sock")
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Fake]:
    fake, server = serve(tmp_path / "a.sock")
    yield fake
    server.shutdown()
    server.server_close()


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Done]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("get", "svc")`: exit code and what was written."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["pillion", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def pipes_as_before() -> Iterator[None]:
    """`pillion` dies of SIGPIPE, as tools do; a test that calls its `main` must not leave that to others."""
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)
