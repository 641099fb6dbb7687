"""An agent that is to end while a worker does: nobody but the agent has what that one leaves to its successor."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mesh import link
from nodeagent import express as module
from nodeagent.express import Express
from nodeagent.worker_link import close_all


class Pairs:
    def __init__(self) -> None:
        self.all: dict[tuple[str, int], object] = {("worker-0", 1): object()}
        self.calls: list[tuple[Any, ...]] = []

    def hand_over(self, worker: str) -> list[Any]:
        self.calls.append(("hand over", worker))
        return []

    def orphan(self, worker: str, _now: float, session: int) -> None:
        self.calls.append(("left", worker, session))

    def revoked(self, spiffes: frozenset[str]) -> None:
        self.calls.append(("revoked", spiffes))

    def close(self) -> None: ...


@pytest.fixture
async def express(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Express]:
    monkeypatch.setattr(module, "TOLD_S", 0.0)
    made = Express(None, None, wanted=False)  # type: ignore[arg-type]  # neither is asked
    await made.start()
    made._pairs = Pairs()  # type: ignore[assignment]
    yield made
    await made.close()


async def test_it_stays_until_the_next_worker_has_it(express: Express) -> None:
    express.message("worker-0", link.Leaving(), [])
    ending = asyncio.create_task(express.handed_over())
    done, _ = await asyncio.wait([ending], timeout=0.05)
    assert not done
    express.worker_ready("worker-0")
    await asyncio.wait_for(ending, 5)
    assert express._pairs is not None and express._pairs.calls == [("hand over", "worker-0")]  # type: ignore[attr-defined]


async def test_what_is_left_one_by_one_goes_to_who_serves(express: Express) -> None:
    """Soon, several at once; an agent that ends waits for it. Where nobody serves yet, it waits for whoever comes."""

    class Fleet:
        serving: str | None = None

        def heir(self) -> str | None:
            return self.serving

    express._fleet = fleet = Fleet()  # type: ignore[assignment]  # all that is asked of it
    express.message("worker-0", link.Leaving(60.0), [])
    await asyncio.wait_for(express.handed_over(), 5)  # the pairs are its worker's still
    pairs: Any = express._pairs
    for session in (1, 2):
        express.message("worker-0", link.Left(session), [])
    ending = asyncio.create_task(express.handed_over())
    await asyncio.wait([ending], timeout=0.1)
    assert pairs.calls == [("left", "worker-0", 1), ("left", "worker-0", 2)] and not ending.done()
    fleet.serving = "worker-1"
    express.message("worker-0", link.Left(3), [])
    await asyncio.wait_for(ending, 5)
    assert pairs.calls[2:] == [("left", "worker-0", 3), ("hand over", "worker-1")]


@pytest.mark.parametrize("who", ["worker-0", "worker-1"], ids=["who stays", "who has nothing paired"])
async def test_it_does_not_wait_for_one(express: Express, who: str) -> None:
    if who != "worker-0":
        express.message(who, link.Leaving(), [])
    await asyncio.wait_for(express.handed_over(), 5)


async def test_it_does_not_wait_for_ever(express: Express, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAND_OVER_S", 0.05)
    express.message("worker-0", link.Leaving(), [])
    await asyncio.wait_for(express.handed_over(), 5)


async def test_one_that_can_not_be_handed_over_waits_for_another_time(express: Express) -> None:
    """As when there are no descriptors left; who comes next hears of the others."""
    told: list[tuple[link.Message, int]] = []

    class Fleet:
        def tell(self, _worker: str, message: link.Message, fds: list[int]) -> None:
            told.append((message, len(fds)))
            close_all(fds)

    express._fleet = Fleet()  # type: ignore[assignment]  # all that is asked of it
    one, other = (link.Takeover(number, "", 80, "", (), ()) for number in (1, 2))
    pairs: Any = express._pairs
    pairs.hand_over = lambda _worker: [(one, [0, -1]), (other, [0, 1])]
    before = len(os.listdir("/proc/self/fd"))
    express.message("worker-0", link.Leaving(), [])
    express.worker_ready("worker-1")
    await asyncio.wait_for(express.handed_over(), 5)
    assert told == [(other, 2)] and pairs.calls == [("left", "worker-1", 1)]
    assert len(os.listdir("/proc/self/fd")) == before


async def test_certificates_that_are_taken_back_reach_the_pairs(express: Express) -> None:
    express.revoked(frozenset())
    express.revoked(frozenset({"spiffe://mesh.local/ns/shop/sa/web"}))
    await express._run(int)  # after it
    assert express._pairs is not None
    assert express._pairs.calls == [("revoked", frozenset({"spiffe://mesh.local/ns/shop/sa/web"}))]  # type: ignore[attr-defined]
