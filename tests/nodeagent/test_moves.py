"""Processes that leave their workload's cgroup: real ones, in cgroups made for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent import cgroups, moves
from nodeagent.moves import Moves, Stray
from pillion import nodes
from tests.nodeagent.fakes import until as eventually
from tests.nodeagent.test_agent import Node, node

QUIET = {"process_moved_out": 0, "process_moved_between": 0}


__all__ = ["node"]


class Groups:
    def __init__(self, top: Path) -> None:
        self.top = top
        self.known = {"shop/a": top / "a", "shop/b": top / "b"}
        for path in (*self.known.values(), top / "a/deep", top / "outside"):
            cgroups.create(path)
        self.children: list[subprocess.Popen[bytes]] = []

    def program(self, where: str) -> int:
        child = subprocess.Popen(["sleep", "600"])
        self.children.append(child)
        self.move(child.pid, where)
        return child.pid

    def move(self, pid: int, where: str) -> None:
        cgroups.move(self.top / where, pid)

    def end(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()


@pytest.fixture
def groups() -> Iterator[Groups]:
    made = Groups(cgroups.mount() / f"pillion-moves-{os.getpid()}")
    try:
        yield made
    finally:
        made.end()
        cgroups.remove(made.top)


def test_who_leaves_the_mesh_is_told_until_he_is_back(groups: Groups) -> None:
    looker, pid = Moves(), groups.program("a")
    looker.look(groups.known)
    assert looker.report() == {**QUIET, "strays": []}
    groups.move(pid, "outside")
    for _ in range(2):
        looker.look(groups.known)
        assert looker.counts == {**QUIET, "process_moved_out": 1}
        (stray,) = looker.report()["strays"]
        assert (stray["pid"], stray["workload"]) == (pid, "shop/a") and stray["into"].endswith("/outside")
    groups.move(pid, "a")
    looker.look(groups.known)
    assert looker.report() == {**QUIET, "process_moved_out": 1, "strays": []}


def test_who_becomes_another_workload_is_told_until_he_ends(groups: Groups) -> None:
    looker, pid = Moves(), groups.program("a")
    looker.look(groups.known)
    groups.move(pid, "b")
    looker.look(groups.known)
    assert looker.counts == {**QUIET, "process_moved_between": 1}
    assert looker.report()["strays"] == [{"pid": pid, "workload": "shop/a", "into": "shop/b"}]
    groups.end()
    looker.look(groups.known)
    assert looker.report() == {**QUIET, "process_moved_between": 1, "strays": []}


def test_what_is_no_move(groups: Groups) -> None:
    """Into a child of its own cgroup, an end (also one that nobody has waited for), and a workload's withdrawal."""
    looker, inside, ends, withdrawn = Moves(), groups.program("a"), groups.program("a"), groups.program("b")
    looker.look(groups.known)
    groups.move(inside, "a/deep")
    os.kill(ends, 9)
    cgroup_of_b = groups.known.pop("shop/b")
    groups.move(withdrawn, "outside")
    while ends in cgroups.pids(groups.known["shop/a"]):
        pass
    looker.look(groups.known)
    looker.look({**groups.known, "shop/b": cgroup_of_b})
    assert looker.report() == {**QUIET, "strays": []}


def test_a_number_that_another_process_has_by_now(groups: Groups) -> None:
    looker, pid = Moves(), groups.program("a")
    looker.look(groups.known)
    looker._known[pid] = ("shop/a", looker._known[pid][1] - 1)
    groups.move(pid, "outside")
    looker.look(groups.known)
    assert looker.report() == {**QUIET, "strays": []}


def test_who_ends_while_he_is_looked_at(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    looker, pid = Moves(), groups.program("a")
    looker.look(groups.known)
    born = looker._born(pid)
    groups.end()
    monkeypatch.setattr(looker, "_born", lambda _: born)  # a moment ago he lived
    looker.look(groups.known)
    assert looker.report() == {**QUIET, "strays": []}


def test_the_list_is_bounded(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "STRAYS_MAX", 1)
    looker, pids = Moves(), [groups.program("a") for _ in range(3)]
    looker.look(groups.known)
    for pid in pids:
        groups.move(pid, "outside")
    looker.look(groups.known)
    assert looker.counts["process_moved_out"] == 3 and len(looker.report()["strays"]) == 1
    assert isinstance(next(iter(looker._strays.values())), Stray)


async def test_an_operator_is_told(
    node: Node, groups: Groups, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `pillion status` and a metric, of the agent's own looks."""
    monkeypatch.setattr("nodeagent.reconcile.REPAIR_EVERY_S", 0.1)
    pid = groups.program("outside")
    members = node.ancestor / "workloads/web/cgroup.procs"
    members.write_text(f"{pid}\n")
    await eventually(node.ready, "never ready")
    await eventually(lambda: pid in node.agent.work.moves._known, "never looked")
    members.write_text("")
    await eventually(lambda: node.agent.work.moves.report()["strays"], "never noticed")
    status = (await node.call("GET", "/v1/status"))[1]
    assert status["ready"] and status["moves"]["process_moved_out"] == 1
    nodes._show_status({"origin": "here", "ready": True, "controller": None, "agents": {"n1": status}}, {"nodes": []})
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.endswith("/outside"))
    assert line.split()[:3] == ["n1", str(pid), "shop/web-1"]
    assert 'pillion_agent_events_total{kind="process_moved_out"} 1.0' in (await node.call("GET", "/metrics"))[1]
