"""What an agent answers who has no express, or none yet."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mesh import link
from nodeagent.datapath_api import DatapathError
from nodeagent.express import Express

ASKS = [link.Pair(1, "Service/shop/web", 80, "shop/cart", ()), link.Leg(1, "shop/cart", False)]


class Fleet:
    def __init__(self) -> None:
        self.told: list[link.Message] = []

    def tell(self, _worker: str, message: link.Message, _fds: tuple[int, ...] = ()) -> None:
        self.told.append(message)


class Datapath:
    """It probes until `probed`; then its kernel turns out not to take it."""

    def __init__(self) -> None:
        self.probing, self.probed = threading.Event(), threading.Event()

    def express(self) -> None:
        self.probing.set()
        assert self.probed.wait(10)
        raise DatapathError("not on this kernel")


@pytest.mark.parametrize("ask", ASKS, ids=["pair", "leg"])
async def test_only_off_lasts(ask: link.Message) -> None:
    """Who asks before it has started, or once it has ended, is to ask again: the next answer may be another."""
    datapath, fleet = Datapath(), Fleet()
    express = Express(datapath, fleet)  # type: ignore[arg-type]  # all that is asked of them
    express.message("worker-0", ask, [])  # as after the end of one that was on: no path, and nothing said against it
    starting = asyncio.create_task(express.start())
    await asyncio.to_thread(datapath.probing.wait, 10)
    express.message("worker-0", ask, [])
    datapath.probed.set()
    await starting
    express.message("worker-0", ask, [])
    await express.close()
    assert [each.reason for each in fleet.told] == ["not_ready", "not_ready", "off"]  # type: ignore[attr-defined]
    if isinstance(ask, link.Pair):
        assert [each.lasting for each in fleet.told] == [False, False, True]  # type: ignore[attr-defined]
