"""security.md 9: a joined workload asks the far proxy, by HBONE, for what is not its to have.

The attacker has taken n2 over: it has the certificate of n2's `far-client` and that workload's address, speaks HTTP/2 by
hand, no hook watches its sockets, and the filter on the workload's cable is off.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.capture import Capture
from tests.attacks.actions import host
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, Mesh, policy, until

PROGRAM = Path(__file__).with_name("hbone_client.py")


def ask(
    mesh: Mesh,
    authority: str,
    *,
    forwarded: str = "",
    dial: str = "web",
    who: str = "far-client",
    at: str = "far-client",
    sni: str = "",
    family: int = 0,
    state: Path | None = None,
    stay_s: float = 0.0,
) -> str:
    """ "200", or a refusal: the status and reason, or the transport's error. `who`: whose certificate, among those below `state`;
    `at`: whose address; `stay_s`: as the program's --stay."""
    node, pod = mesh.lab.nodes["n2"], mesh.w[at].pod
    state, own = state or mesh.lab.paths.agent_state("n2"), mesh.w[at].addresses[family]
    argv = [
        *(sys.executable, str(PROGRAM), "--state", str(state), "--who", f"shop/{who}", "--dial", mesh.w[dial].addresses[family]),
        *("--authority", authority, "--forwarded", forwarded or f'for="{host(own)}:4242"'),
        *("--sni", sni or f"{dial}.shop.mesh.local", "--stay", str(stay_s)),
        *("--before", f"nsenter --net={node.netns} tc qdisc del dev {pod.veth} clsact"),  # the agent repairs it: each time
    ]
    out = node.run(["nsenter", f"--net={mesh.w[at].netns}", *argv], timeout=30)
    assert out.stdout, out.stderr
    return str(json.loads(out.stdout)["answer"])


@pytest.fixture(scope="module", autouse=True)
def taken_over(mesh: Mesh) -> Iterator[None]:
    """The agent puts the filter back by itself."""
    yield
    pod = mesh.w["far-client"].pod
    until(lambda: "clsact" in mesh.lab.nodes["n2"].run(["tc", "qdisc", "show", "dev", pod.veth]).stdout, "the filter is off")


@contextmanager
def allowed(mesh: Mesh) -> Iterator[None]:
    """far-client may ask both."""
    names = {f"far-client-{app}": app for app in ("echo", "web")}
    mesh.apply("".join(policy(name, app, who="far-client") for name, app in names.items()))
    try:
        yield
    finally:
        for name in names:
            mesh.delete("AuthorizationPolicy", name)


@pytest.fixture
def far_client_allowed(mesh: Mesh) -> Iterator[None]:
    with allowed(mesh):
        yield


@pytest.mark.usefixtures("far_client_allowed")
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_what_may_be_asked_is_answered(mesh: Mesh, family: int) -> None:
    """The attack's own program works, or the refusals below prove nothing."""
    for name, port in (("echo", ECHO_PORT), ("web", HTTP_PORT)):
        assert ask(mesh, f"{host(mesh.w[name].addresses[family])}:{port}", dial=name, family=family) == "200"


AUTHORITIES = [
    ("127.0.0.1:6379", "authority_not_local"),
    ("127.0.0.1:8080", "authority_not_local"),
    ("0.0.0.0:8080", "authority_not_local"),
    ("[::1]:8080", "authority_not_local"),
    ("[::]:8080", "authority_not_local"),
    ("169.254.169.254:80", "authority_not_local"),
    ("[fd00:ec2::254]:80", "authority_not_local"),
    ("10.77.0.11:22", "authority_not_local"),
    ("10.77.0.2:15443", "authority_not_local"),
    ("{far}:8080", "authority_not_local"),
    ("{web}:15001", "authority_port"),
    ("{web}:15008", "authority_port"),
    ("{web}:15053", "authority_port"),
    ("{web}:9999", "authority_port"),
    ("{web6}:9999", "authority_port"),
    ("{echo}:7000", "authority_identity"),
    ("{echo6}:7000", "authority_identity"),
    ("web.shop.mesh:8080", "authority_malformed"),
    ("localhost:8080", "authority_malformed"),
    ("010.077.001.012:8080", "authority_malformed"),
    ("0x7f.1:8080", "authority_malformed"),
    ("2130706433:8080", "authority_malformed"),
    ("[::ffff:{web}]:8080", "authority_malformed"),
    ("[::ffff:127.0.0.1]:8080", "authority_malformed"),
    ("[fe80::1%25eth0]:8080", "authority_malformed"),
    ("{web}:08080", "authority_malformed"),
    ("{web}:+8080", "authority_malformed"),
    ("{web}:73616", "authority_malformed"),
    ("{web}", "authority_malformed"),
]


def dials(mesh: Mesh) -> float:
    """connect() of n1's proxy so far, in whatever namespace: those that the kernel let out, and those it refused."""
    return mesh.denied("n1", "dial_denied") + mesh.metric("n1", "pillion_datapath_total", reason="proxy_dial")


def begins(frame: bytes) -> bool:
    """Not of a TCP connection that stood before: such may end meanwhile."""
    packet, v4 = frame[14:], frame[14] >> 4 == 4
    at = (packet[0] & 15) * 4 if v4 else 40
    return packet[9 if v4 else 6] != socket.IPPROTO_TCP or packet[at + 13] & 0x12 == 2


@pytest.mark.attack("what is not the asker's to reach")
@pytest.mark.usefixtures("far_client_allowed")
@pytest.mark.parametrize(("authority", "reason"), AUTHORITIES)
def test_authorities_that_are_not_ours_are_refused(mesh: Mesh, counted: Counted, authority: str, reason: str) -> None:
    """Loopback, metadata, nodes, our own ports, undeclared ports, another identity's endpoint, odd spellings: and no SYN."""
    addresses = {name: workload.addresses[0] for name, workload in mesh.w.items()}
    addresses |= {f"{name}6": host(workload.addresses[1]) for name, workload in mesh.w.items()}
    before = dials(mesh)
    with counted(mesh, "n1", reason), Capture(mesh.w["web"].netns, "lo") as seen:
        answer = ask(mesh, authority.format(**addresses))
    assert answer == f"403 {reason}"
    assert not [frame for frame in seen.frames if begins(frame)]
    assert dials(mesh) == before, "the proxy tried to connect to somewhere"


@pytest.mark.attack("what is not the asker's to reach")
@pytest.mark.usefixtures("far_client_allowed")
@pytest.mark.parametrize("authority", ["user@{}:8080", "{}:8080/", "{}\t:8080"])
def test_authorities_that_http2_forbids_are_not_read(mesh: Mesh, authority: str) -> None:
    """The protocol's own library ends the stream: it never becomes a request."""
    assert not ask(mesh, authority.format(mesh.w["web"].addresses[0])).startswith("200")


FALLBACK = Mutant(
    "d",
    "an authority that is not local leads nowhere",
    (
        "l7proxy/admission.py",
        '        raise Refusal("authority_not_local", f"{asked.address} is no workload of this node")\n',
        "        here = list(config.by_address.get(listener, ()))\n",
    ),
)
ANY_ENDPOINT = Mutant(
    "d",
    "the certificate's identity owns the authority",
    ("l7proxy/admission.py", "    here = [w for w in here if w.spiffe == served and listener in w.addresses]\n", ""),
)
ANY_NAME = Mutant(
    "d",
    "the server name picks the certificate",
    ("l7proxy/tls.py", "if name is None or SpiffeId.parse(spiffe).sni() == name]", "if True]"),
)
ANY_ADDRESS = Mutant(
    "d",
    "a certificate from its identity's address only",
    (
        "l7proxy/admission.py",
        '        raise Refusal("peer_address", f"{address} is no address of {peer.spiffe}")\n',
        "        return\n",
    ),
)
NOT_DECIDED = Mutant(
    "a",
    "each stream is authorized",
    (
        "l7proxy/capture.py",
        "            if not verdict.allowed:\n                worker.metrics",
        "            if False:\n                worker.metrics",
    ),
    (
        "l7proxy/opaque.py",
        "        if not verdict.allowed:\n            worker.metrics",
        "        if False:\n            worker.metrics",
    ),
)


@pytest.mark.red("what is not the asker's to reach", FALLBACK)
@pytest.mark.red("what is not the asker's to reach", ANY_ENDPOINT)
def test_anything_is_reached_without(broken: Mesh) -> None:
    with allowed(broken):
        assert ask(broken, f"127.0.0.1:{HTTP_PORT}") == "200"
        assert ask(broken, f"{broken.w['echo'].addresses[0]}:{ECHO_PORT}") == "200"


@pytest.mark.attack("another identity's name")
@pytest.mark.usefixtures("far_client_allowed")
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_another_identitys_name_finds_no_certificate(mesh: Mesh, counted: Counted, family: int) -> None:
    for sni in ("payments.shop.mesh.local", "echo.shop.mesh.local", "web.shop.other.local", "web"):
        with counted(mesh, "n1", "sni_unknown"):
            assert ask(mesh, f"{host(mesh.w['web'].addresses[family])}:{HTTP_PORT}", sni=sni, family=family) != "200"


@pytest.mark.red("another identity's name", ANY_NAME)
def test_any_name_finds_one_without(broken: Mesh) -> None:
    with allowed(broken):
        assert ask(broken, f"{broken.w['web'].addresses[0]}:{HTTP_PORT}", sni="payments.shop.mesh.local") == "200"


def from_elsewhere(mesh: Mesh) -> str:
    """The right certificate, from the address of another workload of that node."""
    forwarded = f'for="{mesh.w["far-client"].addresses[0]}:4242"'
    return ask(mesh, f"{mesh.w['web'].addresses[0]}:{HTTP_PORT}", at="far", forwarded=forwarded)


@pytest.mark.attack("the right certificate from elsewhere")
@pytest.mark.usefixtures("far_client_allowed")
def test_a_certificate_serves_from_its_own_address_only(mesh: Mesh, counted: Counted) -> None:
    with counted(mesh, "n1", "peer_address"):
        assert from_elsewhere(mesh) != "200"


@pytest.mark.red("the right certificate from elsewhere", ANY_ADDRESS)
def test_a_certificate_serves_from_anywhere_without(broken: Mesh) -> None:
    with allowed(broken):
        assert from_elsewhere(broken) == "200"


@contextmanager
def allowed_elsewhere(mesh: Mesh) -> Iterator[None]:
    """A tunnel may stand for the sake of a rule that asks for more than the identity."""
    text = policy("far-client-elsewhere", "echo", who="far-client")
    mesh.apply(text.replace("principals:", 'ipBlocks: ["192.0.2.0/24"], principals:'))
    try:
        yield
    finally:
        mesh.delete("AuthorizationPolicy", "far-client-elsewhere")


@pytest.mark.attack("a stream that no rule allows")
def test_no_policy_no_stream(mesh: Mesh, counted: Counted) -> None:
    """Each stream is decided, whatever the tunnel stands for."""
    with allowed_elsewhere(mesh), counted(mesh, "n1", "policy_denied"):
        answer = ask(mesh, f"{mesh.w['echo'].addresses[0]}:{ECHO_PORT}", dial="echo")
    assert answer.startswith("403 policy_denied"), answer


@pytest.mark.red("a stream that no rule allows", NOT_DECIDED)
def test_no_policy_a_stream_without(broken: Mesh) -> None:
    with allowed_elsewhere(broken):
        assert ask(broken, f"{broken.w['echo'].addresses[0]}:{ECHO_PORT}", dial="echo") == "200"


@pytest.mark.attack("a claimed address")
@pytest.mark.usefixtures("far_client_allowed")
def test_a_claimed_address_must_be_the_certificates(mesh: Mesh, counted: Counted) -> None:
    """security.md 12: whoever calls as `client` shows the certificate of `client`."""
    with counted(mesh, "n1", "forwarded_foreign", times=2):
        for claimed in (mesh.w["client"].addresses[0], "127.0.0.1"):
            assert ask(mesh, f"{mesh.w['web'].addresses[0]}:{HTTP_PORT}", forwarded=f'for="{claimed}:4242"') != "200"


FOREIGN_CLAIM = Mutant(
    "d",
    "a claimed address is the certificate's",
    (
        "l7proxy/admission.py",
        '        raise Refusal("forwarded_foreign", f"{address} is no address of {peer.spiffe}")\n',
        "        homes = [w for w in config.workloads.values() if w.spiffe == peer.spiffe] or [*config.workloads.values()]\n",
    ),
)


@pytest.mark.red("a claimed address", FOREIGN_CLAIM)
def test_any_address_is_believed_without(broken: Mesh) -> None:
    with allowed(broken):
        claimed = f'for="{broken.w["client"].addresses[0]}:4242"'
        assert ask(broken, f"{broken.w['web'].addresses[0]}:{HTTP_PORT}", forwarded=claimed) == "200"
