"""security.md 1: a certificate that was taken back is used on. Its node is the attacker's: it hears of nothing (its agent is
frozen), so its proxy shows the old certificate as long as anyone takes it.

A second after the revocation reached a node, that node has no connection with it, whichever end it is, and makes none."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from lab.pace import SLOW
from tests.attacks.express_world import carried
from tests.attacks.mutants import Counted, Mutant
from tests.e2e import express
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, Mesh, policy, until
from tests.e2e.test_deny_under_load import GRACE_S, Kind

CALLER = Mutant(
    "b1",
    "the server's node hears of revoked certificates",
    ("l7proxy/inbound.py", "        self.serials = revoked_serials(new.revoked)\n", "        self.serials = frozenset()\n"),
)
SERVER = Mutant(
    "b1",
    "the caller's node hears of revoked certificates",
    ("l7proxy/tunnel_pool.py", "        self.serials = revoked_serials(new.revoked)\n", "        self.serials = frozenset()\n"),
)
PAIRED = Mutant(
    "b1",
    "a pair ends with the certificate of either side",
    ("nodeagent/express_pairs.py", "            if not pair.spiffes.isdisjoint(spiffes):\n", "            if False:\n"),
)
SEEN_S = 1.5 * SLOW  # after the other node knew
KINDS = {  # who calls whom; the account that loses its certificate lives on n2
    "far-client": ("far-client", (Kind("idle", "echo", ECHO_PORT), Kind("http", "web", HTTP_PORT))),
    "echo-far": ("client", (Kind("idle", "echo-far", ECHO_PORT),)),
    "far": ("client", (Kind("http", "far", HTTP_PORT),)),
}


@dataclass
class Seen:
    """By the holder of the certificate: what the loads said, and when the other node knew."""

    reports: dict[str, list[dict[str, Any]]]
    known: float
    counted: float


@contextmanager
def frozen(mesh: Mesh, node: str) -> Iterator[None]:
    pids = mesh.lab.pids(node, "agent")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def serial(mesh: Mesh, node: str, name: str) -> str:
    status = mesh.lab.agent_api(node, "GET", "/v1/status")
    return next(str((w["svid"] or {}).get("serial", "")) for w in status["workloads"] if w["name"] == name)


def revoke(mesh: Mesh, taken: str) -> int:
    return int(mesh.lab.controller_api("POST", f"/v1/certificates/{taken}/revoke")["revision"])


def heard(mesh: Mesh, node: str, revision: int) -> float:
    """When the node had it."""
    until(lambda: mesh.lab.agent_api(node, "GET", "/v1/status")["revision"] >= revision, f"{node} does not hear of it")
    return time.monotonic()


def used_on(mesh: Mesh) -> Seen:
    """Three certificates of n2, taken back under load and shown on."""
    names = {f"revoked-{app}": app for app in ("echo", "web")}
    mesh.apply("".join(policy(name, app, who="far-client") for name, app in names.items()))
    try:
        taken = [serial(mesh, "n2", holder) for holder in KINDS]
        before = mesh.denied("n1", "cert_revoked")
        with frozen(mesh, "n2"):
            running = {holder: [kind.start(mesh, who) for kind in kinds] for holder, (who, kinds) in KINDS.items()}
            for each in [one for several in running.values() for one in several]:
                assert each.first_line() == "started\n"
            known = heard(mesh, "n1", max([revoke(mesh, each) for each in taken]))
            until(lambda: time.monotonic() > known + SEEN_S, "")
            reports = {holder: [each.stopped() for each in several] for holder, several in running.items()}
        seen = Seen(reports, known, mesh.denied("n1", "cert_revoked") - before)
        until(lambda: not {serial(mesh, "n2", holder) for holder in KINDS} & {"", *taken}, "no new certificates")
        return seen
    finally:
        for name in names:
            mesh.delete("AuthorizationPolicy", name)


@pytest.fixture(scope="module")
def seen(mesh: Mesh) -> Seen:
    return used_on(mesh)


@pytest.fixture(scope="module")
def _known() -> dict[int, Seen]:
    return {}


@pytest.fixture
def seen_broken(broken: Mesh, _known: dict[int, Seen]) -> Seen:
    if id(broken) not in _known:
        _known[id(broken)] = used_on(broken)
    return _known[id(broken)]


def ends(seen: Seen, holder: str) -> bool:
    return all(report["failures"] > 0 and report["last_ok"] < seen.known + GRACE_S * SLOW for report in seen.reports[holder])


@pytest.mark.attack("the certificate of a caller, revoked")
def test_no_node_serves_who_shows_it(seen: Seen, counted: Counted) -> None:
    assert ends(seen, "far-client"), seen
    assert seen.counted >= 3  # each that was open, and each that came anew
    counted.reasons.add("cert_revoked")


@pytest.mark.attack("the certificate of a server, revoked")
@pytest.mark.parametrize("holder", ["echo-far", "far"])
def test_nobody_calls_who_shows_it(seen: Seen, counted: Counted, holder: str) -> None:
    assert ends(seen, holder), seen
    assert seen.counted >= 3
    counted.reasons.add("cert_revoked")


@pytest.mark.red("the certificate of a caller, revoked", CALLER)
def test_who_shows_it_is_served_without(seen_broken: Seen) -> None:
    assert not ends(seen_broken, "far-client"), seen_broken
    assert all(report["failures"] == 0 for report in seen_broken.reports["far-client"])


@pytest.mark.red("the certificate of a server, revoked", SERVER)
def test_who_shows_it_is_called_without(seen_broken: Seen) -> None:
    assert all(report["failures"] == 0 for holder in ("echo-far", "far") for report in seen_broken.reports[holder])


# ---- what the kernel carries


def pairs_ended(mesh: Mesh) -> float:
    """How many pairs ended for it, of a client that goes on asking, when its certificate is taken back."""
    with carried(mesh):
        running = express.load(mesh, connections=4, rate=200, seconds=60)
        express.started(running)
        express.carried_on(mesh)
        before = express.pairings(mesh, "certificate_revoked")
        old = serial(mesh, "n1", "client")
        mesh.lab.wait(revoke(mesh, old))
        until(lambda: serial(mesh, "n1", "client") not in ("", old), "no new certificate")
        express.carried_on(mesh)  # by who they are now
        ended = express.pairings(mesh, "certificate_revoked") - before
        express.clean(express.stopped(running))
    return ended


@pytest.mark.attack("a pair of a revoked certificate")
def test_what_the_kernel_carries_is_looked_at_anew(mesh: Mesh, counted: Counted) -> None:
    assert pairs_ended(mesh) >= 4
    counted.reasons.add("certificate_revoked")


@pytest.mark.red("a pair of a revoked certificate", PAIRED)
def test_the_kernel_carries_on_without(broken: Mesh) -> None:
    assert pairs_ended(broken) == 0
