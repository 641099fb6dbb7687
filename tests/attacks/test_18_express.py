"""security.md 18 on the path that spends none of the proxy's time; a budget of requests an operator named holds there too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.attacks.express_world import carried
from tests.attacks.mutants import Counted, Mutant
from tests.e2e import express
from tests.e2e.mesh import NS, TRUST_DOMAIN, Mesh
from tests.e2e.test_noisy_neighbour import BUDGET

RATE, EACH, CONNECTIONS = 150, 600, 2
ANY_RATE = Mutant(
    "b10",
    "a budget of requests in the kernel",
    ("nodeagent/express_programs.py", "            rate_per_s=rate,\n", "            rate_per_s=0,\n"),
)


@pytest.fixture(scope="module")
def fast(mesh: Mesh) -> Iterator[Mesh]:
    with carried(mesh, "intruder"):
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
