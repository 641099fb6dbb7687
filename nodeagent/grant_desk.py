"""What workers ask for names outside the mesh, to the data path, and its answers back: a few at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from mesh.link import Grant, Granted
from nodeagent.datapath_api import DatapathError
from nodeagent.proxy_link import ProxyFleet

log = structlog.get_logger()

UNDER_WAY_MAX = 64  # of all workers: each waits for the kernel thread


class GrantDesk:
    """``grant``: `DatapathApi.grant`, off the loop; ``spawn`` runs what may take a while."""

    def __init__(
        self,
        fleet: ProxyFleet,
        grant: Callable[[Grant], Awaitable[str]],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._fleet, self._grant, self._spawn = fleet, grant, spawn
        self._under_way = 0

    def asked(self, worker: str, grant: Grant) -> None:
        """Answers by and by, always."""
        if self._under_way >= UNDER_WAY_MAX:
            self._fleet.tell(worker, Granted(grant.number, "busy"))
            return
        self._under_way += 1
        self._spawn(self._ask(worker, grant))

    async def _ask(self, worker: str, grant: Grant) -> None:
        try:
            reason = await self._grant(grant)
        except (DatapathError, OSError, KeyError) as error:  # the map is full, or the netns went meanwhile
            log.warning("not_granted", name=grant.name[:255], error=str(error))
            reason = "failed"
        finally:
            self._under_way -= 1
        self._fleet.tell(worker, Granted(grant.number, reason))
