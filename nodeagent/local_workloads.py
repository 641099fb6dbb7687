"""The workloads of this node from both sources, file and API, and what became of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from nodeagent import cgroups
from nodeagent import reconcile_events as ev
from nodeagent.options import Options
from nodeagent.workloads import Book, Spec, WorkloadFile, WorkloadsError, check_together

log = structlog.get_logger()

EMPTY_S = 5.0  # a `pillion run` workload whose processes are gone is forgotten after so long,
NEVER_STARTED_S = 120.0  # or so, if none was ever seen

Place = Callable[[list[Spec]], Awaitable[dict[str, ev.Placed]]]


@dataclass(slots=True)
class _Life:
    """Of a workload of the API: whether its processes came and went."""

    seen: bool = False
    empty_since: float = field(default_factory=time.monotonic)


class LocalWorkloads:
    """`refresh` says what the core must hear."""

    def __init__(self, options: Options) -> None:
        self.file = WorkloadFile(options.workloads, node_addresses=options.addresses, ancestor=str(options.cgroup))
        self.book = Book(options.state_dir)
        self._lives: dict[str, _Life] = {}
        self._told: tuple[dict[str, ev.Placed], str] = {}, ""
        self._lock = asyncio.Lock()
        self._writing = asyncio.Lock()

    def load(self) -> frozenset[str]:
        """What a former run knew; returns the keys it registered."""
        self.book.load()
        self.file.specs = self.book.file
        self.file.loaded |= bool(self.book.file)
        return frozenset(self.book.registered)

    async def refresh(self, place: Place) -> ev.SpecsChanged | None:
        """Reads the file if it changed and looks where every workload is; None: as before."""
        async with self._lock:
            if self.file.changed() and await asyncio.to_thread(self.file.poll) and self.file.error:
                log.error("workloads_refused", error=self.file.error)
            if self.file.specs != self.book.file:
                self.book.file = self.file.specs
                await self._keep()
            placed = await place(list({**self.book.api, **self.file.specs}.values()))
            told = placed, "" if self.file.loaded else self.file.error
            if told == self._told:
                return None
            self._told = told
            return ev.SpecsChanged(*told)

    async def add(self, spec: Spec) -> None:
        """One of the API. Raises WorkloadsError when it does not go with the others."""
        if spec.key in self.file.specs:
            raise WorkloadsError(f"{spec.namespace}/{spec.name} is in the workloads file already")
        check_together({**self.book.api, **self.file.specs, spec.key: spec})
        self.book.api[spec.key] = spec
        self._lives[spec.key] = _Life()
        await self._keep()

    async def remove(self, key: str) -> bool:
        """Whether there was one of the API under this key."""
        if self.book.api.pop(key, None) is None:
            return False
        self._lives.pop(key, None)
        await self._keep()
        return True

    def ended(self) -> list[str]:
        """Those of the API without processes: `pillion run` may have been killed."""
        now, found = time.monotonic(), []
        for key, spec in self.book.api.items():
            life = self._lives.setdefault(key, _Life())
            if cgroups.populated(Path(spec.cgroup)):
                life.seen, life.empty_since = True, now
            elif not Path(spec.cgroup).is_dir():  # as after a reboot
                found.append(key)
            elif now - life.empty_since > (EMPTY_S if life.seen else NEVER_STARTED_S):
                log.info("workload_ended", workload=key)
                found.append(key)
        return found

    async def registered(self, key: str) -> None:
        """The controller knows it: to be taken back one day, also by the next agent."""
        if key not in self.book.registered:
            self.book.registered.add(key)
            await self._keep()

    async def unregistered(self, key: str) -> None:
        self.book.registered.discard(key)
        await self._keep()

    async def _keep(self) -> None:
        async with self._writing:
            try:
                await asyncio.to_thread(self.book.save)
            except OSError as error:
                log.error("book_not_kept", error=str(error))
