"""What a worker may have paired: only what the kernel's own records say is its to pair."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import Any

import pytest

from mesh.link import Paired, PairEnd
from mesh.model import Action, Rule, Source, State
from nodeagent import express_pairs
from nodeagent.datapath_api import DatapathError
from nodeagent.express_pairs import Pairs
from nodeagent.express_programs import Programs
from tests.mesh.build import identity, policy, service, spiffe, workload
from tests.mesh.express.build import CALLER, CART, KEY, WEB
from tests.nodeagent.express_fakes import ADDRESS, NETNS, VIP, Kernel, Sockets, asked, connection, view, world


class Desk:
    def __init__(self) -> None:
        self.kernel, self.sockets = Kernel(), Sockets()
        self.wishes: list[tuple[str, Paired]] = []
        self.pairs = Pairs(self.kernel, self.sockets, lambda worker, wish: self.wishes.append((worker, wish)))
        self.programs = Programs(self.kernel, self.pairs.moved)
        self.programs.move(view(world()))

    def pair(self, worker: str = "worker-0", **more: Any) -> Paired:
        with asked(**more) as (ask, fds):
            return self.pairs.pair(self.programs, worker, ask, fds)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_fits_is_paired_and_the_sockets_are_kept(desk: Desk) -> None:
    before = descriptors()
    answer = desk.pair()
    assert answer == Paired(1, True, (0,), ())
    assert desk.kernel.records == {900: (1, 400)}
    (at_client, client), (at_server, server) = desk.kernel.enrolled
    assert (at_client, at_server) == (NETNS[CART], NETNS[WEB])
    assert client.side == "client" and client.identity == 400
    assert (server.slot, server.workload, server.port, server.caller) == (0, 300, 8080, ("10.77.1.151", 4711))
    assert descriptors() == before + 2
    desk.pairs.unpair("worker-0", 1)
    assert descriptors() == before and not desk.kernel.records


def test_pairing_again_replaces(desk: Desk) -> None:
    desk.pair()
    assert desk.pair().ok
    assert list(desk.kernel.records) == [900] and len(desk.pairs.all) == 1


def test_one_worker_can_not_unpair_anothers(desk: Desk) -> None:
    desk.pair()
    desk.pairs.unpair("worker-1", 1)
    assert desk.kernel.records


@pytest.mark.parametrize(
    ("origin", "ask", "reason"),
    [
        (None, {}, "not_captured"),
        ({"identity": 401}, {}, "not_the_caller"),
        ({"workload": 300}, {}, "not_the_caller"),
        ({"netns": 99}, {}, "not_the_caller"),
        ({}, {"caller": WEB}, "not_the_caller"),
        ({}, {"caller": "Workload/shop/none"}, "not_the_caller"),
        ({"service": 501}, {}, "no_service"),
        ({}, {"service": "Service/shop/other"}, "no_service"),
        ({}, {"service": ""}, "no_service"),
        ({}, {"port": 81}, "no_service"),
        ({}, {"endpoints": ()}, "malformed"),
        ({}, {"endpoints": (PairEnd(WEB, 8080), PairEnd(WEB, 8080))}, "malformed"),
        ({}, {"endpoints": (PairEnd(CART, 8080),)}, "no_endpoint"),
        ({}, {"endpoints": (PairEnd(WEB, 9090),)}, "no_endpoint"),
    ],
)
def test_what_the_kernel_knows_otherwise_is_refused(
    desk: Desk, origin: dict[str, Any] | None, ask: dict[str, Any], reason: str
) -> None:
    desk.sockets.value = None if origin is None else {**(desk.sockets.value or {}), **origin}
    before = descriptors()
    answer = desk.pair(**ask)
    assert not answer.ok and answer.reason == reason
    assert not desk.kernel.records and not desk.pairs.all and descriptors() == before
    assert desk.pairs.counts == {reason: 1}


def test_a_socket_to_somewhere_else_is_refused(desk: Desk) -> None:
    with asked() as (ask, fds), connection() as (elsewhere, _):
        os.dup2(elsewhere.fileno(), fds[1])
        answer = desk.pairs.pair(desk.programs, "worker-0", ask, fds)
    assert answer.reason == "not_the_endpoint" and not desk.kernel.records


def test_what_is_no_socket_is_refused(desk: Desk) -> None:
    reader, writer = os.pipe()
    with asked() as (ask, fds):
        os.dup2(reader, fds[1])
        answer = desk.pairs.pair(desk.programs, "worker-0", ask, fds)
    os.close(reader)
    os.close(writer)
    assert answer.reason == "failed" and not desk.kernel.records


def test_an_end_that_was_not_taken_is_the_workers_alone(desk: Desk) -> None:
    """It goes back to the worker's pool: the agent keeps it no longer open, and gives it to no other worker."""
    before = descriptors()
    ends = (PairEnd(WEB, 9090), PairEnd(WEB, 8080))
    with connection() as (upstream, far), asked(endpoints=ends) as (ask, fds):
        fds.insert(1, os.dup(upstream.fileno()))
        assert desk.pairs.pair(desk.programs, "worker-0", ask, fds) == Paired(1, True, (-1, 0), ())
        upstream.close()
        far.settimeout(1)
        assert far.recv(1) == b""
    assert descriptors() == before + 2
    desk.pairs.orphan("worker-0", 1.0)
    ((takeover, given),) = desk.pairs.hand_over("worker-1")
    assert (takeover.endpoints, takeover.slots, len(given)) == (ends[1:], (0,), 2)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", ["pipe", "unix", "unconnected", "packet"])
def test_what_is_no_connection_leaves_nothing_behind(desk: Desk, place: int, kind: str) -> None:
    """A worker that was taken over can send any descriptor it has, as often as it likes."""
    before = descriptors()
    with ExitStack() as stack:
        if kind == "pipe":
            reader, writer = os.pipe()
            stack.callback(os.close, writer)
            stack.callback(os.close, reader)
        elif kind == "unix":
            one, other = socket.socketpair()
            reader = stack.enter_context(one).fileno()
            stack.enter_context(other)
        else:
            family = {"packet": socket.AF_PACKET, "unconnected": socket.AF_INET}[kind]
            reader = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)).fileno()
        with asked() as (ask, fds):
            os.dup2(reader, fds[place])
            answer = desk.pairs.pair(desk.programs, "worker-0", ask, fds)
    assert not answer.ok and not desk.pairs.all and not desk.kernel.records
    assert descriptors() == before


@pytest.mark.parametrize(("side", "reason"), [("client", "client_lowat"), ("server", "server_lowat")])
def test_what_the_kernel_refuses_is_refused(desk: Desk, side: str, reason: str) -> None:
    desk.kernel.refuse = {side: "lowat"}
    assert desk.pair().reason == reason and not desk.kernel.records


def test_refusals_that_last_say_so(desk: Desk) -> None:
    desk.programs.move(view(world(access_log=True), 8))
    answer = desk.pair()
    assert answer.reason == "not_expressible" and answer.lasting


def test_a_caller_that_has_it_off_is_refused(desk: Desk) -> None:
    off = workload("cart-1", number=400, account="cart", express="off")
    known = world()
    known[CART] = off
    desk.programs.move(view(known, 8))
    assert desk.pair().reason == "caller_off"


def test_there_is_a_limit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express_pairs, "PAIRS_MAX", 1)
    assert desk.pair(session=1).ok
    assert desk.pair(session=2).reason == "too_many_pairs"


def test_one_worker_leaves_room_for_others(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times what is free is its share; of what it has by a takeover it keeps all."""
    monkeypatch.setattr(express_pairs, "PAIRS_MAX", 8)
    assert [desk.pair(session=n).ok for n in range(1, 8)] == [True] * 6 + [False]
    assert [desk.pair("worker-1", session=n).ok for n in range(11, 14)] == [True] * 2 + [False]
    desk.pairs.orphan("worker-0", 1.0)
    assert len(desk.pairs.hand_over("worker-1")) == 6
    assert all(desk.pair("worker-1", session=session).ok for _, session in list(desk.pairs.all))
    assert desk.pair("worker-1", session=14).reason == "too_many_pairs" and len(desk.pairs.all) == 8


def test_a_second_endpoint_is_wished_for(desk: Desk) -> None:
    desk.pair()
    second = "Workload/shop/web-2"
    known = world(workload("web-2", number=301), endpoints=(WEB, second))
    new = view(known, 8, **{second: 73})
    desk.programs.move(new)
    desk.pairs.review(new)
    assert desk.wishes == [("worker-0", Paired(1, True, (0,), (PairEnd(second, 8080),)))]


def test_a_service_that_is_no_more_for_the_kernel_is_let_go(desk: Desk) -> None:
    desk.pair()
    new = view(world(access_log=True), 8)
    desk.programs.move(new)
    desk.pairs.review(new)
    assert [(worker, wish.ok) for worker, wish in desk.wishes] == [("worker-0", False)]


def test_a_caller_that_left_is_let_go(desk: Desk) -> None:
    desk.pair()
    known = world()
    del known[f"Workload/{CALLER.namespace}/{CALLER.name}"]
    new = view(known, 8)
    desk.programs.move(new)
    desk.pairs.review(new)
    assert not desk.wishes[0][1].ok


def test_a_pair_outlives_its_worker(desk: Desk) -> None:
    desk.pair()
    desk.pairs.orphan("worker-0", 5.0)
    desk.pairs.tick(6.0)
    ((takeover, fds),) = desk.pairs.hand_over("worker-1")
    assert (takeover.session, takeover.service, takeover.caller, takeover.slots) == (1, KEY, CART, (0,))
    assert len(fds) == 2 and socket.socket(fileno=os.dup(fds[0])).getpeername()
    assert list(desk.pairs.all) == [("worker-1", 1)] and desk.kernel.records
    assert not desk.pairs.hand_over("worker-1")
    desk.pairs.close()


def test_one_that_was_left_is_another_workers(desk: Desk) -> None:
    """Its former worker lives on, with the others it has."""
    desk.pair(session=1)
    desk.pair(session=2)
    desk.pairs.orphan("worker-0", 5.0, 2)
    desk.pairs.orphan("worker-0", 5.0, 3)  # none of its
    ((takeover, _),) = desk.pairs.hand_over("worker-1")
    assert takeover.session == 2 and set(desk.pairs.all) == {("worker-0", 1), ("worker-1", 2)}
    desk.pairs.unpair("worker-0", 2)  # it has no say in it any more
    assert set(desk.pairs.all) == {("worker-0", 1), ("worker-1", 2)}
    desk.pairs.close()


@pytest.mark.parametrize("standing", ["moved", "unread"])
def test_what_stood_in_the_middle_of_something_is_reset(desk: Desk, standing: str) -> None:
    with connection() as (client, accepted), connection(8080) as (upstream, server):
        with asked() as (ask, _):
            pass
        fds = [os.dup(accepted.fileno()), os.dup(upstream.fileno())]
        assert desk.pairs.pair(desk.programs, "worker-0", ask, fds).ok
        accepted.close()
        upstream.close()
        desk.kernel.standing = standing
        desk.pairs.orphan("worker-0", 5.0)
        assert desk.pairs.hand_over("worker-1") == [] and not desk.kernel.records
        for end in (client, server):
            end.settimeout(5)
            with pytest.raises(ConnectionResetError):
                end.recv(1)
    assert desk.pairs.counts["lost"] == 1


def test_nobody_waits_for_ever(desk: Desk) -> None:
    desk.pair()
    desk.pairs.orphan("worker-0", 5.0)
    desk.pairs.tick(5.0 + express_pairs.ORPHANED_S + 1)
    assert not desk.pairs.all and not desk.kernel.records


# ---- certificates taken back


@pytest.mark.parametrize("who", ["cart", "web"], ids=["caller's", "server's"])
def test_a_certificate_of_either_side_that_is_taken_back_undoes_the_pair(desk: Desk, who: str) -> None:
    """Nothing more is carried from that moment on; what runs is the worker's to bring to its end."""
    desk.pair()
    assert desk.kernel.records == {900: (1, 400)}
    desk.pairs.revoked(frozenset({spiffe("shop", who), spiffe("shop", "other")}))
    assert desk.kernel.records == {900: (express_pairs.NO_PROGRAM, 400)}
    assert desk.wishes == [("worker-0", Paired(1, False, reason="certificate_revoked"))]
    assert desk.pairs.counts["certificate_revoked"] == 1


def test_one_that_the_kernel_does_not_take_back_keeps_no_other(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker hears of it all the same, and lets go."""
    for session in (1, 2, 3):
        desk.pair(session=session)
    change = desk.kernel.set_program

    def fail(record: int, program: int) -> str:
        if record == 900:
            raise DatapathError("out of memory")
        return change(record, program)

    monkeypatch.setattr(desk.kernel, "set_program", fail)
    desk.pairs.revoked(frozenset({spiffe("shop", "web")}))
    assert [program for program, _ in desk.kernel.records.values()] == [1, express_pairs.NO_PROGRAM, express_pairs.NO_PROGRAM]
    assert [wish.session for _, wish in desk.wishes] == [1, 2, 3]


def test_certificates_of_others_are_of_no_concern(desk: Desk) -> None:
    desk.pair()
    desk.pairs.revoked(frozenset({spiffe("shop", "other")}))
    assert desk.kernel.records == {900: (1, 400)} and not desk.wishes


# ---- a state in which a pair has no place


def reviewed(desk: Desk, known: State, **local: int) -> list[str]:
    new = view(known, 8, **local)
    desk.programs.move(new)
    desk.pairs.review(new)
    return [wish.reason for _, wish in desk.wishes if not wish.ok]


def test_an_endpoint_that_is_gone_lets_its_pairs_go(desk: Desk) -> None:
    desk.pair()
    second = "Workload/shop/web-2"
    known = world(workload("web-2", number=301), endpoints=(second,))
    assert reviewed(desk, known, **{second: 73}) == ["endpoint_gone"]


def test_a_caller_with_another_identity_is_let_go(desk: Desk) -> None:
    desk.pair()
    known = world(identity("shop", "new", 402))
    known[CART] = workload("cart-1", number=402, account="new")
    assert reviewed(desk, known) == ["caller_gone"]


# ---- rules that read the caller's address, and workloads' own addresses


def test_the_callers_address_is_the_one_the_kernel_noted(desk: Desk) -> None:
    near = policy("near", Action.ALLOW, Rule((Source(ip_blocks=("10.77.1.0/24",)),)))
    desk.programs.move(view(world(near, default=Action.DENY), 8))
    assert desk.pair().ok
    (pair,) = desk.pairs.all.values()
    assert pair.program.key.address == "10.77.1.151"
    assert desk.sockets.value is not None
    desk.sockets.value["client"] = bytes(10) + b"\xff\xff" + socket.inet_aton("10.78.1.151")
    answer = desk.pair(session=2)
    assert (answer.reason, answer.lasting) == ("not_expressible", True)


def test_a_workload_dialled_by_its_own_address_is_answered_by_no_other(desk: Desk) -> None:
    """The service's port has the same number, the service another endpoint, and a route leads elsewhere."""
    second = "Workload/shop/web-2"
    known = world(workload("web-2", number=301), endpoints=(WEB, second))
    known[KEY] = service("web", port=8080, target=8080, endpoints=(WEB, second), vips=(VIP,))
    desk.programs.move(view(known, 8, **{second: 73}))
    assert desk.sockets.value is not None
    desk.sockets.value |= {"dst": bytes(10) + b"\xff\xff" + socket.inet_aton(ADDRESS), "dst_port": 8080}
    assert desk.pair(port=8080) == Paired(1, True, (0,), ())
    assert desk.kernel.programs[1]["endpoints"] == [300]
    desk.sockets.value["dst"] = bytes(10) + b"\xff\xff" + socket.inet_aton(VIP)
    assert desk.pair(session=2, port=8080).missing == (PairEnd(second, 8080),)


def test_an_address_of_nobody_here_is_refused_for_good(desk: Desk) -> None:
    assert desk.sockets.value is not None
    desk.sockets.value["dst"] = bytes(10) + b"\xff\xff" + socket.inet_aton("10.1.2.3")
    answer = desk.pair()
    assert (answer.reason, answer.lasting) == ("no_service", True)
