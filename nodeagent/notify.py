"""What the service manager is told of the agent: ready when the node enforces and serves, see `mesh.notify`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from mesh.notify import Notify

if TYPE_CHECKING:
    from nodeagent.agent import Agent
    from nodeagent.fd_store import FdStore

LOOK_S = 0.2
STATUS_CHARS_MAX = 500


async def follow(agent: Agent, notify: Notify, store: FdStore) -> None:
    """Ready when the node first enforces and serves all it should, in the words of `readiness`; alive while the loop turns
    and the kernel thread answers. The manager keeps our listeners. Runs until cancelled."""
    told, ready, beaten = "", False, 0.0
    asked: asyncio.Task[None] | None = None
    while True:
        now = time.monotonic()
        readiness = agent.core.readiness
        detail = "; ".join(part for part in (readiness.detail, agent.load_error, agent.membership.error) if part)
        text = " ".join(("ready: enforced and served" if readiness.ready else detail).split())[:STATUS_CHARS_MAX]
        if text != told:
            told = text
            notify.tell(STATUS=text)
        if readiness.ready and not ready:
            ready = True
            notify.tell(READY=1)
        store.keep(agent.fleet.listeners, settled=ready)
        if now - beaten >= notify.interval_s and (asked is None or asked.done()):
            if asked is not None:
                notify.tell(WATCHDOG=1)
            beaten, asked = now, asyncio.create_task(agent.kernel_answers())
        await asyncio.sleep(LOOK_S)
