"""security.md 10, the other half: a hostile process in the place of a proxy's worker, with its user, seccomp filter, descriptors
and messages to the agent. What it may still do stands in docs/security.md, "What remains"."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from lab import LabError
from lab.process import Place, environment, run, start
from mesh import link
from tests.attacks.actions import PROGRAMS, dial
from tests.attacks.mutants import Counted, Mutant
from tests.attacks.test_10_confinement import caller
from tests.e2e.mesh import HTTP_PORT, TRUST_DOMAIN, Mesh, policy, until

ANY_LISTEN = Mutant(
    "b4",
    "seccomp: no bind, no listen",
    ("l7proxy/seccomp.py", "    timerfd_create timerfd_settime accept accept4 connect",
     "    timerfd_create timerfd_settime accept accept4 bind listen connect"),
)  # fmt: skip
ANY_STOCK = Mutant(
    "b4",
    "a worker gets so many sockets a second",
    ("nodeagent/worker_link.py", "        granted = max(0, min(count, STOCK_ASK_MAX, int(self._allowance)))\n",
     "        granted = count\n"),
)  # fmt: skip
ANY_WORD = Mutant(
    "b4",
    "who says what a worker does not say is hung up on",
    ("nodeagent/proxy_link.py", '                worker.close(f"a worker does not send such a {type(message).__name__}")\n',
     "                pass\n"),
    ("mesh/link.py", "            if length > FRAME_BYTES_MAX or nfds > FRAME_FDS_MAX:\n", "            if False:\n"),
    ("nodeagent/worker_link.py", '                self.close(f"broke the framing: {error}")\n                return\n',
     "                self._decoder = link.Decoder()\n                continue\n"),
)  # fmt: skip
ANY_ACK = Mutant(
    "b4",
    "an acknowledgement has the state's digest",
    ("nodeagent/worker_views.py", "view.sent is state and not view.waiting and view.acked == state.digest",
     "view.sent is state and not view.waiting"),
    ("nodeagent/worker_views.py", "        if digest == view.sent.digest:\n", "        if True:\n"),
)  # fmt: skip
ANY_PAIR = Mutant(
    "b4",
    "agent and kernel compare a pair with what the hooks recorded",
    (
        "nodeagent/express_pairs.py",
        '        if caller is None or known != ask.caller or caller.identity != origin["identity"] or ask.caller not in ',
        "        if caller is None or not ",
    ),
    ("nodeagent/express_pairs.py", '        if view.local[ask.caller] != origin["netns"]:\n', "        if not known:\n"),
    ("bpf/express_control.c", "    if (caller->identity != o->identity) {\n", "    if (0) {\n"),
    ("bpf/express_control.c", "    if (!same_addr(&caller->addr, &o->caller)) {\n", "    if (0) {\n"),
    (
        "bpf/express_control.c",
        "    if (conn->identity != o->identity)\n      return PL_XQ_IDENTITY;\n    if (!same_addr(&conn->peer, &o->caller))\n"
        "      return PL_XQ_CALLER;\n",
        "",
    ),
)
ANY_WAY_OUT = Mutant(
    "b4",
    "the agent looks up itself what a name opens, and for whom",
    (
        "nodeagent/grants.py",
        "        ways = [way for way in plan.ways_out.get(workload, ()) if way.names(grant.name)]\n",
        "        ways = [way for each in plan.ways_out.values() for way in each]\n",
    ),
    ("nodeagent/grants.py", "        return not outside(text) or str(", "        return 0 and str("),
)


def prepared(mesh: Mesh, way: str, *arguments: object) -> tuple[Place, list[str], dict[str, str]]:
    node = "n1"
    base = mesh.lab.cgroup / node
    door = mesh.lab.paths.agent_run(node) / "proxy" / "worker-7.sock"
    argv = [sys.executable, str(PROGRAMS / "hostile_proxy.py"), str(base / "proxy"), str(door), way, *map(str, arguments)]
    code = mesh.lab.start.keywords["code"]
    env = {"PYTHONPATH": str(code)} if code is not None else environment()
    return Place(base / "agent", mesh.lab.nodes[node].netns), argv, env


def forgotten(mesh: Mesh) -> None:
    """The place is no more, and the agent has seen that."""
    (mesh.lab.paths.agent_run("n1") / "proxy" / "worker-7.sock").unlink(missing_ok=True)
    until(lambda: mesh.lab.nodes["n1"].status()["ready"], "the node does not recover")
    until(lambda: len(mesh.lab.nodes["n1"].status()["proxy"]) == 1, "the hostile worker is still there")


def said_by(mesh: Mesh, way: str, *arguments: object) -> dict[str, Any]:
    """What it says came of it."""
    place, argv, env = prepared(mesh, way, *arguments)
    done = run(place, argv, timeout=80, env=env)
    assert done.stdout.strip(), done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def hostile(mesh: Mesh, way: str, *arguments: object) -> dict[str, Any]:
    """The same, while the true worker serves."""
    try:
        said = said_by(mesh, way, *arguments)
        assert mesh.curl("client", f"http://web.shop.mesh:{HTTP_PORT}/")[0] == 200
        return said
    finally:
        forgotten(mesh)


@contextmanager
def agent_counted(mesh: Mesh, counted: Counted, kind: str, times: int) -> Iterator[None]:
    """The agent of n1 counts what it did not give or take."""

    def now() -> float:
        return mesh.metric("n1", "pillion_agent_events_total", kind=kind)

    before = now()
    yield
    assert now() >= before + times
    counted.reasons.add(kind)


# ---- descriptors


@pytest.mark.attack("sockets from the agent, used otherwise")
def test_its_sockets_go_where_the_agent_says(mesh: Mesh, counted: Counted) -> None:
    with counted(mesh, "n1", "dial_denied", times=4):
        found = hostile(mesh, "sockets", mesh.w["web"].addresses[0], HTTP_PORT, caller(mesh, "client"))
    assert found.pop("own") == "passed"
    assert set(found.values()) == {"PermissionError"}, found


@pytest.mark.red("sockets from the agent, used otherwise", ANY_LISTEN)
def test_its_sockets_listen_without(broken: Mesh) -> None:
    found = hostile(broken, "sockets", broken.w["web"].addresses[0], HTTP_PORT, caller(broken, "client"))
    assert (found["bind"], found["listen"]) == ("passed", "passed")


def test_it_gets_this_nodes_certificates_alone(mesh: Mesh) -> None:
    status = mesh.lab.nodes["n1"].status()
    here = {workload["spiffe"] for workload in status["workloads"]}
    there = {workload["spiffe"] for workload in mesh.lab.nodes["n2"].status()["workloads"]}
    assert there - here
    assert set(hostile(mesh, "keys")["svids"]) == here


# ---- messages


def cookie(mesh: Mesh, name: str) -> int:
    return int(run(mesh.w[name].place, [sys.executable, "-c", "import socket, struct; s = socket.socket(); "
               "print(struct.unpack('=Q', s.getsockopt(1, 71, 8))[0])"]).stdout)  # fmt: skip


@pytest.mark.attack("ask the agent for sockets")
def test_it_gets_sockets_of_this_nodes_workloads_and_so_many(mesh: Mesh, counted: Counted) -> None:
    foreign = (1, cookie(mesh, "far"), 1 << 63)  # the machine's own, another node's, nobody's
    with agent_counted(mesh, counted, "proxy_stock_refused", times=30):
        assert hostile(mesh, "stock", 10, *foreign) == {"came": [0, 0, 0], "ended": False}
    (came,) = hostile(mesh, "stock", 5000, cookie(mesh, "web"))["came"]
    assert 0 < came <= 4096


@pytest.mark.red("ask the agent for sockets", ANY_STOCK)
def test_it_gets_any_number_without(broken: Mesh) -> None:
    assert hostile(broken, "stock", 5000, cookie(broken, "web"))["came"] == [5000]


WRONG = {
    "a huge frame": struct.pack("!II", 1 << 30, 0) + b"{",
    "many descriptors": struct.pack("!II", 10, 1 << 20),
    "no message": struct.pack("!II", 4, 0) + b"null",
    "the agent's words": link.encode(link.DropSvid("spiffe://mesh.local/ns/shop/sa/web")),
    "a verdict of its own": link.encode(link.Flow(0.0, "pillion", "")),
    "a state": link.encode(link.Update(1 << 40, True)),
}


def hung_up(mesh: Mesh, *words: str) -> dict[str, bool]:
    """By what was said: whether the agent hung up on it."""
    found = hostile(mesh, "say", *(WRONG[each].hex() for each in words))["ended"]
    return dict(zip(words, found, strict=True))


@pytest.mark.attack("say to the agent what no worker says")
def test_the_agent_hangs_up_on_it(mesh: Mesh, counted: Counted) -> None:
    (agent,) = mesh.lab.pids("n1", "agent")
    with agent_counted(mesh, counted, "proxy_protocol_errors", times=len(WRONG)):
        assert hung_up(mesh, *WRONG) == dict.fromkeys(WRONG, True)
    assert mesh.lab.pids("n1", "agent") == [agent]


@pytest.mark.red("say to the agent what no worker says", ANY_WORD)
def test_the_agent_listens_on_without(broken: Mesh) -> None:
    assert not any(hung_up(broken, "a huge frame", "the agent's words").values())


PUBLIC, REMAINS, METADATA, OPEN = "93.184.215.14", "93.184.215.15", "169.254.169.254", 443
ENTRY = f"""---
apiVersion: mesh.pillion.dev/v1alpha1
kind: ServiceEntry
metadata: {{name: hostile, namespace: shop}}
spec: {{hosts: [api.partner.test], ports: [{{number: {OPEN}, protocol: TLS}}], principals: ["{TRUST_DOMAIN}/ns/shop/sa/client"]}}
"""
GRANTS = {  # what it says of an answer -> what comes of it
    ("intruder", "api.partner.test", (PUBLIC,)): "not_named",
    ("", "api.partner.test", (PUBLIC,)): "unknown_asker",
    ("client", "other.partner.test", (PUBLIC,)): "not_named",
    ("client", "api.partner.test", (METADATA,)): "address",
    ("client", "api.partner.test", ("10.77.0.12",)): "address",
    ("client", "api.partner.test", ("10.77.1.12",)): "address",
    ("client", "api.partner.test", ("::ffff:93.184.215.14",)): "address",
    ("client", "api.partner.test", (PUBLIC,) * 17): "address",
    ("client", "api.partner.test", (REMAINS,)): "granted",  # what a resolver said is for the proxy to know
}


@dataclass
class Asked:
    """The agent's answers, and who could connect where afterwards."""

    grants: dict[tuple[str, str, tuple[str, ...]], str]
    pairs: dict[str, str]
    opened: set[tuple[str, str]]


@contextmanager
def waiting(mesh: Mesh) -> Iterator[None]:
    """A request of `intruder`, whom policy keeps from `web`, waits to be accepted; no other worker takes it."""
    (worker,) = mesh.lab.pids("n1", "proxy-worker")
    asks = None
    os.kill(worker, signal.SIGSTOP)
    try:
        argv = ["curl", "-s", "--max-time", "60", f"http://{mesh.w['web'].addresses[0]}:{HTTP_PORT}/"]
        asks = mesh.w["intruder"].start(argv, name="waiting")
        mesh.established("intruder", 15001)
        yield
    finally:
        os.kill(worker, signal.SIGCONT)
        if asks is not None:
            asks.kill()
        forgotten(mesh)


def ask_for_others(mesh: Mesh) -> Asked:
    web = mesh.w["web"].addresses[0]
    mesh.apply(ENTRY)
    try:
        with waiting(mesh):
            said = said_by(mesh, "ask", web, HTTP_PORT, caller(mesh, "client"), "intruder", json.dumps(list(GRANTS)))
            opened = {
                (who, to)
                for who, to in (("intruder", PUBLIC), ("client", PUBLIC), ("client", METADATA), ("client", REMAINS))
                if dial(mesh.w[who], to, OPEN, timeout_s=0.3).opened
            }
        return Asked(dict(zip(GRANTS, said["grants"], strict=True)), said["pairs"], opened)
    finally:
        mesh.delete("ServiceEntry", "hostile")


@pytest.fixture(scope="module")
def _asked() -> dict[int, Asked]:
    return {}


@pytest.fixture
def asked(mesh: Mesh, _asked: dict[int, Asked]) -> Asked:
    if id(mesh) not in _asked:
        _asked[id(mesh)] = ask_for_others(mesh)
    return _asked[id(mesh)]


@pytest.fixture
def asked_broken(broken: Mesh, _asked: dict[int, Asked]) -> Asked:
    if id(broken) not in _asked:
        _asked[id(broken)] = ask_for_others(broken)
    return _asked[id(broken)]


@pytest.mark.attack("pair sockets of different callers")
def test_the_kernel_carries_for_nobody_under_anothers_name(asked: Asked, mesh: Mesh, counted: Counted) -> None:
    assert asked.pairs["not captured"] == "not_captured"
    assert asked.pairs["another's name"] == "not_the_caller"
    assert asked.pairs["another's connection"] not in ("", "paired")
    for reason in ("not_captured", "not_the_caller"):
        assert mesh.metric("n1", "pillion_express_pairings_total", result=reason) >= 1
        counted.reasons.add(reason)


@pytest.mark.red("pair sockets of different callers", ANY_PAIR)
def test_the_kernel_carries_under_anothers_name_without(asked_broken: Asked) -> None:
    assert asked_broken.pairs["another's name"] == "paired"


@pytest.mark.attack("open a way out by an answer that nobody gave")
def test_its_answers_open_what_policy_names_alone(asked: Asked, mesh: Mesh, counted: Counted) -> None:
    assert asked.grants == GRANTS
    assert asked.opened == {("client", REMAINS)}
    assert mesh.metric("n1", "pillion_datapath_grants_refused_total") >= len(GRANTS) - 1
    counted.reasons.add("grants_refused")


@pytest.mark.red("open a way out by an answer that nobody gave", ANY_WAY_OUT)
def test_its_answers_open_anything_without(asked_broken: Asked) -> None:
    assert asked_broken.opened >= {("intruder", PUBLIC), ("client", PUBLIC), ("client", METADATA)}


@contextmanager
def liar(mesh: Mesh, seconds: float) -> Iterator[None]:
    """It acknowledges whatever it is sent, with a digest that is not the state's."""
    place, argv, env = prepared(mesh, "lie", seconds)
    process = start(place, argv, name="liar", log=mesh.scratch / "liar.log", env=env)
    try:
        until(lambda: (mesh.lab.paths.agent_run("n1") / "proxy" / "worker-7.sock").exists(), "the liar is not there")
        yield
    finally:
        process.kill()
        forgotten(mesh)
        mesh.delete("AuthorizationPolicy", "lied-about")


@pytest.mark.attack("acknowledge a state that is not held")
def test_its_word_does_not_make_a_policy_in_force(mesh: Mesh, counted: Counted) -> None:
    """`wait` answers when every worker shows the digest of the state: this one never does."""
    with agent_counted(mesh, counted, "worker_wrong_state", times=2), liar(mesh, 20):
        until(lambda: not mesh.lab.nodes["n1"].status()["ready"], "the agent takes its word")
        revision = mesh.lab.apply(policy("lied-about", "web", who="far-client"))
        with pytest.raises(LabError):
            mesh.lab.wait(revision, timeout_s=1.5)


@pytest.mark.red("acknowledge a state that is not held", ANY_ACK)
def test_its_word_is_taken_without(broken: Mesh) -> None:
    with liar(broken, 20):
        until(lambda: len(broken.lab.nodes["n1"].status()["proxy"]) == 2, "it is not taken for a worker")
        broken.lab.wait(broken.lab.apply(policy("lied-about", "web", who="far-client")), timeout_s=4)


def test_what_it_tells_is_shown_and_no_more(mesh: Mesh) -> None:
    """It may lie in the log of flows. A field has 512 characters at most, goes out as JSON, and `pillion flows` escapes it
    (tests/pillion)."""
    text = "\x1b]0;owned\x07\x1b[2J\r\nallowed"
    flow = {"time": 0.0, "verdict": "denied", "reason": text, "source": text, "destination": text, "path": text}
    assert hostile(mesh, "flow", json.dumps(flow)) == {"ended": False}
    assert any(each["source"] == text for each in mesh.flows("n1"))
    raw = mesh.lab.agent_api("n1", "GET", "/v1/flows?limit=1000")
    assert "\x1b" not in str(raw) and "\x07" not in str(raw)
