"""What the service manager hears from each process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mesh.notify import Notify

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
