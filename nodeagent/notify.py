"""What the service manager is told of the agent: ready when the node enforces and serves, see `mesh.notify`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from mesh.notify import Notify
from nodeagent.loading import under_way

if TYPE_CHECKING:
    from nodeagent.agent import Agent
    from nodeagent.fd_store import FdStore

LOOK_S = 0.2
STATUS_CHARS_MAX = 500
# More time for a start that an operator has limited, while it compiles; told anew long before it is over
EXTENDED_S, EXTENDED_EVERY_S = 60.0, 15.0


async def follow(agent: Agent, notify: Notify, store: FdStore) -> None:
    """Ready when the node first enforces and serves all it should, in the words of `readiness`; alive while the loop turns
    and the kernel thread answers, or waits for a compiler that gets on. The manager keeps our listeners. Runs until cancelled."""
    told, ready, beaten, extended = "", False, 0.0, 0.0
    asked: asyncio.Task[None] | None = None
    while True:
        now = time.monotonic()
        readiness, compiling = agent.core.readiness, under_way()
        detail = "; ".join(part for part in (compiling, readiness.detail, agent.load_error, agent.membership.error) if part)
        text = " ".join(("ready: enforced and served" if readiness.ready else detail).split())[:STATUS_CHARS_MAX]
        if text != told:
            told = text
            notify.tell(STATUS=text)
        if readiness.ready and not ready:
            ready = True
            notify.tell(READY=1)
        if compiling and not ready and now - extended >= EXTENDED_EVERY_S:
            extended = now
            notify.tell(EXTEND_TIMEOUT_USEC=int(EXTENDED_S * 1e6))
        store.keep(agent.fleet.listeners, settled=ready)
        if now - beaten >= notify.interval_s and (asked is None or asked.done() or compiling):
            if asked is not None:
                notify.tell(WATCHDOG=1)
            beaten = now
            if asked is None or asked.done():
                asked = asyncio.create_task(agent.kernel_answers())
        await asyncio.sleep(LOOK_S)
