"""security.md 2: a head that the kernel leaves to user space, and its body sent apart, a request by itself: the kernel, asked
about the body, must know that it is one, or the server reads it first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.express_world import attack, carried
from tests.attacks.mutants import Counted, Mutant
from tests.e2e import express
from tests.e2e.mesh import Mesh

NO_LATCH = Mutant(
    "b6",
    "bytes on the slow way keep later ones there",
    ("bpf/express_client.h", "  if (TCP_U32(tp, O_WRITE_SEQ) != r->arm_up)\n", "  if (0)\n"),
)


@pytest.fixture(scope="module")
def fast(mesh: Mesh) -> Iterator[Mesh]:
    with carried(mesh):
        yield mesh


@pytest.mark.attack("a body that is a request, behind a punted head")
def test_no_body_becomes_a_request(fast: Mesh, counted: Counted) -> None:
    """Head and body split at every byte, also in three: the server reads what user space would have sent it, in order."""
    before = {name: express.event(fast, name) for name in ("carried", "behind")}
    found = attack(fast, "smuggle")
    assert found["splits"] > 400
    assert not found["wrong"], found
    assert found["smuggled"] == 0
    assert express.event(fast, "carried") - before["carried"] > found["splits"] / 2, "the kernel was not asked"
    assert express.event(fast, "behind") - before["behind"] > found["splits"] / 4, "the latch was not what kept it"
    counted.reasons.add("behind")


@pytest.mark.red("a body that is a request, behind a punted head", NO_LATCH)
def test_a_body_becomes_a_request_without(broken: Mesh) -> None:
    with carried(broken):
        assert attack(broken, "smuggle", step=7)["smuggled"] > 0
