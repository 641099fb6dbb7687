"""threats.md 9: a joined workload asks the far proxy, by HBONE, for what is not its to have.

The attacker has taken n2 over: it has the certificate of n2's `far-client` and that workload's address, speaks HTTP/2 by
hand, no hook watches its sockets, and the filter on the workload's cable is off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, Mesh, policy, until

PROGRAM = Path(__file__).with_name("hbone_client.py")


def ask(mesh: Mesh, authority: str, *, forwarded: str = "", dial: str = "web", who: str = "far-client", sni: str = "") -> str:
    """ "200", or a refusal: the status and reason, or the transport's error."""
    state = mesh.lab.paths.agent_state("n2")
    argv = [
        *(sys.executable, str(PROGRAM), "--state", str(state), "--who", f"shop/{who}", "--dial", mesh.w[dial].addresses[0]),
        *("--authority", authority, "--forwarded", forwarded or f'for="{mesh.w[who].addresses[0]}:4242"'),
        *("--sni", sni or f"{dial}.shop.mesh.local"),
    ]
    mesh.lab.nodes["n2"].run(["tc", "qdisc", "del", "dev", mesh.w[who].pod.veth, "clsact"])  # the agent repairs it: each time
    out = mesh.lab.nodes["n2"].run(["nsenter", f"--net={mesh.w[who].netns}", *argv], timeout=30)
    assert out.stdout, out.stderr
    return str(json.loads(out.stdout)["answer"])


@pytest.fixture(scope="module", autouse=True)
def taken_over(mesh: Mesh) -> Iterator[None]:
    """The agent puts the filter back by itself."""
    yield
    pod = mesh.w["far-client"].pod
    until(lambda: "clsact" in mesh.lab.nodes["n2"].run(["tc", "qdisc", "show", "dev", pod.veth]).stdout, "the filter is off", 30)


@pytest.fixture
def far_client_allowed(mesh: Mesh):  # type: ignore[no-untyped-def]  # a fixture without a value
    mesh.apply(policy("far-client-echo", "echo", who="far-client") + policy("far-client-web", "web", who="far-client"))
    yield
    mesh.delete("AuthorizationPolicy", "far-client-echo")
    mesh.delete("AuthorizationPolicy", "far-client-web")


@pytest.mark.usefixtures("far_client_allowed")
def test_what_may_be_asked_is_answered(mesh: Mesh) -> None:
    """The attack's own program works, or the refusals below prove nothing."""
    assert ask(mesh, f"{mesh.w['echo'].addresses[0]}:{ECHO_PORT}", dial="echo") == "200"
    assert ask(mesh, f"{mesh.w['web'].addresses[0]}:{HTTP_PORT}") == "200"


@pytest.mark.usefixtures("far_client_allowed")
@pytest.mark.parametrize(
    "authority",
    [
        "127.0.0.1:6379",
        "169.254.169.254:80",
        "10.77.0.11:22",
        "{web}:15001",
        "{web}:15008",
        "{web}:9999",
        "{echo}:7000",
        "web.shop.mesh:8080",
        "010.077.001.012:8080",
        "[::ffff:{web}]:8080",
        "{web}:08080",
        "{web}",
    ],
)
def test_authorities_that_are_not_ours_are_refused(mesh: Mesh, authority: str) -> None:
    """Loopback, metadata, the node, our own ports, undeclared ports, another identity's endpoint, odd spellings."""
    addresses = {name: workload.addresses[0] for name, workload in mesh.w.items()}
    answer = ask(mesh, authority.format(**addresses))
    assert answer != "200"


@pytest.mark.usefixtures("far_client_allowed")
def test_a_claimed_address_must_be_the_certificates(mesh: Mesh) -> None:
    """threats.md 12: whoever calls as `client` shows the certificate of `client`."""
    answer = ask(mesh, f"{mesh.w['web'].addresses[0]}:{HTTP_PORT}", forwarded=f'for="{mesh.w["client"].addresses[0]}:4242"')
    assert answer != "200"
    assert ask(mesh, f"{mesh.w['web'].addresses[0]}:{HTTP_PORT}", forwarded='for="127.0.0.1:4242"') != "200"


def test_no_policy_no_stream(mesh: Mesh) -> None:
    """A tunnel may stand for the sake of a rule that asks for more than the identity; each stream is decided."""
    text = policy("far-client-elsewhere", "echo", who="far-client").replace(
        "principals:", 'ipBlocks: ["192.0.2.0/24"], principals:'
    )
    mesh.apply(text)
    try:
        answer = ask(mesh, f"{mesh.w['echo'].addresses[0]}:{ECHO_PORT}", dial="echo")
        assert answer.startswith("403 policy_denied"), answer
    finally:
        mesh.delete("AuthorizationPolicy", "far-client-elsewhere")


@pytest.mark.usefixtures("far_client_allowed")
def test_another_identitys_name_finds_no_certificate(mesh: Mesh) -> None:
    assert ask(mesh, f"{mesh.w['web'].addresses[0]}:{HTTP_PORT}", sni="payments.shop.mesh.local") != "200"
