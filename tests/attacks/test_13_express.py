"""security.md 13 on connections that the kernel carries: a deny that user space knows of and the kernel's tables do not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from lab.pace import SLOW
from tests.attacks.express_world import carried
from tests.attacks.mutants import Mutant
from tests.e2e import express
from tests.e2e.express import NAME
from tests.e2e.mesh import Mesh, policy, until
from tests.e2e.test_lease import CONFIG, LEASE_S, frozen

OLD_TABLES = Mutant(
    "b9",
    "the kernel decides by the state in force",
    (
        "bpf/express_client.h",
        "  if (!p->generation || *(volatile u32 *)&p->generation != generation_of(c))\n",
        "  if (!p->generation)\n",
    ),
    (
        "bpf/express_client.h",
        "  if (*(volatile u32 *)&p->generation != generation_of(c))\n    return to_user(r, PL_XR_GENERATION);\n  if (p->rate",
        "  if (p->rate",
    ),
    (
        "bpf/express_server.h",
        "  if (*(volatile u32 *)&p->generation != generation_of(c))\n    return hand_over(r, tp, PL_XR_GENERATION);\n",
        "",
    ),
    (
        "nodeagent/express_programs.py",
        "        for program in self.all.values():\n            self._compile(program, view)\n",
        "        pass\n",
    ),
)
NO_LEASE = Mutant(
    "b8",
    "the kernel knows the lease",
    ("bpf/express_client.h", "  if (c->lease_until_ns && now > c->lease_until_ns)\n    return PL_XR_LEASE;\n", ""),
)
CONNECTIONS, SEEN_S, SEEN = 8, 1.0 * SLOW, 50


@pytest.fixture(scope="module")
def fast(mesh: Mesh) -> Iterator[Mesh]:
    with carried(mesh):
        yield mesh


def denied_under_load(mesh: Mesh) -> tuple[float, dict[str, Any]]:
    """When the deny was in force, and what the load saw."""
    running = express.load(mesh, connections=CONNECTIONS, rate=400, seconds=150, expected=[403])
    express.started(running)
    express.carried_on(mesh)
    mesh.apply(policy("flip", NAME, action="DENY", operation='{paths: ["/size/64/*"]}'))
    in_force, before = time.monotonic(), judged(mesh)
    until(lambda: time.monotonic() > in_force + SEEN_S and judged(mesh) > before + SEEN, "nobody asks any more")
    return in_force, express.stopped(running)


def judged(mesh: Mesh) -> float:
    """Requests that were carried by the kernel, or denied."""
    return express.event(mesh, "carried") + mesh.metric("n1", "pillion_requests_total", code="403")


@pytest.mark.attack("keep a paired connection through a deny")
def test_a_deny_stops_the_next_request(fast: Mesh) -> None:
    try:
        in_force, report = denied_under_load(fast)
        assert report["last_asked"] < in_force
        assert report["statuses"]["403"] > CONNECTIONS and not report["wrong"] and not report["errors"], report
    finally:
        fast.delete("AuthorizationPolicy", "flip")


@pytest.mark.red("keep a paired connection through a deny", OLD_TABLES)
def test_a_deny_stops_nothing_without(broken: Mesh) -> None:
    with carried(broken):
        try:
            in_force, report = denied_under_load(broken)
            assert report["last_asked"] > in_force + SEEN_S / 4
        finally:
            broken.delete("AuthorizationPolicy", "flip")


def past_the_lease(mesh: Mesh) -> float:
    """Requests on paired connections that were left to user space since the lease was over, for a second."""
    mesh.apply(CONFIG.format(LEASE_S))
    try:
        running = express.load(mesh, connections=CONNECTIONS, rate=100, seconds=150)
        express.started(running)
        express.carried_on(mesh)
        before = express.event(mesh, "lease")
        with frozen(mesh, "n1"):
            since = time.monotonic()
            until(lambda: time.monotonic() > since + SEEN_S, "")
        report = express.stopped(running)
        assert report["ok"] and not report["wrong"], report
        return express.event(mesh, "lease") - before
    finally:
        mesh.lab.wait(mesh.lab.delete("MeshConfig", "", "mesh"))


@pytest.mark.attack("paired connections past the lease")
def test_past_the_lease_the_kernel_carries_nothing(fast: Mesh) -> None:
    """User space, which knows the lease too, answers."""
    assert past_the_lease(fast) > 10 * CONNECTIONS


@pytest.mark.red("paired connections past the lease", NO_LEASE)
def test_the_kernel_goes_on_past_the_lease_without(broken: Mesh) -> None:
    with carried(broken):
        assert past_the_lease(broken) == 0
