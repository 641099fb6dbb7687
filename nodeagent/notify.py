"""What the service manager is told (sd_notify): that this process is ready, alive, about to stop. Nothing where there is none."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nodeagent.agent import Agent

LOOK_S = 0.2
STATUS_CHARS_MAX = 500


class Notify:
    """Takes NOTIFY_SOCKET and WATCHDOG_USEC out of the environment: children are not to speak for us."""

    def __init__(self) -> None:
        path, usec = os.environ.pop("NOTIFY_SOCKET", ""), os.environ.pop("WATCHDOG_USEC", "")
        self._sock: socket.socket | None = None
        self.interval_s = float("inf")  # between two signs of life
        if not path:
            return
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            self._sock.connect("\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            self._sock.close()
            self._sock = None
            return
        if usec.isdigit() and int(usec):
            self.interval_s = int(usec) / 1e6 / 3

    def tell(self, **fields: str | int) -> None:
        """For example ``READY=1, STATUS="…"``. Lost if the manager does not read."""
        if self._sock is None:
            return
        try:
            self._sock.send("\n".join(f"{name}={value}" for name, value in fields.items()).encode())
        except OSError:
            pass  # its restart; the next sign of life comes soon


async def follow(agent: Agent, notify: Notify) -> None:
    """Ready when the node first enforces and serves all it should, in the words of `readiness`; alive while the loop turns
    and the kernel thread answers. Runs until cancelled."""
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
        if now - beaten >= notify.interval_s and (asked is None or asked.done()):
            if asked is not None:
                notify.tell(WATCHDOG=1)
            beaten, asked = now, asyncio.create_task(agent.kernel_answers())
        await asyncio.sleep(LOOK_S)
