"""security.md 5: a socket made outside the workload and used inside it: no hook knows it, or the wrong one does."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lab.process import Place
from tests.attacks.actions import FAMILIES, PROGRAMS, OnHost, address, dial, run
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, Mesh, until

MAKER_UNASKED = Mutant(
    "a",
    "connect() compares the socket's maker",
    ("bpf/connect.c", "  if (conn->cgroup && conn->cgroup != cgroup)\n    return PL_R_FOREIGN_SOCKET;\n", ""),
)
NO_RECORD_NEEDED = Mutant(
    "d",
    "callers are known by record",
    ("bpf/veth.c", "  return flags & TCP_ACK_OR_RST || arriving.lookup(&f) ? TC_OK", "  return 1 ? TC_OK"),
    (
        "bpf/ingress.c",
        "    return PL_R_INGRESS_PLAINTEXT;\n  if (verdict_of(owner->workload, 0, p->dport, IPPROTO_TCP, &t->rule) != PL_ALLOW)\n"
        "    return PL_R_POLICY_DENIED;\n",
        "    return PASS;\n",
    ),
    ("bpf/packet.h", "      may = verdict == PL_ALLOW && (owner->flags & PL_MEMBER_PERMISSIVE);\n", "      may = true;\n"),
)
OLD_STAY = Mutant(
    "d",
    "enrolment ends what is older",
    (
        "nodeagent/enrol.py",
        "        ended += [str(sock) for sock in rest if diag.destroy(sock)]\n",
        "        rest = []\n        break\n",
    ),
)

SMUGGLE = """
import socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET)   # made outside: of the maker's cgroup
open(sys.argv[1] + "/cgroup.procs", "w").write("0")                            # and only then a member
s.settimeout(1.3)
try:
    s.connect((sys.argv[2], int(sys.argv[3])))
    print("PASSED")
except OSError as e:
    print(type(e).__name__)
"""
TARGETS = [("web", HTTP_PORT), ("echo", ECHO_PORT), ("echo-far", ECHO_PORT)]


def smuggle(mesh: Mesh, cgroup: str, target: str, port: int, family: str = "v4") -> str:
    """From a cgroup on n1 into the client's, with a socket made on the way."""
    client = mesh.w["client"]
    join = f'echo $$ > {cgroup}/cgroup.procs; exec nsenter --net={client.pod.netns_path} "$@"'
    to = address(mesh.w[target], family)
    argv = ["sh", "-c", join, "sh", sys.executable, "-c", SMUGGLE, str(client.cgroup), to, str(port)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False).stdout.strip()


@pytest.mark.attack("a socket made by nobody of the mesh")
@pytest.mark.parametrize(("target", "port"), TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_below_the_hooks_strangers_make_no_socket(mesh: Mesh, counted: Counted, target: str, port: int, family: str) -> None:
    """The maker sits below the hooks but is no member."""
    outside = mesh.lab.cgroup / "n1" / "workloads" / "outside"
    outside.mkdir()
    try:
        with counted(mesh, "n1", "unknown_cgroup"):
            assert smuggle(mesh, str(outside), target, port, family) in ("PermissionError", "")
    finally:
        outside.rmdir()


def from_the_host(mesh: Mesh, target: str, port: int, family: str) -> str:
    """The maker is above the hooks, and the socket is the host's for ever: none of them runs."""
    return smuggle(mesh, str(mesh.lab.nodes["n1"].place.cgroup), target, port, family)


@pytest.mark.attack("a socket made by nobody of the mesh")
def test_a_socket_of_the_host_reaches_nobody(mesh: Mesh, counted: Counted) -> None:
    ways = [(target, port, family) for target, port in TARGETS for family in FAMILIES]
    with counted(mesh, "n1", "egress_no_connect", "ingress_plaintext", "outbound_denied", times=len(ways)):
        with ThreadPoolExecutor(len(ways)) as pool:
            found = list(pool.map(lambda way: from_the_host(mesh, *way), ways))
        assert found == ["TimeoutError"] * len(ways)
    for family in FAMILIES:
        assert "web for" in dial(mesh.w["client"], address(mesh.w["web"], family), HTTP_PORT).answer


@pytest.mark.red("a socket made by nobody of the mesh", NO_RECORD_NEEDED)
def test_a_socket_of_the_host_reaches_its_peer_without(broken: Mesh) -> None:
    assert from_the_host(broken, "web", HTTP_PORT, "v4") == "PASSED"


@pytest.mark.attack("a socket made by another workload")
@pytest.mark.parametrize(("target", "port"), TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_socket_made_by_another_workload_is_refused(mesh: Mesh, counted: Counted, target: str, port: int, family: str) -> None:
    with counted(mesh, "n1", "foreign_socket"):
        assert smuggle(mesh, str(mesh.w["intruder"].cgroup), target, port, family) == "PermissionError"


@pytest.mark.red("a socket made by another workload", MAKER_UNASKED)
def test_a_socket_made_by_another_workload_serves_without(broken: Mesh) -> None:
    assert smuggle(broken, str(broken.w["intruder"].cgroup), "echo", ECHO_PORT) == "PASSED"


def passed(mesh: Mesh, maker: str, user: str, family: str) -> str:
    """Made by one workload, connected by the other; both in the maker's namespace."""
    argv = (str(mesh.w[user].cgroup), address(mesh.w["echo"], family), ECHO_PORT)
    return str(run(mesh.w[maker], "passed.py", *argv)["error"])


@pytest.mark.attack("a socket passed by SCM_RIGHTS")
@pytest.mark.parametrize(("maker", "user"), [("intruder", "client"), ("client", "intruder")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_passed_socket_is_refused(mesh: Mesh, counted: Counted, maker: str, user: str, family: str) -> None:
    with counted(mesh, "n1", "foreign_socket"):
        assert passed(mesh, maker, user, family) == "PermissionError"


@pytest.mark.red("a socket passed by SCM_RIGHTS", MAKER_UNASKED)
def test_a_passed_socket_serves_without(broken: Mesh) -> None:
    assert passed(broken, "intruder", "client", "v4") == ""


CALL = "import socket; socket.create_connection(('{}', {}), 1.5).sendall(b'x')"
PORT = 7311


def older(mesh: Mesh, program: str, family: int) -> str:
    """What becomes of a socket of the node's own that is older than the enrolment of the process which holds it.

    Meanwhile the other node, outside the mesh, calls.
    """
    runner = OnHost(mesh, "n1", "old")
    runner.place.cgroup.mkdir()
    host, caller = mesh.lab.nodes["n1"], mesh.lab.nodes["n2"]
    argv = [sys.executable, str(PROGRAMS / program), str(runner.place.cgroup), host.addresses[family], str(PORT)]
    popen = subprocess.Popen(
        Place(host.place.cgroup, host.netns).argv(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert popen.stdout is not None
        assert popen.stdout.readline() == "ready\n"
        body = {"name": "old", "namespace": "shop", "service_account": "client", "labels": {}, "ports": []}
        mesh.lab.agent_api("n1", "POST", "/v1/workloads", {**body, "cgroup": str(runner.place.cgroup)})
        if program == "older_listener.py":
            caller.run([sys.executable, "-c", CALL.format(host.addresses[family], PORT)], timeout=10)
        out = popen.communicate("go\n", timeout=20)[0]
        mesh.lab.agent_api("n1", "DELETE", "/v1/workloads/shop/old")
        return str(json.loads(out)["error"])
    finally:
        popen.kill()
        popen.wait()
        until(lambda: not (runner.place.cgroup / "cgroup.procs").read_text(), "a process is left")
        runner.place.cgroup.rmdir()


@pytest.mark.attack("a socket older than the enrolment")
@pytest.mark.parametrize("program", ["older.py", "older_listener.py"])
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_a_socket_older_than_the_enrolment_is_ended(mesh: Mesh, counted: Counted, family: int, program: str) -> None:
    before = mesh.metric("n1", "pillion_agent_events_total", kind="older_ended")
    assert older(mesh, program, family) in (
        "ConnectionAbortedError",
        "ConnectionResetError",
        "BrokenPipeError",
        "closed",
        "OSError",
    )
    assert mesh.metric("n1", "pillion_agent_events_total", kind="older_ended") >= before + 1
    counted.reasons.add("older_ended")


@pytest.mark.red("a socket older than the enrolment", OLD_STAY)
@pytest.mark.parametrize("program", ["older.py", "older_listener.py"])
def test_a_socket_older_than_the_enrolment_stays_without(broken: Mesh, program: str) -> None:
    assert older(broken, program, 0) == ""
