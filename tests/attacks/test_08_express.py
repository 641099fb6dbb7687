"""security.md 8 on a connection that the kernel carries: what its tables do not read as the server does is left to user space."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.express_world import attack
from tests.attacks.guarded import PORT, SECRET, guarded
from tests.attacks.mutants import Counted, Mutant
from tests.attacks.test_08_two_readings import PATHS, PLAIN
from tests.e2e import express
from tests.e2e.mesh import Mesh

SPELLED = Mutant(
    "b8",
    "the table takes plain paths alone",
    ("mesh/express/request.py", "0123456789-_~!$&'()*+,=:@\"\n_LABEL", "0123456789-_~!$&'()*+,=:@%\"\n_LABEL"),
)


@pytest.fixture(scope="module")
def sites(mesh: Mesh) -> Iterator[Mesh]:
    with guarded(mesh):
        yield mesh


def spelled(mesh: Mesh) -> list[tuple[int, str]]:
    """The answers of nginx to every spelling, on connections that were paired before each."""
    targets = [path for path in (*PATHS, *PLAIN) if path.startswith("/") and path.isascii() and path.isprintable()]
    before = express.event(mesh, "carried")
    host = "guarded-web.shop.mesh"
    found = attack(mesh, "spell", host=host, port=PORT, targets=targets, warm="/index.html")
    assert express.event(mesh, "carried") > before + len(targets) / 4, "the kernel carried nothing"
    return [(status, body) for status, body in found]


@pytest.mark.attack("another spelling of the path, on a paired connection")
def test_no_spelling_of_a_path_gets_past_the_kernel(sites: Mesh, counted: Counted) -> None:
    with counted(sites, "n1", "path_not_canonical", times=20), counted(sites, "n1", "policy_denied", times=len(PLAIN)):
        answers = spelled(sites)
    assert not [answer for answer in answers if SECRET in answer[1]]
    assert sum(status in (400, 403) for status, _ in answers) > len(PLAIN) + 20


@pytest.mark.red("another spelling of the path, on a paired connection", SPELLED)
def test_a_spelling_gets_past_without(broken: Mesh) -> None:
    with guarded(broken):
        assert sum(SECRET in body for _, body in spelled(broken)) >= 3
