"""security.md 18: one identity takes what the others need. How long a neighbour waits: `make bench ONLY=noisy-neighbour`; that
memory stays bounded, and that every refusal is counted: tests/e2e/test_noisy_neighbour.py."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.pace import SLOW
from tests.attacks.actions import PROGRAMS, Dialled, dial
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, NS, TRUST_DOMAIN, Mesh, policy, until
from tests.e2e.test_noisy_neighbour import BUDGET, BYTES, HEAD_BYTES, noise, peer_noise

SLEEPERS = 40
REQUESTS = f"{{requestsPerSecond: {50 / SLOW:.0f}}}"  # fewer than the flood makes there
UNDER_WAY_MAX, PLACES = 2048, 16384  # connectsUnderWay of MeshConfig; of all identities, see bpf/maps.h
DENIED_PORTS = (7001, 7002, 7003)

ANY_CONNECTIONS = Mutant(
    "b4",
    "a budget of connections",
    ("l7proxy/budget.py", "        if self.connections >= budget.connections:\n", "        if False:\n"),
)
ANY_REQUESTS = Mutant(
    "b4", "a budget of requests", ("l7proxy/budget.py", "        if self.requesting.take(now):\n", "        if True:\n")
)
ANY_BYTES = Mutant(
    "b4", "a budget of bytes",
    ("l7proxy/budgeted.py", "if grown and account.held > account.budget.bytes_in_flight:\n", "if False:\n"),
    ("l7proxy/budget.py", "        return self.held > self.budget.bytes_in_flight\n", "        return False\n"),
)  # fmt: skip
ANY_HANDSHAKES = Mutant(
    "b4", "a budget of handshakes", ("l7proxy/inbound.py", "        if not account.handshake():\n", "        if False:\n")
)
ANY_STREAMS = Mutant(
    "b4",
    "a budget of streams",
    ("l7proxy/inbound.py", "            if not self.core.peer_is_bulk and self.inbound.full(self.peer.spiffe, most):\n",
     "            if most < 0:\n"),
)  # fmt: skip
ANY_DESCRIPTORS = Mutant(
    "b4",
    "a budget of descriptors",
    ("l7proxy/budget.py", "        if self.descriptors + descriptors > budget.descriptors:\n", "        if False:\n"),
)
ANY_RESETS = Mutant(
    "b4", "a bound on resets", ("l7proxy/hbone/stream.py", "resets_burst: int = 1000", "resets_burst: int = 1 << 30")
)
ANY_HEAD = Mutant(
    "b4",
    "a bound on CONTINUATIONs",
    ("l7proxy/hbone/stream.py", "continuations_max: int = 4", "continuations_max: int = 1 << 30"),
)
ANY_UNDER_WAY = Mutant(
    "b4",
    "a budget of connections under way",
    ("bpf/connect.c", "  return u && u->arriving >= most;\n", "  return false && u && most;\n"),
)
ANY_TALE = Mutant(
    "b4",
    "a share of the flow log for each identity",
    ("bpf/common.h", "(reason > PL_R_ALLOWED_MAX && !may_tell_of(t->identity)) || ", ""),
)


@contextmanager
def flooded(mesh: Mesh, budgets: str) -> Iterator[str]:
    """The flooders may reach `web`, and from here `echo-far`, within these budgets; web's address."""
    names = {"flood-here": ("web", "intruder"), "flood-far": ("web", "far-client"), "flood-echo": ("echo-far", "intruder")}
    mesh.apply("".join(policy(name, app, who=who) for name, (app, who) in names.items()))
    mesh.apply(BUDGET.format(ns=NS, td=TRUST_DOMAIN, budgets=budgets))
    try:
        yield mesh.w["web"].addresses[0]
        assert mesh.curl("client", f"http://web.shop.mesh:{HTTP_PORT}/")[0] == 200
    finally:
        mesh.delete("IdentityBudget", "noisy")
        for name in names:
            mesh.delete("AuthorizationPolicy", name)


@pytest.mark.attack("a flood of connections")
def test_connections_are_bounded(mesh: Mesh, counted: Counted) -> None:
    with flooded(mesh, "{connections: 20}") as web, counted(mesh, "n1", "budget_connections", times=40):
        assert noise(mesh, "connections", web, HTTP_PORT, 60) == {"open": 20, "refused": 40}


@pytest.mark.red("a flood of connections", ANY_CONNECTIONS)
def test_connections_are_not_bounded_without(broken: Mesh) -> None:
    with flooded(broken, "{connections: 20}") as web:
        assert noise(broken, "connections", web, HTTP_PORT, 60) == {"open": 60, "refused": 0}


@pytest.mark.attack("a flood of sockets")
def test_sockets_are_bounded(mesh: Mesh, counted: Counted) -> None:
    with flooded(mesh, "{descriptors: 20}") as web, counted(mesh, "n1", "budget_descriptors", times=40):
        said = noise(mesh, "connections", web, HTTP_PORT, 60)
    assert 0 < said["open"] <= 20 and said["refused"] == 60 - said["open"]


@pytest.mark.red("a flood of sockets", ANY_DESCRIPTORS)
def test_sockets_are_not_bounded_without(broken: Mesh) -> None:
    with flooded(broken, "{descriptors: 20}") as web:
        assert noise(broken, "connections", web, HTTP_PORT, 60) == {"open": 60, "refused": 0}


@pytest.mark.attack("a flood of streams")
def test_streams_are_bounded(mesh: Mesh, counted: Counted) -> None:
    """Asked for one by one, and all in one write: only those over the limit are refused."""
    with flooded(mesh, "{streams: 10}"), counted(mesh, "n1", "budget_streams", times=40):
        for kind in ("streams", "burst"):
            assert peer_noise(mesh, kind, 30) == {"made": 10, "ended": False}


@pytest.mark.red("a flood of streams", ANY_STREAMS)
def test_streams_are_not_bounded_without(broken: Mesh) -> None:
    with flooded(broken, "{streams: 10}"):
        assert peer_noise(broken, "streams", 30) == {"made": 30, "ended": False}


@pytest.mark.attack("a flood of requests")
def test_requests_are_bounded(mesh: Mesh, counted: Counted) -> None:
    with flooded(mesh, REQUESTS) as web, counted(mesh, "n1", "budget_requests"):
        assert noise(mesh, "requests", web, HTTP_PORT, 120)["429"]


@pytest.mark.red("a flood of requests", ANY_REQUESTS)
def test_requests_are_not_bounded_without(broken: Mesh) -> None:
    with flooded(broken, REQUESTS) as web:
        assert noise(broken, "requests", web, HTTP_PORT, 120) == {"200": 120}


@pytest.mark.attack("heads that never end")
def test_bytes_are_bounded(mesh: Mesh, counted: Counted) -> None:
    with flooded(mesh, f"{{bytesInFlight: {BYTES}}}") as web, counted(mesh, "n1", "budget_bytes"):
        assert noise(mesh, "heads", web, HTTP_PORT, 200)["open"] == BYTES // HEAD_BYTES


@pytest.mark.red("heads that never end", ANY_BYTES)
def test_bytes_are_not_bounded_without(broken: Mesh) -> None:
    with flooded(broken, f"{{bytesInFlight: {BYTES}}}") as web:
        assert noise(broken, "heads", web, HTTP_PORT, 200)["open"] == 200


@pytest.mark.attack("readers that sleep")
def test_bytes_for_readers_that_sleep_are_bounded(mesh: Mesh, counted: Counted) -> None:
    with flooded(mesh, f"{{bytesInFlight: {BYTES}}}"), counted(mesh, "n1", "budget_bytes"):
        assert sleepers(mesh)["refused"] > 0


@pytest.mark.red("readers that sleep", ANY_BYTES)
def test_bytes_for_readers_that_sleep_are_not_bounded_without(broken: Mesh) -> None:
    with flooded(broken, f"{{bytesInFlight: {BYTES}}}"):
        assert sleepers(broken) == {"open": SLEEPERS, "refused": 0}


def sleepers(mesh: Mesh) -> dict[str, int]:
    """On another node's server: what they write comes back, and waits."""
    return noise(mesh, "sleepers", mesh.w["echo-far"].addresses[0], ECHO_PORT, SLEEPERS, 5.0 * SLOW)


@contextmanager
def under_way(mesh: Mesh) -> Iterator[dict[str, int]]:
    """The intruder begins more connections than the kernel has places for, and lets none of them get anywhere; what it says."""
    argv = [sys.executable, str(PROGRAMS / "under_way.py"), str(PLACES + 500), "30", *mesh.w["web"].addresses[:2]]
    flood = mesh.w["intruder"].start(argv, name="under-way")
    try:
        yield dict(json.loads(until(flood.output, "the flood does not stand")))
    finally:
        flood.stop()


@pytest.mark.attack("connections that get nowhere")
def test_connections_under_way_are_bounded(mesh: Mesh, counted: Counted) -> None:
    with counted(mesh, "n1", "budget_connects", times=100), under_way(mesh) as flood:
        assert flood == {"begun": UNDER_WAY_MAX, "refused": 100}
        assert "web for" in dial(mesh.w["client"], mesh.w["web"].addresses[0], HTTP_PORT).answer


@pytest.mark.red("connections that get nowhere", ANY_UNDER_WAY)
def test_connections_under_way_leave_no_place_for_others_without(broken: Mesh) -> None:
    with under_way(broken) as flood:
        assert flood == {"begun": PLACES + 500, "refused": 0}
        assert dial(broken.w["client"], broken.w["web"].addresses[0], HTTP_PORT) == Dialled("", "TimeoutError")


# From each processor: the kernel tells so much of denials on each of them
DENIALS = """
import os, socket, sys, time
end = time.monotonic() + 10
for processor in os.sched_getaffinity(0):
    if not os.fork():
        os.sched_setaffinity(0, [processor])
        print("started", flush=True)
        while time.monotonic() < end:
            with socket.socket() as sock:
                sock.connect_ex((sys.argv[1], int(sys.argv[2])))
        os._exit(0)
os.wait()
"""


def told_of(mesh: Mesh) -> set[int]:
    """While the intruder is denied as often as it can be, so is the client, at these ports: which of them the flow log shows."""
    dark = mesh.w["dark"].addresses[0]
    flood = mesh.w["intruder"].start([sys.executable, "-c", DENIALS, dark, str(ECHO_PORT)], name="denials")
    try:
        until(lambda: flood.output().count("started") == len(os.sched_getaffinity(0)), "the flood does not begin")
        for port in DENIED_PORTS:
            assert not dial(mesh.w["client"], dark, port).opened
    finally:
        os.killpg(flood.pid, signal.SIGKILL)
        flood.wait()
    told = [flow["destination_address"] for flow in mesh.flows("n1") if flow["source"].endswith("/sa/client")]
    return {port for port in DENIED_PORTS if f"{dark}:{port}" in told}


@pytest.mark.attack("denials that fill the flow log")
def test_a_flood_of_denials_hides_nobody_elses(mesh: Mesh, counted: Counted) -> None:
    with counted(mesh, "n1", "events_sampled", times=1000):
        assert told_of(mesh) == set(DENIED_PORTS)


@pytest.mark.red("denials that fill the flow log", ANY_TALE)
def test_a_flood_of_denials_hides_others_without(broken: Mesh) -> None:
    assert told_of(broken) != set(DENIED_PORTS)


@pytest.mark.attack("a flood of handshakes")
def test_handshakes_are_bounded(mesh: Mesh, counted: Counted) -> None:
    with flooded(mesh, "{handshakesPerSecond: 4}"), counted(mesh, "n1", "budget_handshakes", times=10):
        peer_noise(mesh, "handshakes", 40)


@pytest.mark.red("a flood of handshakes", ANY_HANDSHAKES)
def test_handshakes_are_not_bounded_without(broken: Mesh) -> None:
    with flooded(broken, "{handshakesPerSecond: 4}"):
        before = broken.denied("n1", "budget_handshakes")
        peer_noise(broken, "handshakes", 40)
        assert broken.denied("n1", "budget_handshakes") == before


@pytest.mark.attack("rapid reset")
def test_rapid_reset_ends_the_tunnel(mesh: Mesh, counted: Counted) -> None:
    with flooded(mesh, "{requestsPerSecond: 100000}"), counted(mesh, "n1", "hbone_error"):
        assert peer_noise(mesh, "resets", 5000)["ended"]


@pytest.mark.red("rapid reset", ANY_RESETS)
def test_rapid_reset_goes_on_without(broken: Mesh) -> None:
    with flooded(broken, "{requestsPerSecond: 100000}"):
        assert peer_noise(broken, "resets", 5000, wait_s=0.7) == {"made": 5000, "ended": False}


@pytest.mark.attack("CONTINUATION without end")
def test_a_head_without_end_ends_the_tunnel(mesh: Mesh, counted: Counted) -> None:
    with flooded(mesh, "{requestsPerSecond: 100000}"), counted(mesh, "n1", "hbone_error"):
        assert peer_noise(mesh, "continuations", 2000)["ended"]


@pytest.mark.red("CONTINUATION without end", ANY_HEAD)
def test_a_head_without_end_goes_on_without(broken: Mesh) -> None:
    with flooded(broken, "{requestsPerSecond: 100000}"):
        assert peer_noise(broken, "continuations", 2000, wait_s=0.7)["made"] == 2000
