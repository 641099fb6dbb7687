"""security.md 16: take the proxy's port in one's own namespace, join its listener, or be there before it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import Workload
from tests.attacks.actions import FAMILIES, PASSED, PROGRAMS, Dialled, address, dial
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import HTTP_PORT, Mesh, until

JOINABLE = Mutant(
    "b2",  # not beside the next: a joined listener would be found by it
    "bind() keeps our ports, and nobody can join",
    (
        "bpf/bind.c",
        "    if (port != PL_PORT_OUTBOUND && port != PL_PORT_HBONE && port != PL_PORT_DNS)\n      return 1;\n",
        "    return 1;\n",
    ),
    (
        "nodeagent/netns.py",
        "        sock.bind((address, port))\n",
        "        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n        sock.bind((address, port))\n",
    ),
)
ANYBODYS_LISTENER = Mutant(
    "b1",
    "connect() leads to our own listener only",
    ("bpf/choice.h", "  if (!listeners.lookup(&netns))\n    return PL_R_NO_LISTENER;\n", ""),
)  # fmt: skip
OURS = [(at, port) for at in ("127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1") for port in (15001, 15008, 15053)]


def take(mesh: Mesh, at: str, port: int) -> str:
    return mesh.w["intruder"].run([sys.executable, str(PROGRAMS / "squat.py"), at, str(port)], timeout=15).stdout.strip()


@pytest.mark.attack("join the proxy's listener")
@pytest.mark.parametrize(("at", "port"), OURS)
def test_our_ports_cannot_be_bound(mesh: Mesh, counted: Counted, at: str, port: int) -> None:
    with counted(mesh, "n1", "bind_denied"):
        assert take(mesh, at, port) == "PermissionError"
    assert take(mesh, at, port + 100) == PASSED


@pytest.mark.red("join the proxy's listener", JOINABLE)
@pytest.mark.parametrize("at", ["127.0.0.1", "::1"])
def test_the_listener_is_joined_without(broken: Mesh, at: str) -> None:
    assert take(broken, at, 15001) == PASSED


@contextmanager
def there_before(mesh: Mesh, name: str, *ats: str) -> Iterator[Workload]:
    """A workload of the identity `client` that is enrolled while a stranger listens on 15001 in its namespace. The stranger goes
    with the block."""
    (agent,) = mesh.lab.pids("n1", "agent")
    os.kill(agent, signal.SIGSTOP)
    try:
        late = mesh.lab.add_workload("n1", name, "shop", "client", {"app": name}, wait=False)
        squatters = [
            mesh.lab.nodes["n1"].start(
                ["nsenter", f"--net={late.netns}", sys.executable, str(PROGRAMS / "squat.py"), at, "15001", "stay"],
                name=f"{name}-{number}",
            )
            for number, at in enumerate(ats)
        ]
        until(lambda: all(PASSED in squatter.output() for squatter in squatters), "the squatters do not listen")
    finally:
        os.kill(agent, signal.SIGCONT)
    try:
        yield late
    finally:
        for squatter in squatters:
            squatter.kill()


@pytest.mark.attack("be there before the agent")
def test_nothing_connects_until_the_port_is_ours(mesh: Mesh, counted: Counted) -> None:
    web = mesh.w["web"]
    with there_before(mesh, "late", "127.0.0.1", "::1") as late:
        before = mesh.denied("n1", "no_listener")
        until(
            lambda: not dial(late, web.addresses[0], HTTP_PORT).opened and mesh.denied("n1", "no_listener") > before,
            "enrolled",
            20,
        )
        with counted(mesh, "n1", "no_listener", times=3):
            found = [dial(late, address(web, family), HTTP_PORT) for family in FAMILIES]
        assert found == [Dialled("", "PermissionError")] * 3
        assert "web for" in dial(mesh.w["client"], web.addresses[0], HTTP_PORT).answer
    until(
        lambda: "web for" in dial(late, web.addresses[0], HTTP_PORT).answer,
        "the agent does not take the port that became free",
        20,
    )
    late.remove()


@pytest.mark.red("be there before the agent", ANYBODYS_LISTENER)
def test_a_stranger_answers_without(broken: Mesh) -> None:
    with there_before(broken, "late", "127.0.0.1", "::1") as late:
        until(lambda: dial(late, broken.w["web"].addresses[0], HTTP_PORT).answer == "SQUATTED", "the stranger is not reached", 20)
