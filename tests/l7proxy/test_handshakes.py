"""A step of a handshake holds up nobody but those whose turn comes after it: see `l7proxy.handshakes`."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from typing import cast

from l7proxy.budget import Account, Budgets
from l7proxy.handshakes import Handshakes, handshakes
from tests.l7proxy.two_nodes import CLIENT, WEB, until


class Shaking:
    """A connection whose steps are played: ``go`` is waited for, then the step ends so."""

    def __init__(self, log: list[str], name: str, meter: Account | None = None, go: threading.Event | None = None) -> None:
        self.log, self.name, self.meter, self.go = log, name, meter, go
        self.closed = False
        self.error: Exception | None = None
        self.told: list[Exception | None] = []

    @property
    def tls(self) -> ssl.SSLObject:
        return cast(ssl.SSLObject, self)

    def do_handshake(self) -> None:
        self.log.append(self.name)
        if self.go is not None and not self.go.wait(5):
            self.error = AssertionError("the loop stood still")
        if self.error is not None:
            raise self.error

    def stepped(self, error: Exception | None) -> None:
        self.told.append(error)


async def test_the_loop_turns_while_a_step_is_under_way() -> None:
    go, log = threading.Event(), list[str]()
    one = Shaking(log, "a", go=go)
    desk = handshakes(asyncio.get_running_loop())
    desk.ask(one)
    asyncio.get_running_loop().call_soon(go.set)
    await until(lambda: one.told)
    assert one.told == [None]
    one.error = ssl.SSLError("a mistake of the peer's")
    desk.ask(one)
    await until(lambda: len(one.told) == 2)
    assert one.told[1] is one.error
    assert handshakes(asyncio.get_running_loop()) is desk


async def test_one_at_a_time_by_turns_among_those_who_pay() -> None:
    loop = asyncio.get_running_loop()
    budgets, desk, log, go = Budgets(loop.call_soon), Handshakes(loop), list[str](), threading.Event()
    loud, quiet = budgets.of(300, WEB), budgets.of(301, CLIENT)
    all_of_them = [Shaking(log, f"loud {number}", loud, go) for number in range(4)]
    gone = Shaking(log, "gone", loud)
    for one in [*all_of_them[:2], gone, *all_of_them[2:]]:
        desk.ask(one)
    desk.ask(late := Shaking(log, "quiet", quiet))
    gone.closed = True
    go.set()
    await until(lambda: all(one.told for one in [*all_of_them, late]))
    assert log == ["loud 0", "loud 1", "quiet", "loud 2", "loud 3"]
    assert not gone.told
    desk.end()


async def test_a_step_is_paid_for_and_its_end_waits_for_its_identity_s_turn() -> None:
    loop = asyncio.get_running_loop()
    later: list[object] = []
    budgets, log = Budgets(later.append), list[str]()
    loud, quiet = budgets.of(300, WEB), budgets.of(301, CLIENT)
    quiet.spent += 1e-6  # somebody else is at work

    class Dear(Shaking):
        def do_handshake(self) -> None:
            end = time.thread_time() + 0.002
            while time.thread_time() < end:
                pass

    one, cut = Dear(log, "a", loud), Dear(log, "b", loud)
    desk = Handshakes(loop)
    desk.ask(one)
    desk.ask(cut)
    await until(lambda: len(loud.waiting) == 2)
    assert loud.spent >= 0.004 and not one.told
    cut.closed = True
    while loud.waiting:
        budgets.turn()
    assert one.told == [None] and not cut.told
    desk.end()
