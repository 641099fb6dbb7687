"""security.md 17: what an application does to its socket while the kernel carries its bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.express_world import attack, carried, on_leg
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import Mesh

REPAIRED = Mutant(
    "b10",
    "no repair of connections",
    (
        "bpf/origin.c",
        "    if (ctx->level == IPPROTO_TCP && ctx->optname == OPT_TCP_REPAIR && !is_mesh(configuration()))\n",
        "    if (0)\n",
    ),
)
ULP = Mutant(
    "b10",
    "no TLS of its own on a socket that the kernel carries",
    (
        "bpf/origin.c",
        "    if (ctx->level == IPPROTO_TCP && ctx->optname == OPT_TCP_ULP && sk && xends.sk_storage_get(sk, 0, 0))\n",
        "    if (0)\n",
    ),
)
ENDED = ("disconnect", "listen")  # by the application itself
HARMLESS = ("SO_RCVLOWAT", "SO_RCVBUF", "TCP_MAXSEG", "SO_ZEROCOPY", "TCP_INQ")


@pytest.fixture(scope="module")
def fast(mesh: Mesh) -> Iterator[Mesh]:
    with carried(mesh, "far-client"):
        yield mesh


def denied(mesh: Mesh, counted: Counted, what: str) -> None:
    with counted(mesh, "n1", "socket_option"):
        assert attack(mesh, "options", what=what) == {"answer": "PermissionError", "after": "right"}


@pytest.mark.attack("options of a paired socket")
def test_nobody_repairs_a_connection(fast: Mesh, counted: Counted) -> None:
    denied(fast, counted, "TCP_REPAIR")


@pytest.mark.attack("TLS on a paired socket")
def test_tls_and_redirection_exclude_each_other(fast: Mesh, counted: Counted) -> None:
    denied(fast, counted, "TCP_ULP")


@pytest.mark.attack("TLS on the socket of a leg")
def test_tls_and_legs_exclude_each_other(fast: Mesh, counted: Counted) -> None:
    with counted(fast, "n2", "socket_option"):
        assert on_leg(fast, "options", what="TCP_ULP") == {"answer": "PermissionError", "after": "right"}


@pytest.mark.attack("options of a paired socket")
@pytest.mark.parametrize("what", HARMLESS)
def test_nothing_is_lost_by_the_others(fast: Mesh, what: str) -> None:
    assert attack(fast, "options", what=what)["after"] == "right"


@pytest.mark.attack("options of a paired socket")
@pytest.mark.parametrize("what", ENDED)
def test_who_takes_his_socket_away_has_none(fast: Mesh, what: str) -> None:
    """It is his loss alone: nothing is stuck."""
    assert attack(fast, "options", what=what)["after"] != "stuck"
    assert attack(fast, "options", what="SO_RCVBUF")["after"] == "right"


@pytest.mark.red("options of a paired socket", REPAIRED)
def test_connections_are_repaired_without(broken: Mesh) -> None:
    with carried(broken):
        assert attack(broken, "options", what="TCP_REPAIR")["answer"] == "PASSED"


@pytest.mark.red("TLS on a paired socket", ULP)
def test_tls_takes_a_paired_socket_without(broken: Mesh) -> None:
    """The kernel is asked; one that was built without TLS has none to give."""
    before = broken.denied("n1", "socket_option")
    with carried(broken):
        assert attack(broken, "options", what="TCP_ULP")["answer"] in ("PASSED", "FileNotFoundError")
    assert broken.denied("n1", "socket_option") == before


@pytest.mark.red("TLS on the socket of a leg", ULP)
def test_tls_takes_a_legs_socket_without(broken: Mesh) -> None:
    before = broken.denied("n2", "socket_option")
    with carried(broken, "far-client"):
        assert on_leg(broken, "options", what="TCP_ULP")["answer"] in ("PASSED", "FileNotFoundError")
    assert broken.denied("n2", "socket_option") == before
