"""What a worker may have as a leg, for how long, and that it costs no more than it is allowed to."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from mesh import link
from mesh.link import Leg, Legged, Paired
from mesh.model import Item
from nodeagent import express as express_module
from nodeagent import express_legs as module
from nodeagent.datapath_api import DatapathError, MapFull
from nodeagent.express import Express
from nodeagent.express_legs import Legs
from nodeagent.express_path import Enrolment
from tests.mesh.build import workload
from tests.mesh.express.build import CART, WEB
from tests.nodeagent.express_fakes import NETNS, Kernel, Sockets, connection, view, world


class Desk:
    def __init__(self) -> None:
        self.kernel = Kernel()
        self.told: list[tuple[str, Legged]] = []
        self.legs = Legs(self.kernel, Sockets(), lambda worker, wish: self.told.append((worker, wish)))
        self.view = view(world())
        self.stack = ExitStack()

    def ask(self, number: int = 1, worker: str = "worker-0", key: str = CART, *, dialled: bool = False) -> Legged:
        client, server = self.stack.enter_context(connection())
        fd = os.dup(client.fileno() if dialled else server.fileno())
        return self.legs.join(self.view, worker, Leg(number, key, dialled), [fd])


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    with made.stack:
        yield made


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("key", "dialled", "side"), [(CART, False, "client"), (WEB, True, "server")])
def test_what_fits_is_a_leg_until_it_is_given_up(desk: Desk, key: str, dialled: bool, side: str) -> None:
    with connection() as (client, server):
        own = client if dialled else server
        before = descriptors()
        assert desk.legs.join(desk.view, "worker-0", Leg(5, key, dialled), [os.dup(own.fileno())]) == Legged(5, True)
        assert descriptors() == before  # nothing of it is kept
        ((place, enrolment),) = desk.kernel.enrolled
        assert place == NETNS[key] and enrolment == Enrolment(
            desk.kernel.legs[0], side, own.getsockname(), own.getpeername(), 0, leg=True
        )
    desk.legs.part("worker-0", 5)
    desk.legs.part("worker-0", 5)  # no fault
    assert not desk.kernel.legs and not desk.legs.all
    assert desk.legs.counts == {"leg_made": 1}


def test_a_number_that_is_asked_for_again_replaces(desk: Desk) -> None:
    assert desk.ask().ok
    (former,) = desk.kernel.legs
    assert desk.ask().ok
    assert len(desk.kernel.legs) == 1 and desk.kernel.legs != [former]
    desk.view = view(world(express="off"))
    assert not desk.ask().ok
    assert not desk.kernel.legs and not desk.legs.all


def test_a_worker_has_a_say_in_its_own_alone(desk: Desk) -> None:
    desk.ask(worker="worker-0")
    desk.ask(worker="worker-1")
    desk.legs.part("worker-1", 2)
    assert len(desk.kernel.legs) == 2
    desk.legs.part("worker-1", 1)
    assert list(desk.legs.all) == [("worker-0", 1)] and len(desk.kernel.legs) == 1


def test_with_its_worker_they_go(desk: Desk) -> None:
    for number in (1, 2):
        desk.ask(number)
        desk.ask(number, "worker-1")
    desk.legs.lost("worker-0")
    assert sorted(desk.legs.all) == [("worker-1", 1), ("worker-1", 2)] and len(desk.kernel.legs) == 2
    desk.legs.lost("worker-0")
    assert len(desk.kernel.legs) == 2


@pytest.mark.parametrize(
    ("items", "config", "key", "reason"),
    [
        ((), {}, "Workload/shop/none", "no_workload"),
        ((workload("far", number=301, node="n2"),), {}, "Workload/shop/far", "no_workload"),
        ((workload("cart-1", number=400, account="cart", express="off"),), {}, CART, "off"),
        ((), {"express": "off"}, CART, "off"),
    ],
)
def test_what_is_not_wanted_is_refused(
    desk: Desk, items: tuple[Item, ...], config: dict[str, Any], key: str, reason: str
) -> None:
    desk.view = view(world(*items, **config))
    before = descriptors()
    with connection() as (_, server):
        answer = desk.legs.join(desk.view, "worker-0", Leg(1, key, False), [os.dup(server.fileno())])
    assert answer == Legged(1, False, reason)
    assert not desk.kernel.legs_ever and not desk.legs.all and descriptors() == before
    assert desk.legs.counts == {f"leg_{reason}": 1}


def test_without_a_state_or_a_place_there_is_none(desk: Desk) -> None:
    before = descriptors()
    with connection() as (_, server):
        assert desk.legs.join(None, "worker-0", Leg(1, CART, False), [os.dup(server.fileno())]).reason == "no_workload"
        elsewhere = view(world(), **{CART: 99})
        assert desk.legs.join(elsewhere, "worker-0", Leg(1, CART, False), [os.dup(server.fileno())]).reason == "no_netns"
    assert descriptors() == before and not desk.kernel.legs_ever


@pytest.mark.parametrize("count", [0, 2, 5])
def test_one_descriptor_is_one_leg(desk: Desk, count: int) -> None:
    before = descriptors()
    with connection() as (_, server):
        answer = desk.legs.join(desk.view, "worker-0", Leg(1, CART, False), [os.dup(server.fileno()) for _ in range(count)])
    assert answer.reason == "malformed" and descriptors() == before and not desk.kernel.legs_ever


@pytest.mark.parametrize("kind", ["pipe", "unix", "unconnected", "packet"])
def test_what_is_no_connection_leaves_nothing_behind(desk: Desk, kind: str) -> None:
    before = descriptors()
    with ExitStack() as stack:
        if kind == "pipe":
            fd, writer = os.pipe()
            stack.callback(os.close, writer)
        elif kind == "unix":
            one, other = socket.socketpair()
            stack.enter_context(other)
            fd = one.detach()
        else:
            fd = socket.socket({"packet": socket.AF_PACKET, "unconnected": socket.AF_INET}[kind], socket.SOCK_DGRAM).detach()
        answer = desk.legs.join(desk.view, "worker-0", Leg(1, CART, False), [fd])
    assert answer == Legged(1, False, "failed") and descriptors() == before
    assert not desk.legs.all and not desk.kernel.legs


@pytest.mark.parametrize("where", ["create_leg", "enrol"])
@pytest.mark.parametrize(
    ("error", "reason"), [(MapFull("xlegs"), "full"), (DatapathError("no"), "failed"), (OSError(1), "failed")]
)
def test_a_kernel_that_fails_leaves_nothing_behind(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception, reason: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(desk.kernel, where, fail)
    before = descriptors()
    with connection() as (_, server):
        answer = desk.legs.join(desk.view, "worker-0", Leg(1, CART, False), [os.dup(server.fileno())])
    assert answer.reason == reason and not desk.kernel.legs and not desk.legs.all and descriptors() == before


def test_what_the_kernel_refuses_is_forgotten(desk: Desk) -> None:
    desk.kernel.refuse = {"client": "not_the_proxys"}
    assert desk.ask() == Legged(1, False, "not_the_proxys")
    assert not desk.kernel.legs and not desk.legs.all and desk.legs.counts == {"leg_not_the_proxys": 1}


def test_there_is_a_limit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEGS_MAX", 2)
    assert [desk.ask(number).reason for number in (1, 2, 3)] == ["", "", "too_many"]
    assert desk.ask(2).ok  # in its own place
    desk.legs.part("worker-0", 1)
    assert desk.ask(3).ok and len(desk.kernel.legs) == 2


@pytest.mark.parametrize("why", ["off", "workload", "gone", "moved away"])
def test_a_state_that_does_not_want_them_ends_them(desk: Desk, why: str) -> None:
    desk.ask(1)
    desk.ask(2, key=WEB, dialled=True)
    known, local = world(), dict(NETNS)
    if why == "off":
        known = world(express="off")
    elif why == "workload":
        known[CART] = workload("cart-1", number=400, account="cart", express="off")
    elif why == "gone":
        del known[CART]
    new = view(known, 8, **local)
    if why == "moved away":
        del new.local[CART]  # type: ignore[attr-defined]  # a dict
    desk.legs.review(new)
    assert set(desk.legs.all) == (set() if why == "off" else {("worker-0", 2)})
    assert len(desk.kernel.legs) == len(desk.legs.all)
    over = (1, 2) if why == "off" else (1,)
    assert desk.told == [("worker-0", Legged(number, False, "off")) for number in over]


def test_a_state_that_changes_nothing_here_keeps_them(desk: Desk) -> None:
    desk.ask()
    desk.legs.review(view(world(workload("other", number=305)), 8))
    assert len(desk.kernel.legs) == 1


# ---- asked over the link


class Fleet:
    def __init__(self) -> None:
        self.told: list[tuple[str, link.Message]] = []
        self.heard = asyncio.Event()

    def tell(self, worker: str, message: link.Message) -> None:
        self.told.append((worker, message))
        self.heard.set()


class Orphans:
    all: dict[object, object] = {}  # never written
    counts: dict[str, int] = {"paired": 3}  # the same

    def orphan(self, _worker: str, _now: float) -> None: ...
    def review(self, _view: object) -> None: ...
    def close(self) -> None: ...


class Shown:
    """`Programs`, of which only the state is asked."""

    def __init__(self) -> None:
        self.view = view(world())

    def move(self, new: Any) -> None:
        self.view = new


class Path:
    """That it is there."""

    def close(self) -> None: ...


class Rig:
    def __init__(self) -> None:
        self.fleet, self.kernel = Fleet(), Kernel()
        self.express = Express(None, self.fleet, wanted=False)  # type: ignore[arg-type]  # all that is asked of them
        self.stack = ExitStack()

    async def on(self) -> None:
        await self.express.start()
        made: Any = self.express
        made._pairs, made._programs, made._legs, made.path = Orphans(), Shown(), Legs(self.kernel, Sockets(), made._wish), Path()

    @property
    def legs(self) -> Legs:
        assert self.express._legs is not None
        return self.express._legs

    def leg(self, number: int = 1, worker: str = "worker-0", count: int = 1) -> None:
        _, server = self.stack.enter_context(connection())
        self.express.message(worker, Leg(number, CART, False), [os.dup(server.fileno()) for _ in range(count)])

    async def done(self) -> None:
        """All that was asked so far, and its answers."""
        await self.express._run(int)
        await asyncio.sleep(0)

    def answers(self) -> list[Legged]:
        return [message for _, message in self.fleet.told if isinstance(message, Legged)]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    await made.on()
    with made.stack:
        yield made
    await made.express.close()


async def test_each_question_has_its_answer_and_ends_with_a_word(rig: Rig) -> None:
    rig.leg(1)
    rig.leg(2, "worker-1")
    await rig.done()
    assert rig.fleet.told == [("worker-0", Legged(1, True)), ("worker-1", Legged(2, True))]
    assert rig.express._waiting == 0 and len(rig.kernel.legs) == 2
    rig.express.message("worker-0", link.Unleg(1), [])
    rig.express.message("worker-0", link.Unleg(2), [])  # another's
    await rig.done()
    assert list(rig.legs.all) == [("worker-1", 2)] and len(rig.answers()) == 2
    assert rig.express._asked() == {"paired": 3, "leg_made": 2}


async def test_unleg_overtakes_nothing(rig: Rig) -> None:
    """The worker gave up waiting for the answer."""
    rig.leg(1)
    rig.express.message("worker-0", link.Unleg(1), [])
    await rig.done()
    assert not rig.legs.all and not rig.kernel.legs


async def test_a_flood_is_refused_at_once_and_holds_no_descriptor(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(express_module, "QUEUE_MAX", 2)
    before = descriptors()
    for number in range(1, 6):  # nothing was answered in between: one turn
        rig.leg(number)
    assert [answer.reason for answer in rig.answers()] == ["busy"] * 3
    await rig.done()
    assert [answer.number for answer in rig.answers() if answer.ok] == [1, 2]
    assert rig.express._waiting == 0
    rig.stack.close()
    assert descriptors() <= before
    rig.leg(6)
    await rig.done()
    assert rig.answers()[-1] == Legged(6, True)


@pytest.mark.parametrize("count", [0, 2, 100])
async def test_descriptors_of_no_use_do_not_wait(rig: Rig, count: int) -> None:
    before = descriptors()
    with connection() as (_, server):
        rig.express.message("worker-0", Leg(1, CART, False), [os.dup(server.fileno()) for _ in range(count)])
    assert rig.answers() == [Legged(1, False, "malformed")] and descriptors() == before
    assert rig.express._waiting == 0


async def test_where_it_is_off_that_is_the_answer(rig: Rig) -> None:
    rig.express.path = None
    before = descriptors()
    with connection() as (_, server):
        rig.express.message("worker-0", Leg(1, CART, False), [os.dup(server.fileno())])
        rig.express.message("worker-0", link.Unleg(1), [])
    assert rig.answers() == [Legged(1, False, "off")] and descriptors() == before
    assert not any(isinstance(message, Paired) for _, message in rig.fleet.told)


async def test_a_bug_is_answered_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(rig.kernel, "create_leg", fail)
    before = descriptors()
    with connection() as (_, server):
        rig.express.message("worker-0", Leg(1, CART, False), [os.dup(server.fileno())])
        await rig.done()
    assert rig.answers() == [Legged(1, False, "failed")] and rig.express._waiting == 0
    assert descriptors() == before and not rig.legs.all


async def test_a_worker_that_is_lost_has_none(rig: Rig) -> None:
    rig.leg(1)
    rig.leg(1, "worker-1")
    rig.express.worker_down("worker-0")
    await rig.done()
    assert list(rig.legs.all) == [("worker-1", 1)] and len(rig.kernel.legs) == 1


async def test_a_new_state_reaches_them(rig: Rig) -> None:
    rig.leg(1)
    await rig.done()
    known = world(express="off")
    rig.express.state(known, 9, [link.LocalWorkload(key, netns, 1) for key, netns in NETNS.items()])
    await rig.done()
    assert not rig.legs.all and not rig.kernel.legs
