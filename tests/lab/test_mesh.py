"""The lab with a mesh: each process dies and comes back alone, and `up` mends what even the supervisors could not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import Lab, LabError, cgroups, services
from lab.pace import PATIENCE
from tests.conftest import LabFactory


def until(condition: Callable[[], object], seconds: float = 30.0 * PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within time"
        time.sleep(0.02)


def test_every_process_is_there_and_apart(lab: Lab) -> None:
    found = {"controller": lab.pids(None, "controller")}
    for node in lab.nodes:
        found |= {f"{node} {what}": lab.pids(node, what) for what in ("agent", "proxy", "proxy-worker")}
    assert all(len(pids) == 1 for pids in found.values()), found
    assert len({pid for pids in found.values() for pid in pids}) == len(found)


@pytest.mark.parametrize("what", ["controller", "agent", "proxy", "proxy-worker"])
def test_what_is_killed_comes_back_alone(lab: Lab, what: str) -> None:
    others = {
        (node, each): lab.pids(node, each) for node in lab.nodes for each in ("agent", "proxy") if (node, each) != ("n1", what)
    }
    old = lab.pids("n1", what)
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    until(lambda: lab.pids("n1", what) and lab.pids("n1", what) != old)
    until(lambda: services.answers(lab.paths.controller_socket, "/v1/status"))
    until(lambda: _agents_ready(lab))
    assert {(node, each): lab.pids(node, each) for node, each in others} == others


def _agents_ready(lab: Lab) -> bool:
    return all(services.answers(node.agent_socket, "/v1/ready") for node in lab.nodes.values())


def test_workloads_come_and_go_in_the_mesh(lab: Lab) -> None:
    workload = lab.add_workload("n2", "shortlived", "other", "someone")
    status = {each["name"]: each for each in lab.nodes["n2"].status()["workloads"]}
    assert status["shortlived"]["spiffe"] == "spiffe://mesh.local/ns/other/sa/someone"
    workload.remove()
    assert "shortlived" not in {each["name"] for each in lab.nodes["n2"].status()["workloads"]}
    assert not workload.netns.exists()


def test_a_workload_outside_its_nodes_grant_is_told(lab: Lab) -> None:
    workload = lab.add_workload("n1", "stranger", "elsewhere", wait=False, grant=False)
    try:
        with pytest.raises(LabError, match="not enrolled"):
            lab.wait_enrolled([workload], timeout_s=1.0)
    finally:
        workload.remove()


def test_up_mends_a_lab_of_which_everything_was_killed(fresh_lab: LabFactory) -> None:
    lab = fresh_lab("m", nodes=1)
    lab.add_workload("n1", "w", "shop")
    cgroups.kill(lab.cgroup)
    lab.up(1)
    lab.wait_enrolled(lab.workloads.values())
    assert len(lab.pids("n1", "proxy-worker")) == 1
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - bpf " in line]
    base = str(lab.paths.base)
    assert sum(point.startswith(base) for point in mounts) == 1
    cgroups.kill(lab.cgroup)
    lab.down()
    assert not any(base in line for line in Path("/proc/self/mountinfo").read_text().splitlines())
    assert not lab.cgroup.exists() and not lab.paths.base.exists()
