"""security.md 3: a server that answers before it is asked, or while another one is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.pace import SLOW
from tests.attacks.express_world import attack, two
from tests.attacks.mutants import Counted, Mutant
from tests.e2e import express
from tests.e2e.mesh import Mesh

ANYBODY_ANSWERS = Mutant(
    "b7",
    "only the server that was asked answers",
    ("bpf/express_server.h", "  if (*(volatile u32 *)&r->busy != slot + 1) {\n", "  if (!*(volatile u32 *)&r->busy) {\n"),
)


@pytest.fixture(scope="module")
def forged(mesh: Mesh) -> Iterator[Mesh]:
    with two(mesh):
        yield mesh


@pytest.mark.attack("a server that speaks out of turn")
def test_the_client_hears_the_server_that_was_asked_alone(forged: Mesh, counted: Counted) -> None:
    """And the other's connection is closed and counted."""
    before = {name: express.event(forged, name) for name in ("carried", "unasked")}
    closed = forged.metric("n1", "pillion_proxy_events_total", event="unsolicited_response")
    found = attack(forged, "listen", seconds=4.0 * SLOW)
    assert found["asked"] > 100 and not found["wrong"] and not found["forged"], found
    assert express.event(forged, "carried") > before["carried"] + 50
    assert express.event(forged, "unasked") > before["unasked"]
    assert forged.metric("n1", "pillion_proxy_events_total", event="unsolicited_response") > closed
    counted.reasons |= {"unasked", "unsolicited_response"}


@pytest.mark.red("a server that speaks out of turn", ANYBODY_ANSWERS)
def test_the_client_hears_another_without(broken: Mesh) -> None:
    with two(broken):
        assert attack(broken, "listen", seconds=4.0 * SLOW)["forged"] > 0
