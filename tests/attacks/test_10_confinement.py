"""security.md 10: the proxy is taken over. Code runs as it does (user, cgroup, seccomp filter, netns), with sockets as the agent
hands them out. (Every system call that its filter refuses: tests/l7proxy/test_confine.py.)"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lab import Workload
from lab.process import Place, environment, run
from tests.attacks.actions import PROGRAMS
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, Mesh

ANY_SOCKET = Mutant(
    "b1",
    "seccomp",
    (
        "l7proxy/seccomp.py",
        "    out.append(denied)\n",
        "    out += [_op(_JEQ, NUMBERS['socket'], 0, 1), _op(_RET, _ALLOW)]\n    out.append(denied)\n",
    ),
)
ANY_DIAL = Mutant(
    "b1",
    "the list of where the proxy may connect",
    ("bpf/connect.c", "  if (!dials.lookup(&k))\n    return PL_R_DIAL_DENIED;\n", ""),
)
NOBODYS_DIAL = Mutant(
    "b2",
    "a connection to a server says for whom",
    ("bpf/connect.c", "      return PL_R_NO_CALLER;\n", "      return PL_R_PROXY_DIAL;\n"),
    (
        "bpf/ingress.c",
        "  if (is_loopback(&p->src) || is_loopback(&p->dst))\n    return PL_R_INGRESS_NO_RECORD;\n  if (!(owner->flags",
        "  if (1)\n    return PASS;\n  if (!(owner->flags",
    ),
    ("bpf/packet.h", "      may = verdict == PL_ALLOW && (owner->flags & PL_MEMBER_PERMISSIVE);\n  }", "      may = true;\n  }"),
)
ANY_PAIRING = Mutant(
    "b1",
    "policy is asked again where the packet arrives",
    ("bpf/ingress.c", "      return verdict != PL_DENY ? PASS : PL_R_POLICY_DENIED;\n", "      return PASS;\n"),
    ("bpf/packet.h", "      may = server && verdict != PL_DENY;\n", "      may = server;\n"),
)
ROOT_PROXY = Mutant("b1", "another user", ("l7proxy/confine.py", "    os.setresuid(uid, uid, uid)\n", ""),
                    ("l7proxy/confine.py", 'found["Uid"].split() != [str(uid)] * 4 or ', ""))  # fmt: skip

Attempt = Sequence[object]


def as_proxy(mesh: Mesh, sockets_of: Workload, *attempts: Attempt) -> list[str]:
    """What became of each: "passed", or the error."""
    base = mesh.lab.cgroup / sockets_of.node
    argv = [sys.executable, str(PROGRAMS / "as_proxy.py"), str(base / "proxy"), json.dumps(attempts)]
    code = mesh.lab.start.keywords["code"]
    env = {"PYTHONPATH": str(code)} if code is not None else environment()
    done = run(Place(base / "agent", sockets_of.netns), argv, timeout=30, env=env)
    assert done.stdout.strip(), done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def caller(mesh: Mesh, name: str) -> str:
    """For whom the proxy says it calls."""
    spiffe = f"spiffe://mesh.local/ns/shop/sa/{name}"
    items = mesh.lab.controller_api("GET", "/v1/state")["items"]
    return f"{mesh.w[name].addresses[0]},4711,{items[f'Identity//{spiffe}']['id']}"


@pytest.mark.parametrize("what", ["proxy", "proxy-worker"])
def test_the_running_proxy_has_nothing(mesh: Mesh, what: str) -> None:
    for node in ("n1", "n2"):
        pids = mesh.lab.pids(node, what)
        assert pids
        for pid in pids:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
            for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(status[name], 16) == 0, name
            assert status["NoNewPrivs"].strip() == "1"
            assert status["Seccomp"].strip() == "2"
            assert "0" not in status["Uid"].split()
            assert "0" not in status["Gid"].split()
            assert status["Groups"].strip() in ("", status["Gid"].split()[0])
            assert [line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]] == ["lo"]
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
            assert not any(Path(f"/proc/{pid}/net/route").read_text().splitlines()[1:])


# ---- sockets of its own


SOCKETS = [(family, kind, 0) for family in (2, 10) for kind in (1, 2)] + [(1, 1, 0), (17, 3, 3), (16, 3, 0)]


@pytest.mark.attack("the proxy makes a socket")
def test_it_makes_no_socket(mesh: Mesh) -> None:
    found = as_proxy(mesh, mesh.w["web"], *[("socket", *kind) for kind in SOCKETS])
    assert set(found) == {"PermissionError"}


@pytest.mark.red("the proxy makes a socket", ANY_SOCKET)
def test_it_makes_sockets_without(broken: Mesh) -> None:
    assert as_proxy(broken, broken.w["web"], ("socket", 2, 2, 0)) == ["passed"]


# ---- the agent's sockets


@pytest.mark.attack("the proxy connects where it should not")
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_it_connects_nowhere_else(mesh: Mesh, counted: Counted, family: int) -> None:
    web, echo, far = (mesh.w[name].addresses[family] for name in ("web", "echo", "far"))
    who = caller(mesh, "client")
    loopback = ("127.0.0.1", "::1")[family]
    nowhere = [
        ("dial", web, 9999, who),  # undeclared
        ("dial", web, 22, who),
        ("dial", echo, ECHO_PORT, who),  # declared, of another workload's netns
        ("dial", loopback, HTTP_PORT, who),
        ("dial", loopback, 6379, who),
        ("dial", far, HTTP_PORT, who),  # on another node, past the tunnel
        ("dial", mesh.lab.nodes["n1"].addresses[family], 22, who),
        ("dial", ("10.77.0.2", "fd77::2")[family], 15443, who),
        ("dial", ("169.254.169.254", "fd00:ec2::254")[family], 80, who),
    ]
    mapped = [("dial", f"::ffff:{host}", port, who) for _, host, port, _ in nowhere] if family == 0 else []
    with counted(mesh, "n1", "dial_denied", times=len(nowhere) + len(mapped)):
        assert set(as_proxy(mesh, mesh.w["web"], *nowhere, *mapped)) == {"PermissionError"}
    assert as_proxy(mesh, mesh.w["web"], ("dial", web, HTTP_PORT, who)) == ["passed"]


@pytest.mark.red("the proxy connects where it should not", ANY_DIAL)
def test_it_connects_anywhere_without(broken: Mesh) -> None:
    who = caller(broken, "client")
    web, echo = (broken.w[name].addresses[0] for name in ("web", "echo"))
    found = as_proxy(broken, broken.w["web"], ("dial", web, 9999, who), ("dial", echo, ECHO_PORT, who))
    assert found == ["ConnectionRefusedError", "passed"]


@pytest.mark.attack("the proxy connects for nobody")
def test_it_says_for_whom(mesh: Mesh, counted: Counted) -> None:
    web = mesh.w["web"].addresses
    with counted(mesh, "n1", "no_caller", times=3):
        found = as_proxy(mesh, mesh.w["web"], *[("dial", host, HTTP_PORT, "") for host in (*web, f"::ffff:{web[0]}")])
        assert set(found) == {"PermissionError"}


@pytest.mark.red("the proxy connects for nobody", NOBODYS_DIAL)
def test_it_connects_for_nobody_without(broken: Mesh) -> None:
    assert as_proxy(broken, broken.w["web"], ("dial", broken.w["web"].addresses[0], HTTP_PORT, "")) == ["passed"]


@pytest.mark.attack("a pairing that policy denies")
def test_it_serves_nobody_whom_policy_denies(mesh: Mesh, counted: Counted) -> None:
    """The kernel asks policy again, for the identity that the proxy names."""
    web = mesh.w["web"].addresses
    with counted(mesh, "n1", "policy_denied", times=3):
        wrong = [("dial", host, HTTP_PORT, caller(mesh, "intruder")) for host in (*web, f"::ffff:{web[0]}")]
        assert set(as_proxy(mesh, mesh.w["web"], *wrong)) == {"TimeoutError"}


@pytest.mark.red("a pairing that policy denies", ANY_PAIRING)
def test_it_serves_anybody_without(broken: Mesh) -> None:
    who = caller(broken, "intruder")
    assert as_proxy(broken, broken.w["web"], ("dial", broken.w["web"].addresses[0], HTTP_PORT, who)) == ["passed"]


# ---- keys


def keys(mesh: Mesh, node: str) -> list[Path]:
    """Files that hold a private key."""
    found = [
        path for path in mesh.lab.paths.agent_state(node).rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()
    ]
    assert found
    return found


def held(pid: int) -> set[bytes]:
    """The keys in a process's memfds."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "memfd:" in os.readlink(entry):
                found.add(entry.read_bytes().strip())
        except OSError:
            continue
    return found


@pytest.mark.attack("the proxy takes other keys")
def test_it_has_its_own_nodes_keys_and_no_others(mesh: Mesh) -> None:
    stored = {node: b"".join(path.read_bytes() for path in keys(mesh, node)) for node in ("n1", "n2")}
    for node in ("n1", "n2"):
        for pid in mesh.lab.pids(node, "proxy-worker"):
            assert held(pid)
            for key in held(pid):
                where = [
                    name
                    for name, text in stored.items()
                    if json.dumps(key.decode())[1:-1].encode() in text.replace(b"\n", b"\\n")
                ]
                assert where == [node]
    paths = [*keys(mesh, "n1"), *keys(mesh, "n2")]
    assert set(as_proxy(mesh, mesh.w["web"], *[("read", str(path)) for path in paths])) == {"PermissionError"}


@pytest.mark.red("the proxy takes other keys", ROOT_PROXY)
def test_it_reads_other_keys_without(broken: Mesh) -> None:
    assert as_proxy(broken, broken.w["web"], ("read", str(keys(broken, "n2")[0]))) == ["passed"]
