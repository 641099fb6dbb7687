"""The supervisor with real children: restarts, its files, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import supervise
from lab.supervise import BACKOFF_FIRST_S, BACKOFF_MAX_S, STEADY_S, next_backoff

TRIES = 4  # the backoff is still below the limit then


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within time"
        time.sleep(0.01)


def test_backoff_grows_to_its_limit_and_starts_again() -> None:
    waits, last = [], 0.0
    for _ in range(10):
        last = next_backoff(last, 0.0)
        waits.append(last)
    assert waits[0] == BACKOFF_FIRST_S and waits[-1] == BACKOFF_MAX_S <= 0.5
    assert next_backoff(BACKOFF_MAX_S, STEADY_S) == BACKOFF_FIRST_S


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def begin(*command: str) -> subprocess.Popen[bytes]:
        argv = [
            sys.executable,
            "-I",
            "-S",
            supervise.__file__,
            "--name",
            "x",
            "--pids",
            str(tmp_path),
            "--log",
            str(tmp_path / "log"),
        ]
        started.append(subprocess.Popen([*argv, "--", *command]))
        return started[-1]

    yield begin
    for each in started:
        each.send_signal(signal.SIGTERM)
        each.wait(30)


def number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def test_a_killed_child_comes_back_at_once(start: Start, tmp_path: Path) -> None:
    start("sleep", "1000")
    until(lambda: number(tmp_path / "x.pid"))
    first = number(tmp_path / "x.pid")
    took = []
    while not took or (took[-1] >= 0.5 and len(took) < TRIES):  # other work makes it longer, and nothing shorter
        last, began = number(tmp_path / "x.pid"), time.monotonic()
        os.kill(last, signal.SIGKILL)
        until(lambda last=last: number(tmp_path / "x.pid") not in (0, last))
        took.append(time.monotonic() - began)
    assert took[-1] < 0.5, took
    assert number(tmp_path / "x.pid") != first
    until(lambda: number(tmp_path / "x.starts") == 1 + len(took))  # written behind the other


def test_output_goes_to_the_log_and_failures_are_told(start: Start, tmp_path: Path) -> None:
    start("sh", "-c", "echo hello; echo world >&2; exit 3")
    until(lambda: number(tmp_path / "x.starts") >= 3)
    text = (tmp_path / "log").read_text()
    assert "hello" in text and "world" in text and "x ended with 3" in text


def test_term_ends_both(start: Start, tmp_path: Path) -> None:
    supervisor = start("sleep", "1000")
    until(lambda: number(tmp_path / "x.pid"))
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(30) == 0
    assert not Path(f"/proc/{number(tmp_path / 'x.pid')}").exists()


def test_the_child_gets_no_blocked_signals(start: Start, tmp_path: Path) -> None:
    start("sh", "-c", "grep SigBlk /proc/self/status; exec sleep 1000")
    until(lambda: number(tmp_path / "x.pid") and "SigBlk" in (tmp_path / "log").read_text())
    assert "SigBlk:\t0000000000000000" in (tmp_path / "log").read_text()


def test_a_second_supervisor_of_the_name_steps_back(start: Start, tmp_path: Path) -> None:
    start("sleep", "1000")
    until(lambda: number(tmp_path / "x.pid"))
    assert start("sleep", "1000").wait(30) == 0
    assert number(tmp_path / "x.starts") == 1
