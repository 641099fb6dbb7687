"""Every question of a worker is answered, also those the kernel refuses or that are too many."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mesh.link import Grant, Granted
from nodeagent import grant_desk
from nodeagent.datapath_api import DatapathError
from nodeagent.grant_desk import GrantDesk


class Fleet:
    def __init__(self) -> None:
        self.told: list[tuple[str, Granted]] = []

    def tell(self, worker: str, message: Any) -> None:
        self.told.append((worker, message))


def grant(number: int) -> Grant:
    return Grant(number, 7, ("127.0.0.1", 5000), "udp", "api.test", ("93.184.215.14",), 60.0)


async def test_each_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grant_desk, "UNDER_WAY_MAX", 4)
    go, fleet, tasks = asyncio.Event(), Fleet(), []

    async def kernel(asked: Grant) -> str:
        await go.wait()
        if asked.number == 1:
            raise DatapathError("full")
        if asked.number == 2:
            raise KeyError(7)
        return "" if asked.number == 3 else "not_named"

    desk = GrantDesk(fleet, kernel, lambda work: tasks.append(asyncio.ensure_future(work)))  # type: ignore[arg-type]  # a fake
    for number in range(1, 6):
        desk.asked("worker-0", grant(number))
    assert fleet.told == [("worker-0", Granted(5, "busy"))]
    go.set()
    await asyncio.gather(*tasks)
    assert [(told.number, told.reason) for _, told in fleet.told[1:]] == [(1, "failed"), (2, "failed"), (3, ""), (4, "not_named")]
    desk.asked("worker-1", grant(3))
    await asyncio.gather(*tasks)
    assert fleet.told[-1] == ("worker-1", Granted(3))
