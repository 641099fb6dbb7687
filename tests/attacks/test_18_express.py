"""security.md 18 on the paths that the kernel shortens: a budget of requests an operator named holds where none of the proxy's
time is spent, and what waits for a reader who sleeps is bounded where no window of TCP's is. (What it may be, to the byte, and on
the proxy's end: tests/bpf/test_express_leg.py.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lab.pace import SLOW
from tests.attacks.express_world import carried, on_leg
from tests.attacks.mutants import Counted, Mutant
from tests.e2e import express
from tests.e2e.mesh import NS, TRUST_DOMAIN, Mesh
from tests.e2e.test_noisy_neighbour import BUDGET

RATE, EACH, CONNECTIONS = 150, 600, 2
ANSWER_BYTES, WAITS_BYTES_MAX = 16 << 20, 4 << 20  # a leg has 256 KiB, and TCP a small window for who never reads: 0.3 MB in all
ANY_RATE = Mutant(
    "b10",
    "a budget of requests in the kernel",
    ("nodeagent/express_programs.py", "            rate_per_s=rate,\n", "            rate_per_s=0,\n"),
)
ANY_LENGTH = Mutant(
    "b10",
    "so much at most goes by a leg unread",
    (
        "bpf/express_leg.h",
        "  if (n > LEG_BYTES_MAX || *(volatile u32 *)&other->waiting + costs > LEG_BYTES_MAX)\n",
        "  if (0)\n",
    ),
)


@pytest.fixture(scope="module")
def fast(mesh: Mesh) -> Iterator[Mesh]:
    with carried(mesh, "intruder", "far-client"):
        yield mesh


@contextmanager
def within(mesh: Mesh, budgets: str) -> Iterator[None]:
    mesh.apply(BUDGET.format(ns=NS, td=TRUST_DOMAIN, budgets=budgets))
    try:
        yield
    finally:
        mesh.delete("IdentityBudget", "noisy")


def flood(mesh: Mesh) -> dict[str, Any]:
    """As fast as it goes, on connections that the kernel carries, within the budget until then."""
    with within(mesh, f"{{requestsPerSecond: {RATE}}}"):
        report = express.load(mesh, "intruder", connections=CONNECTIONS, each=EACH, seconds=60, expected=[429]).report(90)
    assert not report["wrong"] and not report["errors"], report
    return report


@pytest.mark.attack("a flood of requests, on paired connections")
def test_requests_are_bounded_in_the_kernel_too(fast: Mesh, counted: Counted) -> None:
    before = express.event(fast, "rate")
    with counted(fast, "n1", "budget_requests"):
        report = flood(fast)
    assert report["statuses"]["429"] > 0, report
    assert express.event(fast, "rate") > before
    counted.reasons.add("rate")


@pytest.mark.red("a flood of requests, on paired connections", ANY_RATE)
def test_requests_are_not_bounded_without(broken: Mesh) -> None:
    with carried(broken, "intruder"):
        assert flood(broken)["statuses"] == {"200": CONNECTIONS * EACH}


def slept_over(mesh: Mesh) -> int:
    """Bytes that the kernel has for who does not read them."""
    found = on_leg(mesh, "sleep", size=ANSWER_BYTES, seconds=1.0 * SLOW)
    assert found["after"] == "right", found
    return int(found["waited"])


@pytest.mark.attack("sleep over what comes by a leg")
def test_what_comes_by_a_leg_is_bounded(fast: Mesh, counted: Counted) -> None:
    before = express.event(fast, "leg_long", "n2")
    assert slept_over(fast) < WAITS_BYTES_MAX
    assert express.event(fast, "leg_long", "n2") > before
    counted.reasons.add("leg_long")


@pytest.mark.red("sleep over what comes by a leg", ANY_LENGTH)
def test_what_comes_by_a_leg_is_not_bounded_without(broken: Mesh) -> None:
    with carried(broken, "far-client"):
        assert slept_over(broken) > ANSWER_BYTES - WAITS_BYTES_MAX
