"""security.md 13 on connections that the kernel carries, or hands over to user space without TCP (legs): a deny that the kernel's
tables do not know of, or that came after what is remembered. (A proxy that does not hold to it: test_10_legs.py.)"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from lab.pace import SLOW
from tests.attacks.express_world import carried
from tests.attacks.mutants import Counted, Mutant
from tests.e2e import express
from tests.e2e.express import NAME
from tests.e2e.mesh import Mesh, Refused, policy, until
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
NO_LEASE_OF_NODE = Mutant(
    "b8",
    "the kernel's hooks compare the time themselves",
    (
        "bpf/common.h",
        "  if (c->lease_until_ns && boot_ns() > c->lease_until_ns)\n    return PL_R_LEASE_EXPIRED;\n  return 0;\n",
        "  return 0;\n",
    ),
)
NO_LEASE_OF_PROXY = Mutant(
    "b8",
    "the proxy's workers compare the time themselves",
    ("l7proxy/lease.py", "        return lease_s > 0 and ", "        return lease_s < 0 and "),
)
OLD_MEMORY = Mutant(
    "b11",
    "a remembered decision is of the state in force",
    (
        "l7proxy/session.py",
        "        if scope.config is not worker.config:\n            again = ",
        "        if 0:\n            again = ",
    ),
    ("l7proxy/quick.py", " or scope.config is not worker.config:\n", ":\n"),
)
FAR = "far-client"  # the server is on the other node
CONNECTIONS, SEEN_S, SEEN = 8, 1.0 * SLOW, 50


@pytest.fixture(scope="module")
def fast(mesh: Mesh) -> Iterator[Mesh]:
    with carried(mesh, FAR):
        yield mesh


def denied_under_load(mesh: Mesh, who: str = "client") -> tuple[float, dict[str, Any]]:
    """When the deny was in force, and what the load saw."""
    made = express.pairings(mesh, "leg_made", "n2")
    running = express.load(mesh, who, connections=CONNECTIONS, rate=400, seconds=150, expected=[403])
    express.started(running)
    if who == FAR:
        until(lambda: express.pairings(mesh, "leg_made", "n2") >= made + CONNECTIONS, "not all have a leg", 30)
    else:
        express.carried_on(mesh)
    mesh.apply(policy("flip", NAME, action="DENY", who=who, operation='{paths: ["/size/64/*"]}'))
    in_force, before = time.monotonic(), judged(mesh)
    until(lambda: time.monotonic() > in_force + SEEN_S and judged(mesh) > before + SEEN, "nobody asks any more")
    return in_force, express.stopped(running)


def judged(mesh: Mesh) -> float:
    """Requests that were carried by the kernel, and what went by legs, or denied."""
    denied = sum(mesh.metric(node, "pillion_requests_total", code="403") for node in ("n1", "n2"))
    return express.event(mesh, "carried") + express.event(mesh, "leg", "n2") + denied


@pytest.mark.attack("keep a paired connection through a deny")
def test_a_deny_stops_the_next_request(fast: Mesh, counted: Counted) -> None:
    try:
        with counted(fast, "n1", "policy_denied", times=CONNECTIONS):
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


@pytest.mark.attack("keep a connection with a leg through a deny")
def test_a_deny_stops_the_next_request_by_a_leg(fast: Mesh, counted: Counted) -> None:
    try:
        with counted(fast, "n2", "policy_denied", times=CONNECTIONS):
            in_force, report = denied_under_load(fast, FAR)
        assert report["last_asked"] < in_force
        assert report["statuses"]["403"] > CONNECTIONS and not report["wrong"] and not report["errors"], report
    finally:
        fast.delete("AuthorizationPolicy", "flip")


@pytest.mark.red("keep a connection with a leg through a deny", OLD_MEMORY)
def test_a_deny_stops_nothing_by_a_leg_without(broken: Mesh) -> None:
    with carried(broken, FAR):
        try:
            in_force, report = denied_under_load(broken, FAR)
            assert report["last_asked"] > in_force + SEEN_S / 4
        finally:
            broken.delete("AuthorizationPolicy", "flip")


@dataclass
class Past:
    """A second after the lease of n1 was over, its agent frozen."""

    left: float  # requests on paired connections that the kernel left to user space, for that reason
    let_in: set[str]  # who came anew and was served


def served(mesh: Mesh, who: str, server: str) -> bool:
    try:
        return bool(mesh.echo(who, mesh.w[server].addresses[0]))
    except Refused:
        return False


def past_the_lease(mesh: Mesh) -> Past:
    mesh.apply(CONFIG.format(LEASE_S) + "---\n" + policy("lease-far", "echo", who="far-client"))
    try:
        running = express.load(mesh, connections=CONNECTIONS, rate=100, seconds=150)
        express.started(running)
        express.carried_on(mesh)
        before = express.event(mesh, "lease")
        ways = {"native": ("client", "echo"), "captured": ("client", "echo-far"), "stream": ("far-client", "echo")}
        assert all(served(mesh, *way) for way in ways.values())
        with frozen(mesh, "n1"), ThreadPoolExecutor(len(ways)) as pool:
            since = time.monotonic()
            found = dict(zip(ways, pool.map(lambda way: served(mesh, *way), ways.values()), strict=True))
            until(lambda: time.monotonic() > since + SEEN_S, "")
        report = express.stopped(running)
        assert report["ok"] and not report["wrong"], report
        return Past(express.event(mesh, "lease") - before, {name for name, passed in found.items() if passed})
    finally:
        mesh.delete("AuthorizationPolicy", "lease-far")
        mesh.lab.wait(mesh.lab.delete("MeshConfig", "", "mesh"))


@pytest.fixture(scope="module")
def _past() -> dict[int, Past]:
    return {}


@pytest.fixture
def past(fast: Mesh, _past: dict[int, Past]) -> Past:
    if id(fast) not in _past:
        before = fast.denied("n1", "lease_expired")
        _past[id(fast)] = past_the_lease(fast)
        assert fast.denied("n1", "lease_expired") >= before + 3
    return _past[id(fast)]


@pytest.fixture
def past_broken(broken: Mesh, _past: dict[int, Past]) -> Past:
    if id(broken) not in _past:
        with carried(broken):
            _past[id(broken)] = past_the_lease(broken)
    return _past[id(broken)]


@pytest.mark.attack("paired connections past the lease")
def test_past_the_lease_the_kernel_carries_nothing(past: Past, counted: Counted) -> None:
    """User space, which knows the lease too, answers."""
    assert past.left > 10 * CONNECTIONS
    counted.reasons.add("lease")


@pytest.mark.red("paired connections past the lease", NO_LEASE)
def test_the_kernel_goes_on_past_the_lease_without(past_broken: Past) -> None:
    assert past_broken.left == 0


@pytest.mark.attack("the old policy of a frozen agent")
def test_a_frozen_agents_policy_lets_nobody_in(past: Past, counted: Counted) -> None:
    """Native, through the proxy, and from another node. (Whatever else the lease is about: tests/e2e/test_lease.py)"""
    assert past.let_in == set()
    counted.reasons.add("lease_expired")


@pytest.mark.red("the old policy of a frozen agent", NO_LEASE_OF_NODE)
@pytest.mark.red("the old policy of a frozen agent", NO_LEASE_OF_PROXY)
def test_a_frozen_agents_policy_is_in_force_without(past_broken: Past) -> None:
    assert past_broken.let_in == {"native", "captured", "stream"}
