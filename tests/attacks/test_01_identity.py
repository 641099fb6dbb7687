"""security.md 1: a joined node, or a stolen join token, says "I run payments".

The attacker is root on n2: it has the node's certificate and key, and asks the controller by curl for what n2 has no grant for.
"""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from lab.api import ApiError
from lab.members import Runner
from tests.attacks.actions import on_host
from tests.attacks.mutants import Counted, Mutant
from tests.conftest import SESSION, opened
from tests.e2e.certificates import new_key, request_pem
from tests.e2e.mesh import ECHO_PORT, TRUST_DOMAIN, Mesh, Refused, policy, populated, until

CONTROLLER = "https://10.77.0.2:15443"
CUT_S = 5.0

UNGRANTED = Mutant(
    "c",
    "a node runs what an operator granted it",
    (
        "controller/registry.py",
        "        if not self.granted(node, workload.namespace, account):\n"
        "            raise not_granted(node, workload.namespace, account, spiffe, source)\n",
        "",
    ),
    (
        "controller/grants.py",
        "        if not self._registry.granted(node, spiffe.namespace, spiffe.service_account):\n",
        "        if 0:\n",
    ),
    ("controller/references.py", "    if not granted(spec.node, resource.namespace, spec.service_account):\n", "    if 0:\n"),
)
UNSCHEDULED = Mutant(
    "c",
    "a certificate only for what is scheduled there",
    (
        "controller/grants.py",
        "        if not self._registry.scheduled(node, spiffe.namespace, spiffe.service_account):\n",
        "        if 0:\n",
    ),
)
TOKEN_FOR_EVER = Mutant(
    "c",
    "a token is for one use, of one node",
    ("controller/tokens.py", "    if record.used_key:\n", "    if False:\n"),
    ("controller/tokens.py", "    if record.node != node:\n", "    if False:\n"),
)
CUT_UNTOLD = Mutant(
    "c",
    "a cut is pushed to every node",
    (
        "controller/registry.py",
        "        self._cut.add(node)\n        self._fresh |= self._index.by_node.get(node, set())\n"
        "        self.revoked.update(revoked)\n"
        "        return await self._seen(revision)\n",
        "        return revision\n",
    ),
)

ANYBODYS_AGENT = Mutant(
    "c",
    "the agent's socket is root's",
    ("nodeagent/api.py", "    before = os.umask(0o177)\n", "    before = os.umask(0)\n"),
)


@dataclass(frozen=True)
class Answer:
    status: int
    body: dict[str, Any]

    @property
    def reason(self) -> str:
        return str(self.body.get("reason", ""))


def curl(mesh: Mesh, method: str, path: str, body: object, *credentials: str) -> Answer:
    state = mesh.lab.paths.agent_state("n2")
    argv = [
        *("curl", "-sS", "--max-time", "5", "-w", "\n%{http_code}", "-X", method, CONTROLLER + path),
        *("--cacert", str(state / "bundle.pem"), *credentials, "--data-binary", "@-"),
    ]
    out = mesh.lab.nodes["n2"].run(argv, input=json.dumps(body), timeout=15)
    text, _, status = out.stdout.rpartition("\n")
    assert text, out.stderr
    return Answer(int(status), json.loads(text))


def as_node(mesh: Mesh, method: str, path: str, body: object) -> Answer:
    state = mesh.lab.paths.agent_state("n2")
    return curl(mesh, method, path, body, "--cert", str(state / "node.pem"), "--key", str(state / "node.key"))


def sign(mesh: Mesh, namespace: str, account: str, domain: str = TRUST_DOMAIN) -> Answer:
    spiffe = f"spiffe://{domain}/ns/{namespace}/sa/{account}"
    return as_node(mesh, "POST", "/v1/agent/sign", {"csr": request_pem(new_key()), "spiffe": spiffe})


def register(mesh: Mesh, namespace: str) -> Answer:
    body = {"service_account": "payments", "addresses": ["10.77.2.250"], "labels": {"app": "payments"}}
    path = f"/v1/agent/workloads/{namespace}/payments"
    answer = as_node(mesh, "PUT", path, body)
    if answer.status == 200:
        as_node(mesh, "DELETE", path, {})
    return answer


@pytest.mark.attack("an identity without a grant")
def test_a_node_registers_only_what_it_was_granted(mesh: Mesh, counted: Counted) -> None:
    with counted(mesh, "controller", "identity_not_granted", times=2):
        for answer in (register(mesh, "treasury"), sign(mesh, "treasury", "payments")):
            assert (answer.status, answer.reason) == (403, "identity_not_granted")
    with counted(mesh, "controller", "foreign_trust_domain"):
        assert sign(mesh, "shop", "far-client", "other.local").reason == "foreign_trust_domain"
    assert register(mesh, "shop").status == 200
    assert sign(mesh, "shop", "far-client").status == 200


@pytest.mark.red("an identity without a grant", UNGRANTED)
def test_a_node_registers_anything_without(broken: Mesh) -> None:
    assert register(broken, "treasury").status == 200


# ---- somebody on the node who is not root


NOBODYS_WAYS: tuple[tuple[str, ...], ...] = ((), ("unshare", "--user", "--map-root-user"))


def knock(mesh: Mesh, where: Runner, way: tuple[str, ...]) -> set[str]:
    """What the agent answers to a user who asks whatever it can be asked; "000": nothing, there was no connection."""
    sock = mesh.lab.nodes["n1"].agent_socket
    asked = (
        ("GET", "/v1/status"),
        ("GET", "/metrics"),
        ("POST", "/v1/rotate"),
        ("POST", "/v1/workloads"),
        ("DELETE", "/v1/workloads/shop/web"),
    )
    argv = [*way, "curl", "-sS", "--max-time", "5", "--unix-socket", str(sock), "-o", "/dev/null", "-w", "%{http_code}\\n", "-X"]
    return {where.run([*argv, method, f"http://agent{path}"], user="nobody").stdout.strip() for method, path in asked}


@pytest.mark.attack("ask the agent without being root")
@pytest.mark.parametrize("way", NOBODYS_WAYS, ids=["a user", "root of a user namespace"])
def test_the_agent_hears_root_alone(mesh: Mesh, way: tuple[str, ...]) -> None:
    """`pillion run` is root's: who could ask the agent could be any identity that is granted to the node."""
    for where in (mesh.lab.nodes["n1"], mesh.w["intruder"]):
        assert knock(mesh, where, way) == {"000"}
    assert mesh.lab.nodes["n1"].status()["ready"]


@pytest.mark.red("ask the agent without being root", ANYBODYS_AGENT)
@pytest.mark.parametrize("way", NOBODYS_WAYS, ids=["a user", "root of a user namespace"])
def test_the_agent_hears_anybody_without(broken: Mesh, way: tuple[str, ...]) -> None:
    assert "000" not in knock(broken, broken.lab.nodes["n1"], way)


@pytest.mark.attack("an identity without a grant")
def test_root_runs_only_what_was_granted(mesh: Mesh) -> None:
    with (
        pytest.raises(ApiError) as refused,
        on_host(mesh, "n1", "payments", "payments", namespace="treasury"),
    ):
        pass
    assert refused.value.status == 403 and "identity_not_granted" in refused.value.body


@pytest.mark.attack("an identity of another node")
def test_a_certificate_only_for_what_runs_there(mesh: Mesh, counted: Counted) -> None:
    with counted(mesh, "controller", "identity_not_scheduled"):
        answer = sign(mesh, "shop", "web")
    assert (answer.status, answer.reason) == (403, "identity_not_scheduled")


@pytest.mark.red("an identity of another node", UNSCHEDULED)
def test_a_certificate_for_another_node_without(broken: Mesh) -> None:
    assert sign(broken, "shop", "web").status == 200


def token_for(mesh: Mesh, node: str) -> str:
    """The secret in a fresh token."""
    token = mesh.lab.controller_api("POST", f"/v1/nodes/{node}/token", {"ttl_s": 60})["token"]
    return str(json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))["secret"])


def join(mesh: Mesh, node: str, secret: str, csr: str = "") -> Answer:
    return curl(mesh, "POST", "/v1/join", {"node": node, "secret": secret, "csr": csr or request_pem(new_key())})


@pytest.fixture
def stranger(own: Mesh) -> str:
    """A node that may join, in the lab of our own: its name stays in that controller."""
    return "n8"


@pytest.mark.attack("a stolen join token")
def test_a_token_is_for_one_use_of_one_node(own: Mesh, counted: Counted, stranger: str) -> None:
    secret, csr = token_for(own, stranger), request_pem(new_key())
    with counted(own, "controller", "token_wrong_node"):
        assert join(own, "n1", secret).reason == "token_wrong_node"
    with counted(own, "controller", "bad_csr"):
        assert join(own, stranger, secret, csr.replace(csr[60:64], "AAAA")).status == 400
    assert join(own, stranger, secret, csr).status == 200
    with counted(own, "controller", "token_other_key"):
        assert join(own, stranger, secret).reason == "token_other_key"
    with counted(own, "controller", "token_used"):
        assert join(own, stranger, secret, csr).reason == "token_used"
    with counted(own, "controller", "token_unknown"):
        assert join(own, stranger, "A" * 43).reason == "token_unknown"


@pytest.mark.red("a stolen join token", TOKEN_FOR_EVER)
def test_a_token_serves_again_without(broken: Mesh) -> None:
    secret = token_for(broken, "n8")
    assert [join(broken, node, secret).status for node in ("n8", "n8", "n9")] == [200, 200, 200]


@pytest.fixture(scope="module")
def own(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh that loses a node."""
    with populated(Lab(f"{SESSION}id", code=tree), opened(tmp_path_factory.mktemp("own"))) as made:
        yield made


@contextmanager
def held(mesh: Mesh) -> Iterator[None]:
    """A connection from n2 to the echo server on n1 stands, and n2's agent hears of nothing more."""
    mesh.apply(policy("far-client-echo", "echo", who="far-client"))
    until(lambda: answers(mesh), "far-client does not reach the echo server")
    holder = mesh.program("far-client", "hold.py", mesh.w["echo"].address, ECHO_PORT, 60)
    assert holder.first_line().startswith("open")
    (agent,) = mesh.lab.pids("n2", "agent")
    os.kill(agent, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(agent, signal.SIGCONT)
        holder.popen.kill()
        holder.popen.communicate()


def answers(mesh: Mesh) -> bool:
    try:
        return bool(mesh.echo("far-client", mesh.w["echo"].address))
    except Refused:
        return False


def open_at_echo(mesh: Mesh) -> str:
    argv = ["ip", "netns", "exec", mesh.w["echo"].pod.netns, "ss", "-Htn", "state", "established", f"sport = :{ECHO_PORT}"]
    return mesh.lab.nodes["n1"].run(argv, check=True).stdout.strip()


@pytest.mark.attack("a node that is cut goes on")
def test_a_cut_nodes_connections_die(own: Mesh, counted: Counted) -> None:
    """It is told nothing: what ends them is the other node."""
    with held(own), counted(own, "n1", "cert_revoked", "node_cut", "peer_address"), counted(own, "controller", "node_cut"):
        assert open_at_echo(own)
        own.lab.controller_api("POST", "/v1/nodes/n2/cut")
        until(lambda: not open_at_echo(own), "a connection of the cut node stands", CUT_S)
        assert sign(own, "shop", "far-client").reason == "node_cut"
    assert own.echo("client", "echo.shop.mesh")


@pytest.mark.red("a node that is cut goes on", CUT_UNTOLD)
def test_a_cut_node_goes_on_without(broken: Mesh) -> None:
    with held(broken):
        broken.lab.controller_api("POST", "/v1/nodes/n2/cut")
        with pytest.raises(AssertionError, match="stands"):
            until(lambda: not open_at_echo(broken), "a connection of the cut node stands", CUT_S)
