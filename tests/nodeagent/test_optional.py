"""Each part that a kernel may lack, forced to be lacking: it alone is off, that is told, and the node goes on."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nodeagent import optional
from nodeagent import reconcile_events as ev
from nodeagent.datapath_api import DatapathError, OpenListener
from nodeagent.datapath_fake import FakeDatapath
from nodeagent.express import Express
from nodeagent.express_path import ExpressPath
from nodeagent.express_probes import PROBES
from nodeagent.kernel_work import KernelWork
from nodeagent.optional import ENDING, EXPRESS, INSTEAD, PODS
from nodeagent.proxy_link import ProxyFleet
from nodeagent.readiness import Facts, assess
from nodeagent.reconcile import Reconciler
from nodeagent.roster import KEPT_OUT, PODS_OFF
from nodeagent.sockdiag import Sock, SockDiag
from nodeagent.workloads import Spec
from pillion import nodes
from tests.mesh.build import identity, state, workload
from tests.nodeagent.fakes import until
from tests.nodeagent.test_agent import Node, node

__all__ = ["node"]


# ---- ending connections


def test_this_kernel_ends_connections() -> None:
    assert optional.ending() == ""


@pytest.mark.parametrize(
    ("answer", "says"),
    [(OSError(95, "SOCK_DESTROY: this kernel lacks it"), "this kernel lacks it"), (None, "lived on")],
    ids=["refused", "no effect"],
)
def test_a_kernel_that_does_not_is_seen(monkeypatch: pytest.MonkeyPatch, answer: OSError | None, says: str) -> None:
    def destroy(self: SockDiag, sock: Sock) -> bool:
        if answer is not None:
            raise answer
        return True

    monkeypatch.setattr("nodeagent.express_probes.WAIT_S", 0.1)
    monkeypatch.setattr(SockDiag, "destroy", destroy)
    assert says in optional.ending()


# ---- pods


def enrolled(name: str, number: int, scratch: Path, veth: str | None) -> ev.Enrolled:
    item = workload(name, account=name, number=number)
    spec = Spec(name, "shop", name, str(scratch), item.addresses, netns=str(scratch / "ns") if veth else None, veth=veth)
    return ev.Enrolled(spec, number, number, item)


def test_without_their_filter_pods_are_nobodys_and_the_others_go_on(tmp_path: Path) -> None:
    datapath = FakeDatapath()
    datapath.lacking = {PODS: "no clsact"}
    pod, host = enrolled("pod", 301, tmp_path, "ve1"), enrolled("host", 302, tmp_path, None)
    for entry, place in ((pod, tmp_path / "ns"), (host, None)):
        datapath._netns[place] = entry.netns
    work = KernelWork(datapath, "n1", tmp_path / "cg")
    known = state(pod.item, host.item, identity("shop", "pod", 301), identity("shop", "host", 302))
    result = work.apply(ev.ApplyKernel(1, 7, known, (pod, host), 1))
    assert result.errors == {pod.spec.key: "pods are off on this node: no clsact"}
    assert result.serving == {host.spec.key}
    assert {member.workload for member in datapath.members} == {302} and not datapath.guarded
    assert datapath.plan is not None and {member.workload for member in datapath.plan.members.values()} == {302}
    assert not [id for id in result.listeners if id.startswith("301/")]
    datapath.lacking = {}  # a later try went well
    assert work.apply(ev.ApplyKernel(2, 7, known, (pod, host), 2)).serving == {pod.spec.key, host.spec.key}
    assert set(datapath.guarded) == {"ve1"}
    datapath.close()


@pytest.mark.parametrize("why", [f"{PODS_OFF}: no clsact", f"{KEPT_OUT}: port 15001 of ::1: it is taken"])
def test_such_a_pod_is_told_and_holds_up_nobody(why: str) -> None:
    facts = Facts(programs={"connect4": True}, revision=7, applied=True, workers={"0": True})
    core = Reconciler("n1")
    spec = Spec("pod", "shop", "pod", "/cg", ("10.9.0.9",), veth="ve1", netns="/ns")
    core.roster.placed = {spec.key: ev.Placed(spec, 301, 301)}
    core._by_key = {spec.key: ev.Enrolled(spec, 301, 301, workload("pod", account="pod"))}
    core.roster.lacks = lambda *_: ""  # type: ignore[method-assign]  # registered, in the state
    core._listener_errors = {spec.key: why}
    waiting, refused = core.unserved()
    assert not waiting and set(refused) == {spec.key}
    found = assess(replace(facts, waiting=waiting, refused=refused))
    assert found.ready and why in found.detail


def test_a_pod_whose_own_program_has_our_port_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a host's workload, beside whom all of that host's go unserved."""

    def taken(*_: object) -> list[OpenListener]:
        raise OSError(errno.EADDRINUSE, "port 15001 of ::1: it is taken")

    datapath = FakeDatapath()
    monkeypatch.setattr(datapath, "open_listeners", taken)
    pod, host = enrolled("pod", 301, tmp_path, "ve1"), enrolled("host", 302, tmp_path, None)
    known = state(pod.item, host.item, identity("shop", "pod", 301), identity("shop", "host", 302))
    result = KernelWork(datapath, "n1", tmp_path / "cg").apply(ev.ApplyKernel(1, 7, known, (pod, host), 1))
    assert not result.serving
    assert {key: text.startswith(KEPT_OUT) for key, text in result.errors.items()} == {pod.spec.key: True, host.spec.key: False}
    assert all("port 15001 of ::1" in text and "ss -lntup" in text and "Errno" not in text for text in result.errors.values())
    datapath.close()


# ---- express


class OffPath:
    """An express path of a kernel that fails some probes."""

    def __init__(self, failing: set[str]) -> None:
        self.failing, self.closed = failing, False

    def probes(self) -> dict[str, str]:
        return {name: "did otherwise" if name in self.failing else "ok" for name in PROBES}

    def records(self) -> list[int]:
        return []

    def close(self) -> None:
        self.closed = True


class Kernel(FakeDatapath):
    def __init__(self, failing: set[str] | DatapathError) -> None:
        super().__init__()
        self.failing = failing

    def express(self) -> ExpressPath:
        if isinstance(self.failing, DatapathError):
            raise self.failing
        self.made = OffPath(self.failing)
        return self.made  # type: ignore[return-value]  # what is asked of it here


@pytest.mark.parametrize("probe", PROBES)
async def test_one_probe_that_fails_turns_express_off(tmp_path: Path, probe: str) -> None:
    datapath = Kernel({probe})
    express = Express(datapath, ProxyFleet(tmp_path, lambda: None, None))  # type: ignore[arg-type,return-value]  # nobody dials
    await express.start()
    assert not express.on and datapath.made.closed and not express.hello()
    assert f"{probe}: did otherwise" in express.why and express.why.count("did otherwise") == 1
    text = await express.metrics()
    assert "pillion_express_on 0.0" in text and f'pillion_express_probe{{probe="{probe}"}} 0.0' in text
    assert text.count("pillion_express_probe{") - text.count("} 1.0\n") <= 1
    assert set(optional.off(datapath, express.why)) == {EXPRESS}
    await express.close()


# ---- what an operator sees


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Of the node that is made next."""
    made = Kernel({"fionread"})
    monkeypatch.setattr("tests.nodeagent.test_agent.FakeDatapath", lambda: made)
    return made


async def test_a_node_whose_kernel_fails_a_probe_goes_on(kernel: Kernel, node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of them in turn."""
    await until(node.ready, "never ready")
    for probe in PROBES:
        kernel.failing = {probe}
        await node.agent.express.start()
        status: dict[str, Any] = (await node.call("GET", "/v1/status"))[1]
        assert status["ready"] and {name for name, part in status["optional"].items() if not part["on"]} == {EXPRESS}
        assert status["optional"][EXPRESS]["why"].endswith(f"needs: {probe}: did otherwise")
        capsys.readouterr()
        nodes._show_status({"origin": "here", "ready": True, "controller": None, "agents": {"n1": status}}, {"nodes": []})
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("n1") and "did otherwise" in line)
        assert EXPRESS in line and probe in line and INSTEAD[EXPRESS] in line
        values = {}
        for line in (await node.call("GET", "/metrics"))[1].splitlines():
            if line.startswith(("pillion_express_probe{", "pillion_agent_optional_on{")):
                name, _, value = line.rpartition(" ")
                values[name.split('"')[1]] = float(value)
        assert values == {**dict.fromkeys((*PROBES, *INSTEAD), 1.0), probe: 0.0, EXPRESS: 0.0}


@pytest.mark.parametrize("part", [PODS, ENDING, EXPRESS])
async def test_the_node_goes_on_and_says_what_is_off(node: Node, part: str) -> None:
    await until(node.ready, "never ready")
    if part != EXPRESS:  # which the fake never has
        node.datapath.lacking = {part: "the kernel said no"}
    await until(node.ready, "no longer ready")
    status: dict[str, Any] = (await node.call("GET", "/v1/status"))[1]
    assert status["ready"] and set(status["optional"]) == set(INSTEAD)
    lacking = {name: state for name, state in status["optional"].items() if not state["on"]}
    assert set(lacking) == {part, EXPRESS}
    assert lacking[part]["why"] and lacking[part]["instead"] == INSTEAD[part]
    text = (await node.call("GET", "/metrics"))[1]
    for name in INSTEAD:
        assert f'pillion_agent_optional_on{{part="{name}"}} {float(name not in lacking)}' in text
