"""A deny that comes while traffic runs: 1 s after `wait` has answered nothing of it passes, on each kind of connection, and
those who are still allowed notice nothing. Denied by policy here; by certificate and by `node cut` in test_revoked_under_load.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, NS, PROGRAMS, Background, Mesh, policy, service, until

GRACE_S = 1.0
DRIP_PORT = 8090
DRIPS = {"drip": "n1", "drip-far": "n2"}
CONNECTIONS, SECONDS_MAX = 3, 90.0  # loads are stopped when enough was seen
SEEN_S = 4.0  # what is cut off without a word says so after three seconds


@dataclass(frozen=True)
class Kind:
    """One kind of connection: what load.py does, to whom."""

    load: str
    service: str
    port: int

    def start(self, mesh: Mesh, who: str, connections: int = CONNECTIONS, seconds: float = SECONDS_MAX) -> Background:
        return mesh.program(who, "load.py", self.load, f"{self.service}.{NS}.mesh", self.port, connections, seconds)


KINDS = {
    "native": Kind("stream", "echo", ECHO_PORT),
    "native-idle": Kind("idle", "echo", ECHO_PORT),
    "tunnel": Kind("stream", "echo-far", ECHO_PORT),
    "tunnel-idle": Kind("idle", "echo-far", ECHO_PORT),
    "http": Kind("http", "web", HTTP_PORT),
    "http-far": Kind("http", "far", HTTP_PORT),
    "download": Kind("download", "drip", DRIP_PORT),
    "download-far": Kind("download", "drip-far", DRIP_PORT),
}
SERVED = sorted({kind.service for kind in KINDS.values()})


@contextmanager
def drips(mesh: Mesh) -> Iterator[None]:
    """Servers whose responses never end, on both nodes, open to `client`."""
    specs = [
        {"node": node, "name": name, "namespace": NS, "service_account": name, "labels": {"app": name}}
        for name, node in DRIPS.items()
    ]
    for workload in mesh.lab.add_workloads(specs):  # type: ignore[arg-type]  # all keys are those of WorkloadSpec
        mesh.w[workload.name] = workload
        workload.start([sys.executable, str(PROGRAMS / "drip.py"), str(DRIP_PORT)], name="server")
        mesh.listening(workload.name, DRIP_PORT)
    mesh.apply("".join(service(name, name, DRIP_PORT, "http") + policy(name, name) for name in DRIPS))
    try:
        yield
    finally:
        for name in DRIPS:
            mesh.delete("AuthorizationPolicy", name)
            mesh.delete("Service", name)
            mesh.w.pop(name).remove()


def falls(
    mesh: Mesh, loser: str, winner: str, kinds: dict[str, Kind], deny: Callable[[], object], kept: dict[str, Kind] | None = None
) -> float:
    """Run every kind from both (``kept``: others from the winner), let ``deny`` return when it is in force, and hold what
    became of each against the promise. Returns when it was in force, in monotonic seconds."""
    losing = {name: kind.start(mesh, loser) for name, kind in kinds.items()}
    winning = {name: kind.start(mesh, winner) for name, kind in (kept or kinds).items()}
    for name, running in (*losing.items(), *winning.items()):
        assert (line := running.first_line()) == "started\n", f"{name}: {line}"
    began = time.monotonic()
    deny()
    in_force = time.monotonic()
    until(lambda: time.monotonic() > in_force + SEEN_S, "", SEEN_S + 5)
    lost: dict[str, dict[str, Any]] = {name: running.stopped() for name, running in losing.items()}
    won: dict[str, dict[str, Any]] = {name: running.stopped() for name, running in winning.items()}
    for name, report in lost.items():
        assert report["ok"] >= CONNECTIONS, f"{name}: {report}"
        assert report["failures"] >= CONNECTIONS, f"{name} never failed: {report}; all: {lost}"
        assert report["last_ok"] < in_force + GRACE_S, f"{name} passed {report['last_ok'] - in_force:.2f} s after: {report}"
        if not name.endswith("idle"):
            assert report["last_ok"] > began - GRACE_S, f"{name} had failed before: {report}"
    for name, report in won.items():
        assert report["failures"] == 0, f"{name} of {winner}: {report}"
        if not name.endswith("idle"):
            assert report["last_ok"] > in_force + GRACE_S, f"{name} of {winner} has stopped: {report}"
    return in_force


@pytest.fixture(scope="module", autouse=True)
def dripping(mesh: Mesh) -> Iterator[None]:
    with drips(mesh):
        yield


def let_in(mesh: Mesh) -> None:
    mesh.apply("".join(policy(f"also-{name}", name, who="intruder") for name in SERVED))


@pytest.fixture
def allowed(mesh: Mesh) -> Iterator[None]:
    """The one who will lose is allowed everywhere."""
    let_in(mesh)
    yield
    found = mesh.lab.controller_api("GET", "/v1/resources?kind=AuthorizationPolicy")["items"]
    present = {item["metadata"]["name"] for item in found}
    for name in present & {f"{prefix}-{name}" for name in SERVED for prefix in ("also", "no")}:
        mesh.delete("AuthorizationPolicy", name)


@pytest.mark.usefixtures("allowed")
def test_an_allow_that_is_taken_back(mesh: Mesh) -> None:
    def take_back() -> None:
        for name in SERVED:
            revision = mesh.lab.delete("AuthorizationPolicy", NS, f"also-{name}")
        mesh.lab.wait(revision)

    before = {node: mesh.metric(node, "pillion_denied_total", reason="generation_denied") for node in ("n1", "n2")}
    ended = mesh.metric("n1", "pillion_agent_events_total", kind="connections_ended")
    falls(mesh, "intruder", "client", KINDS, take_back)
    assert mesh.metric("n1", "pillion_denied_total", reason="generation_denied") > before["n1"]
    assert mesh.metric("n1", "pillion_agent_events_total", kind="connections_ended") > ended


@pytest.mark.usefixtures("allowed")
def test_a_deny_that_is_added(mesh: Mesh) -> None:
    text = "".join(policy(f"no-{name}", name, action="DENY", who="intruder") for name in SERVED)
    falls(mesh, "intruder", "client", KINDS, lambda: mesh.apply(text))
