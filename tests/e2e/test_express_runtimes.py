"""Applications of several runtimes at both ends of connections that the kernel carries."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from lab.pace import SLOW
from tests.conftest import opened
from tests.e2e import express
from tests.e2e.express import NAME, PORT, event
from tests.e2e.mesh import HTTP_PORT, NS, PROGRAMS, Mesh, policy, service

pytestmark = pytest.mark.timeout(400)
REQUESTS = 800
TRIES = 4
SHARE_MIN = 0.7  # of them that the kernel carries, at least: each connection begins in user space, some are samples
HOST = f"{NAME}.{NS}.mesh"


@pytest.fixture(scope="module", autouse=True)
def serving(mesh: Mesh) -> Iterator[None]:
    with express.exact(mesh):
        express.warm(mesh)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Go's and Java's programs are made. Readable for everybody."""
    return opened(tmp_path_factory.mktemp("built"))


def tool(*names: str) -> str:
    """Its path."""
    found = next((path for name in names if (path := shutil.which(name))), "")
    assert found, f"there is no {names[0]} here: run deploy/setup.sh vm, which installs what the tests need"
    return found


def go(built: Path) -> str:
    path = built / "http-go"
    if not path.exists():
        environment = {
            **os.environ,
            "GOCACHE": str(built / "cache"),
            "GOFLAGS": "-mod=mod",
            "CGO_ENABLED": "0",
            "HOME": str(built),
        }
        # All of its library is compiled, too: without what this program does not need, that takes half
        quick = ["-tags=nethttpomithttp2", "-gcflags=all=-N -l -dwarf=false", "-ldflags=-s -w"]
        argv = [tool("go"), "build", *quick, "-o", str(path), str(PROGRAMS / "http.go")]
        subprocess.run(argv, env=environment, check=True, timeout=300 * SLOW)
    return str(path)


def java(built: Path, name: str) -> list[str]:
    """The JDK compiles; a runtime alone does not."""
    compiler = tool("javac")
    if not (built / f"{name}.class").exists():
        subprocess.run([compiler, "-d", str(built), str(PROGRAMS / f"{name}.java")], check=True, timeout=120 * SLOW)
    return [tool("java"), "-cp", str(built), name]


def carried(mesh: Mesh, requests: int, exchange: Callable[[], None]) -> None:
    """Again where an agent that has other work was late to pair connections which do not last long."""
    made = []
    for _ in range(TRIES):
        before = event(mesh, "carried")
        exchange()
        made.append(event(mesh, "carried") - before)
        if made[-1] >= requests * SHARE_MIN:
            return
    raise AssertionError(f"of {requests} the kernel carried {made}")


# ---- servers

SERVERS = ("node", "java", "go", "threaded")


def server(name: str, built: Path, port: int) -> list[str]:
    if name == "node":
        return [tool("node", "nodejs"), str(PROGRAMS / "server.mjs"), str(port)]
    if name == "java":
        return [*java(built, "Server"), str(port)]
    if name == "go":
        return [go(built), "serve", str(port)]
    return [sys.executable, str(PROGRAMS / "threaded.py"), str(port)]


@contextmanager
def served(mesh: Mesh, name: str, argv: list[str], port: int) -> Iterator[str]:
    """By a workload of that name; where."""
    workload = mesh.lab.add_workload("n1", name, NS, name, {"app": name})
    mesh.w[name] = workload
    try:
        workload.start(argv, name="server")
        mesh.listening(name, port)
        mesh.apply(service(name, name, port, "http") + policy(name, name))
        yield f"http://{name}.{NS}.mesh:{port}"
    finally:
        mesh.delete("AuthorizationPolicy", name)
        mesh.delete("Service", name)
        mesh.w.pop(name).remove()


def curls(mesh: Mesh, url: str, size: int, *options: str) -> None:
    """Many requests on one connection of curl's; each answer is a 200 of that size."""
    urls = [f"{url.format(number=number)}" for number in range(REQUESTS)]
    config = "\n".join(f'url = "{each}"\noutput = "/dev/null"' for each in urls)
    form = "%{http_code} %{size_download} %{num_connects}\\n"
    argv = ["curl", "-sS", "--max-time", "60", "-w", form, *options, "-K", "-"]
    done = mesh.w["client"].run(argv, input=config, timeout=90 * SLOW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"200 {size} 1", *[f"200 {size} 0"] * (REQUESTS - 1)]


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_of_each_runtime(mesh: Mesh, built: Path, name: str) -> None:
    port = 8060
    with served(mesh, name, server(name, built, port), port) as url:
        kinds = {"size": 3000} if name != "threaded" else {"size": 3000, "file": 200_000, "parts": 50_000}
        for kind, size in kinds.items():
            carried(mesh, REQUESTS, partial(curls, mesh, f"{url}/{kind}/{size}/{{number}}", size))
        carried(mesh, REQUESTS, partial(curls, mesh, f"{url}/size/1/{{number}}", 4, "-d", "b" * 1234))


def test_nginx_and_wrk(mesh: Mesh) -> None:
    """nginx as it stands in the mesh: writev, epoll with edges, FIONREAD of its own."""
    argv = ["wrk", "-t1", "-c16", "-d3s", f"http://web.{NS}.mesh:{HTTP_PORT}/"]
    before = event(mesh, "carried")
    done = mesh.w["client"].run(argv, timeout=60 * SLOW)
    asked = int(re.search(r"(\d+) requests in", done.stdout)[1])  # type: ignore[index]  # else wrk said nothing
    assert asked > 100 and "Socket errors" not in done.stdout and "Non-2xx" not in done.stdout, done.stdout
    assert event(mesh, "carried") - before > SHARE_MIN * asked


# ---- clients

CLIENTS = ("node", "java", "go", "curl")


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_of_each_runtime(mesh: Mesh, built: Path, name: str) -> None:
    if name == "curl":
        carried(mesh, REQUESTS, partial(curls, mesh, f"http://{HOST}:{PORT}/size/777/curl-{{number}}", 777))
        return
    argv = {
        "node": lambda: [tool("node", "nodejs"), str(PROGRAMS / "client.mjs")],
        "java": lambda: java(built, "Client"),
        "go": lambda: [go(built), "ask"],
    }[name]()

    def asks() -> None:
        done = mesh.w["client"].run([*argv, HOST, str(PORT), str(REQUESTS)], timeout=90 * SLOW)
        assert done.stdout, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["ok"] == REQUESTS and not found["wrong"], found

    carried(mesh, REQUESTS, asks)


# ---- what they do with their sockets


def test_every_way_to_read(mesh: Mesh) -> None:
    off, before = event(mesh, "off"), event(mesh, "carried")
    question = json.dumps({"host": HOST, "port": PORT})
    done = mesh.w["client"].run([sys.executable, str(PROGRAMS / "odd_reads.py"), question], timeout=120 * SLOW)
    assert event(mesh, "carried") - before >= 50 * SHARE_MIN
    assert done.stdout, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    record = {name: said.pop(name) for name in ("MSG_WAITALL", "splice")}
    print(f"known limits: {record}")  # of redirected bytes: docs
    assert not {name: text for name, text in said.items() if text != "right"}
    assert event(mesh, "off") > off  # SO_RCVLOWAT: the socket has left its pair
