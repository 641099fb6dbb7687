"""What a worker may have as a leg, for how long, and that it costs no more than it is allowed to."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from mesh import link
from mesh.link import Leg, Legged, Paired
from mesh.model import Item
from nodeagent import express as express_module
from nodeagent import express_legs as module
from nodeagent import express_share as share
from nodeagent.datapath_api import DatapathError, MapFull
from nodeagent.express import Express
from nodeagent.express_legs import Asked, Legs
from nodeagent.express_pairs import PAIRS_MAX
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
        return self.join(Leg(number, key, dialled), [fd], worker)

    def join(self, leg: Leg, fds: list[int], worker: str = "worker-0") -> Legged:
        (answer,) = self.legs.join(self.view, [Asked(worker, leg, fds)])
        return answer


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
        assert desk.join(Leg(5, key, dialled), [os.dup(own.fileno())]) == Legged(5, True)
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
        answer = desk.join(Leg(1, key, False), [os.dup(server.fileno())])
    assert answer == Legged(1, False, reason)
    assert not desk.kernel.legs_ever and not desk.legs.all and descriptors() == before
    assert desk.legs.counts == {f"leg_{reason}": 1}


def test_without_a_state_or_a_place_there_is_none(desk: Desk) -> None:
    before = descriptors()
    with connection() as (_, server):
        for known, reason in ((None, "no_workload"), (view(world(), **{CART: 99}), "no_netns")):
            (answer,) = desk.legs.join(known, [Asked("worker-0", Leg(1, CART, False), [os.dup(server.fileno())])])
            assert answer.reason == reason
    assert descriptors() == before and not desk.kernel.legs_ever


@pytest.mark.parametrize("count", [0, 2, 5])
def test_one_descriptor_is_one_leg(desk: Desk, count: int) -> None:
    before = descriptors()
    with connection() as (_, server):
        answer = desk.join(Leg(1, CART, False), [os.dup(server.fileno()) for _ in range(count)])
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
        answer = desk.join(Leg(1, CART, False), [fd])
    assert answer == Legged(1, False, "failed") and descriptors() == before
    assert not desk.legs.all and not desk.kernel.legs


@pytest.mark.parametrize("where", ["create_leg", "enrol_all"])
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
        answer = desk.join(Leg(1, CART, False), [os.dup(server.fileno())])
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


def test_one_worker_leaves_room_for_others(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times what is free is its share."""
    monkeypatch.setattr(module, "LEGS_MAX", 8)
    assert [desk.ask(number).ok for number in range(1, 8)] == [True] * 6 + [False]
    assert [desk.ask(number, "worker-1").ok for number in range(1, 4)] == [True] * 2 + [False]
    desk.legs.lost("worker-0")
    assert [desk.ask(number, "worker-1").ok for number in range(3, 8)] == [True] * 4 + [False]


def test_of_many_each_has_its_answer(desk: Desk) -> None:
    client, server = desk.stack.enter_context(connection())
    reader, writer = os.pipe()
    desk.stack.callback(os.close, writer)
    before = descriptors()
    desk.kernel.refuse = {"server": "not_the_proxys"}
    asks = [
        Asked("worker-0", Leg(1, CART, False), [reader]),
        Asked("worker-0", Leg(2, CART, False), [os.dup(server.fileno())]),
        Asked("worker-1", Leg(1, WEB, True), [os.dup(client.fileno())]),
        Asked("worker-1", Leg(2, "Workload/shop/none", True), [os.dup(client.fileno())]),
        Asked("worker-1", Leg(3, CART, False), [os.dup(server.fileno())]),
    ]
    reasons = ["failed", "", "not_the_proxys", "no_workload", ""]
    answers = desk.legs.join(desk.view, asks)
    assert answers == [Legged(asked.leg.number, not why, why) for asked, why in zip(asks, reasons, strict=True)]
    assert list(desk.legs.all) == [("worker-0", 2), ("worker-1", 3)] and len(desk.kernel.legs) == 2
    assert descriptors() == before - 1


def test_of_many_that_fail_together_nothing_is_left(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DatapathError("no")

    monkeypatch.setattr(desk.kernel, "enrol_all", fail)
    _, server = desk.stack.enter_context(connection())
    before = descriptors()
    asks = [Asked("worker-0", Leg(number, CART, False), [os.dup(server.fileno())]) for number in (1, 2)]
    assert [answer.reason for answer in desk.legs.join(desk.view, asks)] == ["failed"] * 2
    assert not desk.legs.all and not desk.kernel.legs and descriptors() == before


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
        self.dropped: list[str] = []

    def drop(self, worker: str, _reason: str) -> None:
        self.dropped.append(worker)

    def tell(self, worker: str, message: link.Message) -> None:
        self.told.append((worker, message))
        self.heard.set()


class Orphans:
    all: dict[object, object] = {}  # never written
    counts: dict[str, int] = {"paired": 3}  # the same

    def orphan(self, _worker: str, _now: float, _session: int | None = None) -> None: ...
    def unpair(self, _worker: str, _session: int) -> None: ...
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
        while True:
            await self.express._run(int)
            await asyncio.sleep(0)
            if not self.express._turns.asks:
                break

    async def answered(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.answers()) < count:
                self.fleet.heard.clear()
                await self.fleet.heard.wait()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The one thread is at something else."""
        over = threading.Event()
        self.express._thread.submit(over.wait)
        try:
            yield
        finally:
            over.set()

    def answers(self) -> list[Legged]:
        return [message for _, message in self.fleet.told if isinstance(message, Legged)]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    await made.on()
    with made.stack:
        yield made
    if not made.express._thread._shutdown:
        await made.express.close()


async def test_each_question_has_its_answer_and_ends_with_a_word(rig: Rig) -> None:
    rig.leg(1)
    rig.leg(2, "worker-1")
    await rig.done()
    assert rig.fleet.told == [("worker-0", Legged(1, True)), ("worker-1", Legged(2, True))]
    assert not rig.express._turns.asks and len(rig.kernel.legs) == 2
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
    monkeypatch.setattr(share, "QUEUE_MAX", 2)
    before = descriptors()
    for number in range(1, 6):  # nothing was answered in between: one turn
        rig.leg(number)
    assert [answer.reason for answer in rig.answers()] == ["busy"] * 3
    await rig.done()
    assert [answer.number for answer in rig.answers() if answer.ok] == [1, 2]
    assert not rig.express._turns.asks
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
    assert not rig.express._turns.asks


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
    assert rig.answers() == [Legged(1, False, "failed")] and not rig.express._turns.asks
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


async def test_those_that_wait_go_together(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_MAX", 3)
    together: list[int] = []
    enrol = rig.kernel.enrol_all

    def watched(items: Any) -> Any:
        together.append(len(items))
        return enrol(items)

    monkeypatch.setattr(rig.kernel, "enrol_all", watched)
    with rig.busy():
        for number in range(1, 7):
            rig.leg(number)
    await rig.answered(6)
    assert together == [1, 3, 2] and rig.answers() == [Legged(number, True) for number in range(1, 7)]
    assert not rig.express._turns.asks


@pytest.mark.parametrize("how", ["unleg", "down", "close"])
async def test_one_that_waits_and_is_given_up_is_none(rig: Rig, how: str) -> None:
    """Who would end it later?"""
    with rig.busy():
        rig.leg(1)
        rig.leg(2, "worker-1")
        before = descriptors()
        rig.leg(1, "worker-1")
        if how == "unleg":
            rig.express.message("worker-1", link.Unleg(1), [])
        elif how == "down":
            rig.express.worker_down("worker-1")
        else:
            closing = asyncio.create_task(rig.express.close())
            await asyncio.sleep(0)
        rig.stack.pop_all().close()
        assert descriptors() == before - (4 if how == "unleg" else 5)  # our ends of two connections are closed
    if how == "close":
        await closing
    await rig.answered(3)
    assert sorted(rig.legs.all) == ([("worker-0", 1), ("worker-1", 2)] if how == "unleg" else [("worker-0", 1)])
    assert ("worker-1", Legged(1, False, "given_up")) in rig.fleet.told and not rig.express._turns.asks


async def test_a_bug_holds_up_nobody(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    enrol = rig.kernel.enrol_all

    def fail(*_: object) -> None:
        monkeypatch.setattr(rig.kernel, "enrol_all", enrol)
        raise AssertionError("a bug")

    monkeypatch.setattr(rig.kernel, "enrol_all", fail)
    with rig.busy():
        for number in (1, 2, 3):
            rig.leg(number)
    await rig.answered(3)
    assert [answer.reason for answer in rig.answers()] == ["failed", "", ""] and len(rig.kernel.legs) == 2


async def test_one_workers_questions_do_not_keep_others_waiting(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "ASKS_MAX", 3)
    with rig.busy():
        for number in range(1, 6):
            rig.leg(number)
        rig.leg(1, "worker-1")
    await rig.answered(6)
    assert rig.fleet.told[:2] == [("worker-0", Legged(number, False, "busy")) for number in (4, 5)]
    assert ("worker-1", Legged(1, True)) in rig.fleet.told
    rig.leg(6)
    await rig.answered(7)
    assert rig.answers()[-1] == Legged(6, True)


@pytest.mark.parametrize("message", [link.Unleg, link.Unpair, link.Left])
async def test_who_ends_more_than_there_can_be_is_hung_up_on(rig: Rig, message: Any) -> None:
    """What waits for the thread is memory."""
    rig.express._turns = share.Turns(ends_max=10)
    rig.leg(1, "worker-1")
    await rig.answered(1)
    with rig.busy():
        for number in range(1, 1000):
            rig.express.message("worker-0", message(number), [])
        assert set(rig.fleet.dropped) == {"worker-0"} and rig.express._thread._work_queue.qsize() <= 11
        rig.fleet.dropped.clear()
        rig.express.message("worker-1", link.Unleg(1), [])  # means what it says
        assert "worker-1" not in rig.fleet.dropped
    await rig.done()
    assert not rig.legs.all and not rig.express._turns.ends
    rig.fleet.dropped.clear()
    for number in range(1, 10):
        rig.express.message("worker-0", message(number), [])
    assert not rig.fleet.dropped
    await rig.done()


def test_all_that_a_node_can_have_may_end_at_once() -> None:
    turns = share.Turns(express_module.ENDS_MAX)
    assert not any(turns.end("worker-0") for _ in range(module.LEGS_MAX + PAIRS_MAX + share.QUEUE_MAX))
