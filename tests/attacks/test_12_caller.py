"""security.md 12: be seen as somebody else: by a pooled connection, a foreign claim, or the most trusted address."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import process
from lab.process import Place
from tests.attacks.actions import FAMILIES, PROGRAMS, address, host
from tests.attacks.mutants import Counted, Mutant
from tests.attacks.test_10_confinement import NOBODYS_DIAL, as_proxy, caller
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, Mesh, policy, service

SHARED_POOL = Mutant(
    "b2",
    "a server connection belongs to one caller",
    ("l7proxy/upstream.py", "        key = (caller.spiffe, caller.address, endpoint)\n", "        key = ('', '', endpoint)\n"),
)
ANY_CLAIM = Mutant(
    "b2",
    "a claimed address is the certificate's identity's",
    (
        "l7proxy/admission.py",
        "    homes = [w for w in config.by_address.get(address, ()) if w.spiffe == peer.spiffe]\n    if not homes:\n"
        '        raise Refusal("forwarded_foreign"',
        "    homes = [w for w in config.workloads.values() if w.spiffe == peer.spiffe]\n    if not homes:\n"
        '        raise Refusal("forwarded_foreign"',
    ),
)
ANY_ADDRESS = Mutant(
    "b2",
    "nobody is shown as loopback",
    ("bpf/origin.c", "  if (is_loopback(&caller.addr) || !caller.port)\n    goto deny;", "  "),
    ("bpf/origin.c", "|| !is_mesh(configuration()))\n    goto deny;\n  caller", "|| 0)\n    goto deny;\n  caller"),
)
UNRECORDED_GOES = Mutant(
    "b2",  # where whoever has no record is let in: `NOBODYS_DIAL`
    "what leaves no record sends no SYN",
    ("bpf/sockops.c", "  conn->flags |= PL_CONN_UNRECORDED; /* egress.c drops its SYN, and counts */\n", ""),
)
DEFERRED_PORT = 7002

CLAIM = """
import json, socket, struct, sys
def claim(family):
    s = socket.socket(family)
    address = socket.inet_pton(socket.AF_INET6, sys.argv[1])
    try:
        s.setsockopt(0x50494C, 2, address + struct.pack("=IHH", 1, 4711, 0))
        return "PASSED"
    except OSError as error:
        return type(error).__name__
print(json.dumps([claim(socket.AF_INET), claim(socket.AF_INET6)]))
"""


def seen_as(mesh: Mesh, name: str, server: str, family: str) -> str:
    """The address that the server says it saw."""
    status, body = mesh.curl(name, f"http://{host(address(mesh.w[server], family))}:{HTTP_PORT}/")
    assert status == 200, body
    return body.strip().removeprefix(f"{server} for ").removeprefix("::ffff:")


@pytest.mark.attack("a connection another caller opened")
@pytest.mark.parametrize("server", ["web", "far"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_identities_are_seen_as_two_addresses(mesh: Mesh, family: str, server: str) -> None:
    mesh.apply(policy(f"intruder-{server}", server, who="intruder"))
    try:
        for _ in range(2):
            for name in ("client", "intruder"):
                assert seen_as(mesh, name, server, family) == mesh.w[name].addresses[1 if family == "v6" else 0]
    finally:
        mesh.delete("AuthorizationPolicy", f"intruder-{server}")


@pytest.mark.red("a connection another caller opened", SHARED_POOL)
def test_an_identity_is_seen_as_another_without(broken: Mesh) -> None:
    broken.apply(policy("intruder-web", "web", who="intruder"))
    assert seen_as(broken, "client", "web", "v4") == broken.w["client"].addresses[0]
    assert seen_as(broken, "intruder", "web", "v4") == broken.w["client"].addresses[0]


# ---- a claim over the tunnel


def claim_by_tunnel(mesh: Mesh, claimed: str) -> str:
    """A node that was taken over calls with the certificate of `far-client` and says for which address."""
    echo = mesh.w["echo"].addresses[0]
    argv = [
        *(sys.executable, str(Path(__file__).with_name("hbone_client.py")), "--state", str(mesh.lab.paths.agent_state("n2"))),
        *("--who", "shop/far-client", "--dial", echo, "--authority", f"{echo}:{ECHO_PORT}", "--sni", "echo.shop.mesh.local"),
        *("--forwarded", f'for="{host(claimed)}:4242"'),
    ]
    return str(json.loads(mesh.unhooked("far-client", argv))["answer"])


@pytest.mark.attack("a claimed address")
def test_a_caller_claims_its_own_addresses_only(mesh: Mesh, counted: Counted) -> None:
    mesh.apply(policy("far-client-echo", "echo", who="far-client"))
    try:
        foreign = [*mesh.w["client"].addresses[:2], mesh.w["far"].addresses[0], "127.0.0.1", "::1", "10.77.0.11"]
        with counted(mesh, "n1", "forwarded_foreign", times=len(foreign)):
            found = [claim_by_tunnel(mesh, claimed) for claimed in foreign]
        assert "200" not in found
        with counted(mesh, "n1", "forwarded_malformed"):
            assert claim_by_tunnel(mesh, f"::ffff:{mesh.w['client'].addresses[0]}") != "200"
        assert [claim_by_tunnel(mesh, own) for own in mesh.w["far-client"].addresses[:2]] == ["200"] * 2
    finally:
        mesh.delete("AuthorizationPolicy", "far-client-echo")


@pytest.mark.red("a claimed address", ANY_CLAIM)
def test_a_caller_claims_any_address_without(broken: Mesh) -> None:
    broken.apply(policy("far-client-echo", "echo", who="far-client"))
    assert claim_by_tunnel(broken, broken.w["client"].addresses[0]) == "200"


# ---- the most trusted address


def claim_here(mesh: Mesh, claimed: str) -> list[str]:
    """A workload says for whom it connects, as only the proxy may."""
    out = mesh.w["intruder"].run([sys.executable, "-c", CLAIM, claimed], timeout=15).stdout
    return list(json.loads(out))


@pytest.mark.attack("be shown as loopback")
def test_nobody_is_shown_as_loopback(mesh: Mesh, counted: Counted) -> None:
    claims = [("caller", f"{claimed},4711,1") for claimed in ("127.0.0.1", "127.8.8.8", "0.0.0.0", "::1", "::")]
    with counted(mesh, "n1", "socket_option", times=len(claims)):
        assert set(as_proxy(mesh, mesh.w["web"], *claims)) == {"PermissionError"}
    with counted(mesh, "n1", "socket_option", times=2):
        assert claim_here(mesh, f"::ffff:{mesh.w['client'].addresses[0]}") == ["PermissionError"] * 2
    own = ("caller", f"{mesh.w['client'].addresses[0]},4711,1")
    assert as_proxy(mesh, mesh.w["web"], own) == ["passed"]


@pytest.mark.red("be shown as loopback", ANY_ADDRESS)
def test_anybody_is_shown_as_loopback_without(broken: Mesh) -> None:
    assert as_proxy(broken, broken.w["web"], ("caller", "127.0.0.1,4711,1")) == ["passed"]
    assert claim_here(broken, "::ffff:127.0.0.1") == ["PASSED"] * 2


@pytest.mark.attack("be shown as loopback")
def test_a_dialled_loopback_is_shown_as_the_callers_own(mesh: Mesh) -> None:
    """The caller's side of a captured connection is 127.0.0.1: no server sees that."""
    for name in ("web.shop.mesh", "far.shop.mesh"):
        for option in ("-4", "-6"):
            _, body = mesh.curl("client", f"http://{name}:{HTTP_PORT}/", option)
            assert body.split()[-1].removeprefix("::ffff:") in mesh.w["client"].addresses


# ---- without a record


def records(mesh: Mesh, what: str) -> str:
    """See programs/records.py; of n1's kernel."""
    pin = mesh.lab.paths.agent_run("n1") / "bpf" / "maps" / "arriving"
    done = process.run(Place(mesh.lab.nodes["n1"].place.cgroup), [sys.executable, str(PROGRAMS / "records.py"), str(pin), what])
    assert done.stdout, done.stderr
    return done.stdout.strip()


def unrecorded(mesh: Mesh) -> list[str]:
    """The proxy connects for the client while no record finds room."""
    assert records(mesh, "fill") == "full"
    try:
        web = mesh.w["web"].addresses
        return as_proxy(mesh, mesh.w["web"], *[("dial", each, HTTP_PORT, caller(mesh, "client")) for each in web[:2]])
    finally:
        records(mesh, "clear")


@pytest.mark.attack("a connection that left no record")
def test_a_connection_without_a_record_does_not_begin(mesh: Mesh, counted: Counted) -> None:
    """Its server would see whoever the socket seems to be: itself."""
    with counted(mesh, "n1", "map_full", times=2):
        assert unrecorded(mesh) == ["TimeoutError"] * 2
    assert mesh.curl("client", f"http://web.shop.mesh:{HTTP_PORT}/")[0] == 200


@pytest.mark.red("a connection that left no record", UNRECORDED_GOES)
def test_a_connection_without_a_record_begins_without(broken: Mesh) -> None:
    assert unrecorded(broken) == ["passed"] * 2


@contextmanager
def deferred(mesh: Mesh) -> Iterator[None]:
    """A server on `echo` whose accepted sockets come long after their SYN."""
    server = mesh.w["echo"].start([sys.executable, str(PROGRAMS / "deferred.py"), str(DEFERRED_PORT)], name="deferred")
    try:
        mesh.listening("echo", DEFERRED_PORT)
        mesh.apply(service("deferred", "echo", DEFERRED_PORT, "tcp"))
        yield
    finally:
        server.kill()
        mesh.delete("Service", "deferred")


def late(mesh: Mesh, family: str, *, remove: bool) -> str:
    """The client's connection is established, its record is taken away, then it asks; the answer."""
    argv = [sys.executable, str(PROGRAMS / "late.py"), address(mesh.w["echo"], family), str(DEFERRED_PORT)]
    place = mesh.w["client"].place
    client = subprocess.Popen(place.argv(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdout.readline() == "open\n"
    if remove:
        assert int(records(mesh, "remove")) >= 1
    out = client.communicate("go\n", timeout=20)[0]
    return str(json.loads(out)["answer"])


@pytest.mark.attack("a record that is removed")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_whose_record_is_gone_is_nobodys(mesh: Mesh, counted: Counted, family: str) -> None:
    with deferred(mesh):
        assert late(mesh, family, remove=False).startswith("served ")
        with counted(mesh, "n1", "ingress_plaintext"):
            assert late(mesh, family, remove=True) == ""


@pytest.mark.red("a record that is removed", NOBODYS_DIAL)
def test_a_connection_whose_record_is_gone_is_served_without(broken: Mesh) -> None:
    with deferred(broken):
        assert late(broken, "v4", remove=True).startswith("served ")
