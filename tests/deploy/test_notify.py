"""What the service manager hears from each process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from controller.__main__ import _alive
from mesh.notify import Notify
from nodeagent.notify import follow
from tests.nodeagent.fakes import until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def manager(tmp_path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(20.0)
    return sock


DATAGRAMS = partial(socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM)


def test_told_and_not_inherited(manager: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "90000000", "HOME": "/"}
    notify = Notify(environ, DATAGRAMS)
    assert notify.interval_s == 30.0
    assert environ == {"HOME": "/"}
    notify.tell(READY=1, STATUS="so it is")
    assert manager.recv(100) == b"READY=1\nSTATUS=so it is"


@pytest.mark.parametrize("environ", [{"NOTIFY_SOCKET": "/nonexistent/notify", "WATCHDOG_USEC": "9"}, {"WATCHDOG_USEC": "9"}])
def test_without_a_manager_nothing_happens(environ: dict[str, str]) -> None:
    notify = Notify(environ, DATAGRAMS)
    notify.tell(READY=1)
    assert notify.interval_s == float("inf") and not environ


def so_far(manager: socket.socket) -> list[str]:
    """Each line that came since."""
    manager.setblocking(False)
    found = []
    with suppress(BlockingIOError):
        while True:
            found += manager.recv(2000).decode().splitlines()
    return found


class Stub:
    """An agent and its store, of whom one thing is asked: does the kernel thread answer? ``turns``: of the loop that tells."""

    def __init__(self) -> None:
        self.core = SimpleNamespace(readiness=SimpleNamespace(ready=False, detail="not attached"))
        self.load_error, self.membership, self.fleet = "", SimpleNamespace(error=""), SimpleNamespace(listeners={})
        self.answers, self.turns = asyncio.Event(), 0

    async def kernel_answers(self) -> None:
        await self.answers.wait()

    async def revision(self) -> int:
        """As the controller's database."""
        await self.answers.wait()
        return 1

    def keep(self, *_: object, **__: object) -> None:
        self.turns += 1

    async def turned(self, count: int = 20) -> None:
        at = self.turns
        await until(lambda: self.turns >= at + count)


async def test_the_agent_is_ready_when_its_node_is_and_alive_while_its_kernel_thread_answers(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeagent.notify.LOOK_S", 0.01)
    stub: Any = Stub()
    notify = Notify({"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "90000"}, DATAGRAMS)
    task = asyncio.create_task(follow(stub, notify, stub))
    await stub.turned()
    assert so_far(manager) == ["STATUS=not attached"], "neither ready nor alive"
    stub.answers.set()
    stub.core.readiness = SimpleNamespace(ready=True, detail="")
    await stub.turned()
    said = so_far(manager)
    assert said.count("READY=1") == 1 and said.count("WATCHDOG=1") > 1
    stub.answers.clear()
    await stub.turned()
    so_far(manager)
    await stub.turned()
    assert not so_far(manager), "it told of its life while the kernel thread hung"
    task.cancel()


async def test_a_compiler_that_gets_on_is_told_and_costs_no_life(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel thread waits for it, for as long as it takes: systemd is asked for time, and told that all is well."""
    monkeypatch.setattr("nodeagent.notify.LOOK_S", 0.01)
    monkeypatch.setattr("nodeagent.notify.under_way", lambda: "compiling for this kernel: nodeagent.loader, 90 s so far")
    stub: Any = Stub()
    notify = Notify({"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "90000"}, DATAGRAMS)
    task = asyncio.create_task(follow(stub, notify, stub))
    await stub.turned()
    said = so_far(manager)
    assert "STATUS=compiling for this kernel: nodeagent.loader, 90 s so far; not attached" in said
    assert said.count("EXTEND_TIMEOUT_USEC=60000000") == 1 and said.count("WATCHDOG=1") > 1 and "READY=1" not in said
    task.cancel()


async def test_the_controller_is_alive_while_its_database_answers(manager: socket.socket) -> None:
    store: Any = Stub()
    notify = Notify({"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "90000"}, DATAGRAMS)
    task = asyncio.create_task(_alive(notify, store))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not so_far(manager)
    store.answers.set()
    await until(lambda: "WATCHDOG=1" in so_far(manager))
    task.cancel()


def test_the_proxy_is_ready_when_its_workers_are_and_tells_of_its_life(tmp_path: Path, manager: socket.socket) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "300000"}
    argv = [sys.executable, "-m", "l7proxy", "--run-dir", str(tmp_path / "run"), "--workers", "2", "--user", "65471"]
    proxy = subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        heard = set()
        deadline = time.monotonic() + 30
        while heard < {"READY=1", "WATCHDOG=1"} and time.monotonic() < deadline:
            heard.add(manager.recv(200).decode().splitlines()[0])
        assert heard == {"READY=1", "WATCHDOG=1"}
        proxy.send_signal(signal.SIGTERM)
        while "STOPPING=1" not in heard:
            heard.add(manager.recv(200).decode().splitlines()[0])
        assert proxy.wait(20) == 0
    finally:
        proxy.kill()
        proxy.wait()
