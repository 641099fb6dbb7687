"""security.md 18: one identity takes what the others need. How long a neighbour waits: `make bench ONLY=noisy-neighbour`; that
memory stays bounded, and that every refusal is counted: tests/e2e/test_noisy_neighbour.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import HTTP_PORT, NS, TRUST_DOMAIN, Mesh, policy
from tests.e2e.test_noisy_neighbour import BUDGET, BYTES, HEAD_BYTES, noise, peer_noise

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
    ("l7proxy/inbound.py", "            if not self.core.peer_is_bulk and self.inbound.streams_of(self.peer.spiffe) > most:\n",
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


@contextmanager
def flooded(mesh: Mesh, budgets: str) -> Iterator[str]:
    """The flooders may reach `web`, within these budgets; its address."""
    names = {"flood-here": "intruder", "flood-far": "far-client"}
    mesh.apply("".join(policy(name, "web", who=who) for name, who in names.items()))
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
    with flooded(mesh, "{streams: 10}"), counted(mesh, "n1", "budget_streams", times=20):
        assert peer_noise(mesh, "streams", 30) == {"made": 10, "ended": False}


@pytest.mark.red("a flood of streams", ANY_STREAMS)
def test_streams_are_not_bounded_without(broken: Mesh) -> None:
    with flooded(broken, "{streams: 10}"):
        assert peer_noise(broken, "streams", 30) == {"made": 30, "ended": False}


@pytest.mark.attack("a flood of requests")
def test_requests_are_bounded(mesh: Mesh, counted: Counted) -> None:
    with flooded(mesh, "{requestsPerSecond: 50}") as web, counted(mesh, "n1", "budget_requests"):
        assert noise(mesh, "requests", web, HTTP_PORT, 120)["429"]


@pytest.mark.red("a flood of requests", ANY_REQUESTS)
def test_requests_are_not_bounded_without(broken: Mesh) -> None:
    with flooded(broken, "{requestsPerSecond: 50}") as web:
        assert noise(broken, "requests", web, HTTP_PORT, 120) == {"200": 120}


@pytest.mark.attack("heads that never end")
def test_bytes_are_bounded(mesh: Mesh, counted: Counted) -> None:
    with flooded(mesh, f"{{bytesInFlight: {BYTES}}}") as web, counted(mesh, "n1", "budget_bytes"):
        assert noise(mesh, "heads", web, HTTP_PORT, 200)["open"] == BYTES // HEAD_BYTES


@pytest.mark.red("heads that never end", ANY_BYTES)
def test_bytes_are_not_bounded_without(broken: Mesh) -> None:
    with flooded(broken, f"{{bytesInFlight: {BYTES}}}") as web:
        assert noise(broken, "heads", web, HTTP_PORT, 200)["open"] == 200


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
