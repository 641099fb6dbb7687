"""security.md 10 on legs: what a hostile process in the place of a proxy's worker gets handed over without TCP, and for how long.
(Two sockets that are not one connection, and words about a socket: tests/bpf/test_express_leg.py.)"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import pytest

from lab.process import start
from tests.attacks.mutants import Counted, Mutant
from tests.attacks.test_10_confinement import caller
from tests.attacks.test_10_hostile_proxy import agent_counted, forgotten, prepared, said_by, waiting
from tests.e2e.express import event, pairings
from tests.e2e.mesh import HTTP_PORT, Mesh, policy, until

ANY_LEG = Mutant(
    "b10",
    "the kernel compares a leg with what the hooks recorded",
    (
        "bpf/express_leg_control.c",
        "    if (conn->kind != PL_ARRIVAL_CAPTURED || !(conn->flags & PL_CONN_SERVER) || !origin)\n"
        "      return PL_XQ_NOT_THE_PROXYS;\n    o->identity = origin->identity;\n",
        "    if (origin)\n      o->identity = origin->identity;\n",
    ),
    (
        "bpf/express_leg_control.c",
        "    if (conn->kind != PL_ARRIVAL_PROXY || (conn->flags & PL_CONN_SERVER) || !caller)\n"
        "      return PL_XQ_NOT_THE_PROXYS;\n    o->identity = caller->identity;\n    o->caller = caller->addr;\n",
        "    if (caller)\n      o->identity = caller->identity;\n",
    ),
    ("bpf/express_leg_control.c", "  return may_enrol(app, o, tp);\n", "  return PL_XQ_OK;\n"),
)
FOR_EVER = Mutant(
    "b10",
    "the agent ends what is denied and sends no packets",
    ("nodeagent/datapath_live.py", "ended += len(destroy_where(", "ended += 0 * len((lambda *_: ())("),
)  # fmt: skip
KEEPS_S = 6.0
LIES = {  # what it says of a socket -> what comes of it
    "no socket": "malformed",
    "a socket that leads nowhere": "failed",
    "a workload that is not here": "no_workload",
    "another workload's": "no_app_socket",
    "a client's, as if it were a server's": "not_the_proxys",
    "a server's, as if it were a client's": "not_the_proxys",
    "another caller's": "identity",
}
OWN = {"its own, of a client": "made", "its own, of a server": "made"}
KERNELS = ("a client's, as if it were a server's", "a server's, as if it were a client's", "another caller's")


def asked(mesh: Mesh) -> dict[str, Any]:
    """The agent's answers."""
    web, who = mesh.w["web"].addresses[0], (caller(mesh, "client"), caller(mesh, "intruder"))
    with waiting(mesh):
        return said_by(mesh, "legs", web, HTTP_PORT, *who, "intruder")


@pytest.mark.attack("ask for legs of others' connections")
def test_a_leg_is_of_a_connection_of_its_own(mesh: Mesh, counted: Counted) -> None:
    before = {reason: pairings(mesh, f"leg_{reason}", "n1") for reason in set(LIES.values()) - {"malformed"}}
    assert asked(mesh) == LIES | OWN
    for reason, times in before.items():
        assert pairings(mesh, f"leg_{reason}", "n1") > times
        counted.reasons.add(f"leg_{reason}")


@pytest.mark.red("ask for legs of others' connections", ANY_LEG)
def test_a_leg_is_of_any_connection_without(broken: Mesh) -> None:
    found = asked(broken)
    assert {found[what] for what in KERNELS} == {"made"}, found


@dataclass
class Kept:
    """What became of a worker that asks a server again and again, while its caller is denied."""

    leg: str  # what it was answered
    by_leg: float  # messages, of both ends
    error: str  # what ended it
    after_s: float  # the last answer, from when the deny was in force


def keeps(mesh: Mesh, *, by_leg: bool = True, acks: bool = True) -> Kept:
    words = "leg" if by_leg else "tcp", "acks" if acks else "mute"
    web, before = mesh.w["web"].addresses[0], event(mesh, "leg")
    place, argv, env = prepared(mesh, "keep", web, HTTP_PORT, caller(mesh, "client"), *words, KEEPS_S)
    process = start(place, argv, name="keeper", log=mesh.scratch / "keeper.log", env=env)
    try:
        until(lambda: "ready" in process.output(), "it gets no answers")
        mesh.apply(policy("keeper", "web", action="DENY"))
        in_force = time.monotonic()
        until(lambda: not process.alive, "it does not end", KEEPS_S + 5)
        said = json.loads(process.output().splitlines()[-1])
        return Kept(said["leg"], event(mesh, "leg") - before, said["error"], said["answered"] - in_force)
    finally:
        process.kill()
        forgotten(mesh)
        mesh.delete("AuthorizationPolicy", "keeper")


@pytest.mark.attack("go on by a leg when the caller is denied")
@pytest.mark.parametrize("acks", [True, False])
def test_a_deny_ends_a_leg_whatever_the_worker_does(mesh: Mesh, counted: Counted, acks: bool) -> None:
    """No hook sees what goes by it."""
    with agent_counted(mesh, counted, "connections_ended", times=1):
        found = keeps(mesh, acks=acks)
    assert found.leg == "made" and found.by_leg > 10
    assert found.error == "ConnectionAbortedError" and found.after_s < 0, found


@pytest.mark.red("go on by a leg when the caller is denied", FOR_EVER)
def test_a_deny_does_not_end_a_leg_without(broken: Mesh) -> None:
    """By TCP it does: each packet is asked about."""
    found, by_tcp = keeps(broken), keeps(broken, by_leg=False)
    assert not found.error and found.after_s > 1, found
    assert by_tcp.error == "TimeoutError" and by_tcp.after_s < 0, by_tcp
