"""The thread that visits sockets, without a kernel: who is due is looked at, however late."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from lab.pace import SLOW
from nodeagent import express_ops
from nodeagent.datapath_api import DatapathError
from nodeagent.express_ops import OK, Enrolment, Operations
from nodeagent.layouts import Layouts

PLAN = Enrolment(1, "client", ("127.0.0.1", 1), ("127.0.0.1", 2), 300)
TIMES = 200


class Fakes(dict[str, object]):
    enums: dict[str, int] = {}


class Ready(Operations):
    """Every socket is enrolled and settled at the first look."""

    def _on_sockets(self, kind: str, netns_fd: int, enrolment: Enrolment) -> tuple[str, int]:
        time.sleep(0)  # as a system call does: another thread may go on
        return OK, 7


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ready]:
    monkeypatch.setattr(express_ops, "libbpf", SimpleNamespace(bpf_obj_get=lambda path: os.open("/dev/null", os.O_RDONLY)))
    made = Ready(Path("/none"), cast(Layouts, Fakes(pl_xop=None)))
    yield made
    made.close()


def test_everyone_is_looked_at(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    found: list[list[tuple[str, int]]] = []

    def many() -> None:
        for number in range(TIMES):
            monkeypatch.setattr(express_ops, "SETTLE_FIRST_S", number * 1e-6)
            found.append(ready.enrol([(netns, PLAN)] * 2))

    asking = threading.Thread(target=many, daemon=True)
    asking.start()
    asking.join(10 * SLOW)
    os.close(netns)
    assert found == [[(OK, 7)] * 2] * TIMES


def test_a_deadline_that_passes_before_the_thread_sleeps_is_not_for_ever(ready: Ready) -> None:
    """CPython's SimpleQueue takes what is left of it, when less than nothing, for no deadline: seen on machines in emulation,
    where every pair waited for its agent from then on. Too rare elsewhere to wait for it here."""
    assert not isinstance(ready._jobs, queue.SimpleQueue)


class Restless(Operations):
    """No socket is ever at rest."""

    def _on_sockets(self, kind: str, netns_fd: int, enrolment: Enrolment) -> tuple[str, int]:
        return ("not_yet" if kind == "SETTLE" else OK), 7


def test_those_that_are_never_at_rest_keep_nobody_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express_ops, "libbpf", SimpleNamespace(bpf_obj_get=lambda path: os.open("/dev/null", os.O_RDONLY)))
    for pause in ("FIRST", "BUSY", "LAST"):  # always one of them is due
        monkeypatch.setattr(express_ops, f"SETTLE_{pause}_S", 0.0)
    restless = Restless(Path("/none"), cast(Layouts, Fakes(pl_xop=None)))
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    found: list[object] = []

    def ask() -> None:
        found.append(restless.enrol([(netns, PLAN)] * 3))
        found.append(restless.check(netns, PLAN))
        restless.close()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * SLOW)
    assert found == [[(OK, 7)] * 3, OK] and not asking.is_alive()
    os.close(netns)


class Failing(Operations):
    """``at``: the operation that fails."""

    at = ""
    tried = 0

    def _on_sockets(self, kind: str, netns_fd: int, enrolment: Enrolment) -> tuple[str, int]:
        self.tried += 1
        if kind == self.at and self.tried < 3:
            raise DatapathError("no")
        time.sleep(0.01)
        os.fstat(netns_fd)
        return OK, 7


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    monkeypatch.setattr(express_ops, "libbpf", SimpleNamespace(bpf_obj_get=lambda path: os.open("/dev/null", os.O_RDONLY)))
    made = Failing(Path("/none"), cast(Layouts, Fakes(pl_xop=None)))
    yield made
    made.close()


def test_one_that_fails_is_told_once_the_others_are_through(failing: Failing) -> None:
    """Until then they need the descriptors of their netns, which the caller closes."""
    failing.at = "ENROL"
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        with pytest.raises(DatapathError):
            failing.enrol([(netns, PLAN)] * 5)
        assert failing.tried >= 5
    finally:
        os.close(netns)


def test_a_look_that_fails_holds_no_descriptor(failing: Failing) -> None:
    failing.at = "SETTLE"
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    assert failing.enrol([(netns, PLAN)]) == [(OK, 7)]
    failing._call(int)  # the look is over
    assert failing.failures == 1 and len(os.listdir("/proc/self/fd")) == before
    os.close(netns)
