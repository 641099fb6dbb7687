"""Express as the agent sees it: loads it, keeps its programs at the state in force, answers the workers' questions, and
tells. All of its work runs on one thread; off, with a reason, where the kernel can not."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from mesh import link
from mesh.link import Legged, Paired
from mesh.model import State
from nodeagent.datapath_api import DatapathApi, DatapathError
from nodeagent.express_ledger import Ledger
from nodeagent.express_legs import LEGS_MAX, Joining, Legs
from nodeagent.express_legs import Asked as LegAsked
from nodeagent.express_pairs import PAIRS_MAX, Pairs
from nodeagent.express_path import ExpressPath
from nodeagent.express_programs import Programs, View
from nodeagent.express_report import described, metrics_text, top
from nodeagent.express_share import QUEUE_MAX, Turns
from nodeagent.proxy_link import Asked, ProxyFleet
from nodeagent.worker_link import close_all, duplicates

log = structlog.get_logger()

STARTING = "starting"
REAP_EVERY_S = 1.0
# An agent that is to end waits so long for the successor of a worker that ends too; one that was told to at the same moment
# has said so by then, and a successor has its first sockets so long after what was left to it
HAND_OVER_S, TOLD_S = 5.0, 0.2
SEEK_S = 0.01  # what was left at about the same time goes to the same worker
FORMER_S = 30.0  # a former agent's pairs are told to a new one within this time
ENDS_MAX = PAIRS_MAX + LEGS_MAX + QUEUE_MAX  # messages that wait and end something: there is no more


class Express:
    """``path`` is None while it is off; ``why`` says why then."""

    def __init__(self, datapath: DatapathApi, fleet: ProxyFleet, *, wanted: bool = True, ledger: Path | None = None) -> None:
        self._datapath, self._fleet, self._wanted = datapath, fleet, wanted
        self._ledger = Ledger(ledger) if ledger else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="express-agent")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turns = Turns(ENDS_MAX)
        self._joining = Joining(lambda asks: self._submit(self._join, asks))
        self._reaped = 0.0
        self._reaping = self._seeking = False
        self._awaited: set[str] = set()  # workers that leave, or left, what they had to the next
        self._came = asyncio.Event()  # ... which has it
        self._former: list[int] = []
        self._started = 0.0
        self.path: ExpressPath | None = None
        self.why = STARTING if wanted else "off by --express"
        self.probes: dict[str, str] = {}
        self._programs: Programs | None = None
        self._pairs: Pairs | None = None
        self._legs: Legs | None = None

    @property
    def on(self) -> bool:
        return self.path is not None

    async def start(self) -> None:
        """After the data path. Never raises: the mesh goes on without."""
        self._loop = asyncio.get_running_loop()
        if self._wanted:
            await self._run(self._start)
        if self.why:
            log.warning("express_off", why=self.why)

    def _start(self) -> None:
        try:
            path = self._datapath.express()
        except (DatapathError, OSError) as error:
            self.why = f"the kernel does not take it: {str(error)[-400:]}"
            return
        try:
            self.probes = path.probes()
            failed = [f"{name}: {text}" for name, text in self.probes.items() if text != "ok"]
            if failed:
                raise DatapathError(f"this kernel does otherwise than express needs: {'; '.join(failed)}")
            pairs = Pairs(path, self._datapath, self._wish)
            found = {record: path.read_record(record) for record in path.records()}  # a former agent's: workers pair anew
            self._former = list(found)
            self._count_lost(path, pairs, found)
            taken = {int(fields["program"]) for fields in found.values() if fields}
            self._programs, self._pairs = Programs(path, pairs.moved, taken), pairs
            self._legs = Legs(path, self._datapath, self._wish)
        except (DatapathError, OSError) as error:
            path.close()
            self.why = str(error)
            return
        self.path, self.why = path, ""

    def _count_lost(self, path: ExpressPath, pairs: Pairs, found: Mapping[int, Mapping[str, Any] | None]) -> None:
        """Pairs whose worker died while no agent was there who had their sockets too. Their connections have ended."""
        paired = [record for record, fields in found.items() if fields and fields["client_key"] and not fields["off"]]
        lost, others = self._ledger.orphans(len(paired)) if self._ledger else (0, True)
        if lost:
            pairs.counts["lost_while_away"] = lost
            log.warning("pairs_lost_while_away", pairs=lost, why="the proxy ended while there was no agent")
        if not others:
            for record in self._former:
                path.forget_record(record)
            self._former = []

    async def close(self) -> None:
        self._give_up(lambda _: True)
        await self._run(self._close)
        self._thread.shutdown()

    def _close(self) -> None:
        if self._pairs is not None:
            self._pairs.close()
        if self.path is not None:
            self.path.close()
            self.path = None

    async def _run(self, call: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    # ---- from the agent

    def state(self, state: State, generation: int, local: Iterable[link.LocalWorkload]) -> None:
        """In force in the kernel's other maps since a moment ago: until its programs follow, everything is slow."""
        if self.on:
            self._submit(self._move, state, generation, {entry.key: entry.netns for entry in local})

    def _move(self, state: State, generation: int, local: dict[str, int]) -> None:
        programs, pairs = self._programs, self._pairs
        if programs is None or pairs is None:
            return
        same = programs.view is not None and programs.view.state is state and programs.view.generation == generation
        if same and programs.view is not None and programs.view.local == local:
            return
        view = View(state, generation, local)
        programs.move(view)
        pairs.review(view)
        if self._legs is not None:
            self._legs.review(view)

    def revoked(self, spiffes: frozenset[str]) -> None:
        """Identities whose certificate was taken back: what is paired for them, or with them, is so no more."""
        if spiffes and self._pairs is not None:
            self._submit(self._pairs.revoked, spiffes)

    def tick(self) -> None:
        now = time.monotonic()
        if self.on and now - self._reaped >= REAP_EVERY_S:
            self._reaped = now
            self._submit(self._tick, now, {name: worker.pid for name, worker in self._fleet.links.items()})
            if self._loop is not None and not self._reaping:
                self._reaping = True
                self._loop.run_in_executor(None, self._reap)

    def _tick(self, now: float, workers: Mapping[str, int]) -> None:
        self._started = self._started or now
        if self._pairs is not None:
            self._pairs.tick(now)
            if self._ledger:
                self._ledger.keep(Counter(workers[owner] for owner, _ in self._pairs.all if owner in workers))
        if self._former and self.path is not None and now - self._started > FORMER_S:
            for record in self._former:  # nobody's any more, or in the hands of a worker that does not say so
                self.path.forget_record(record)
            self._former = []

    def _reap(self) -> None:
        """On another thread: it waits for every program that runs now."""
        try:
            if self.path is not None:
                self.path.reap()
        except Exception:
            log.exception("bug_in_express")
        finally:
            self._reaping = False

    def _submit(self, call: Callable[..., None], *arguments: object) -> None:
        def work() -> None:
            try:
                call(*arguments)
            except Exception:
                log.exception("bug_in_express")

        self._thread.submit(work)

    # ---- from the workers

    def message(self, worker: str, message: Asked, fds: list[int]) -> None:
        """``fds`` are owned here from now on."""
        match message:
            case link.Pair() | link.Leg():
                self._ask(worker, message, fds)
            case link.Unpair() | link.Unleg() | link.Left():
                self._end(worker, message)
            case link.Leaving(seconds):
                if not seconds and self._pairs is not None and any(owner == worker for owner, _ in list(self._pairs.all)):
                    self._awaits(worker)

    def _ask(self, worker: str, ask: link.Pair | link.Leg, fds: list[int]) -> None:
        refusal = "malformed" if isinstance(ask, link.Leg) and len(fds) != 1 else ""
        if not self.on:
            refusal = "not_ready" if self.why in ("", STARTING) else "off"  # it starts, or has ended
        if refusal or not self._turns.ask(worker):
            close_all(fds)
            self._fleet.tell(worker, _refused(ask, refusal or "busy"))
        elif isinstance(ask, link.Leg):
            self._joining.ask(LegAsked(worker, ask, fds))
        else:
            self._submit(self._pair, worker, ask, fds)

    def _pair(self, worker: str, ask: link.Pair, fds: list[int]) -> None:
        answer = _refused(ask, "failed")
        try:
            if self._pairs is not None and self._programs is not None:
                answer = self._pairs.pair(self._programs, worker, ask, fds)
            else:
                close_all(fds)
        finally:
            self._soon(self._answer, worker, answer)

    def _answer(self, worker: str, answer: Paired | Legged) -> None:
        self._turns.answered(worker)
        self._fleet.tell(worker, answer)

    def _end(self, worker: str, message: link.Unpair | link.Unleg | link.Left) -> None:
        if guilty := self._turns.end(worker):
            self._fleet.drop(guilty, "it ends more than there can be")
        if guilty == worker:
            return
        if isinstance(message, link.Left):
            self._awaits(worker)
        elif isinstance(message, link.Unleg):
            self._give_up(lambda asked: asked.worker == worker and asked.leg.number == message.number)
        self._submit(self._ended, worker, message)

    def _ended(self, worker: str, message: link.Unpair | link.Unleg | link.Left) -> None:
        try:
            match message:
                case link.Unleg(number) if self._legs is not None:
                    self._legs.part(worker, number)
                case link.Unpair(session) if self._pairs is not None:
                    self._pairs.unpair(worker, session)
                case link.Left(session) if self._pairs is not None:
                    self._pairs.orphan(worker, time.monotonic(), session)
                    self._soon(self._seek_heir)
        finally:
            self._soon(self._turns.ended, worker)

    def _join(self, asks: list[LegAsked]) -> None:
        answers = [_refused(asked.leg, "failed") for asked in asks]
        try:
            if self._legs is not None and self._programs is not None:
                answers = [*self._legs.join(self._programs.view, asks)]
            else:
                close_all(fd for asked in asks for fd in asked.fds)
        finally:
            self._soon(self._joined, asks, answers)

    def _joined(self, asks: list[LegAsked], answers: list[Paired | Legged]) -> None:
        for asked, answer in zip(asks, answers, strict=True):
            self._answer(asked.worker, answer)
        self._joining.joined()

    def _give_up(self, whose: Callable[[LegAsked], bool]) -> None:
        for asked in self._joining.give_up(whose):
            close_all(asked.fds)
            self._answer(asked.worker, _refused(asked.leg, "given_up"))

    def _wish(self, worker: str, wish: Paired | Legged) -> None:
        self._soon(self._fleet.tell, worker, wish)

    def _soon(self, call: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _awaits(self, worker: str) -> None:
        self._awaited.add(worker)
        self._came.clear()

    def _seek_heir(self) -> None:
        """Several at once: each look is at all pairs."""
        if self._loop is not None and not self._seeking:
            self._seeking = True
            self._loop.call_later(SEEK_S, self._to_heir)

    def _to_heir(self) -> None:
        self._seeking = False
        if (heir := self._fleet.heir()) is not None:  # else who is equipped next
            self.worker_ready(heir)

    def worker_down(self, worker: str) -> None:
        if self._pairs is not None:
            self._give_up(lambda asked: asked.worker == worker)
            self._submit(self._pairs.orphan, worker, time.monotonic())
        if self._legs is not None:
            self._submit(self._legs.lost, worker)

    def worker_ready(self, worker: str) -> None:
        """Equipped: it may go on with what a former one left."""
        if self._pairs is not None:
            self._submit(self._hand_over, worker)

    def _hand_over(self, worker: str) -> None:
        if self._pairs is not None:
            for message, fds in self._pairs.hand_over(worker):
                try:
                    self._soon(self._fleet.tell, worker, message, duplicates(fds))
                except OSError:  # the worker hears nothing of it, so it is nobody's still
                    self._pairs.orphan(worker, time.monotonic(), message.session)
            self._soon(self._has_come)

    def _has_come(self) -> None:
        self._awaited.clear()
        self._came.set()

    async def handed_over(self) -> None:
        """Before an end by plan: our duplicates are all there is of what a worker has left to the next one."""
        if self._pairs is not None and self._pairs.all:
            await asyncio.sleep(TOLD_S)
        if not self._awaited:
            return
        try:
            async with asyncio.timeout(HAND_OVER_S):
                while self._awaited:
                    await self._came.wait()
            await asyncio.sleep(TOLD_S)
        except TimeoutError:
            log.warning("pairs_not_handed_over", workers=sorted(self._awaited))

    # ---- telling

    def hello(self) -> dict[str, Any]:
        """Fields of mesh.link.Hello; none while it is off."""
        if self.path is None:
            return {}
        layouts = self.path.hello_layouts()
        return {
            "xview_format": layouts["pl_xview"][0],
            "xview_fields": layouts["pl_xview"][1],
            "xarm_format": layouts["pl_xarm"][0],
            "xarm_fields": layouts["pl_xarm"][1],
            "xreasons": self.path.reasons(),
            "express_opt": self.path.option,
        }

    async def status(self) -> dict[str, Any]:
        """What `GET /v1/express` answers."""
        found: dict[str, Any] = await self._run(self._status)
        return found

    def _status(self) -> dict[str, Any]:
        programs = list(self._programs.all.values()) if self._programs else []
        counters = self.path.counters() if self.path else {}
        carried = counters.pop("carried", 0)
        counters.pop("answered", 0)
        legs = {name: counters.pop(name, 0) for name in ("leg", "leg_unread", "leg_long")}
        return {
            "on": self.on,
            "why": self.why,
            "probes": self.probes,
            "programs": [described(program) for program in programs],
            "pairs": len(self._pairs.all) if self._pairs else 0,
            "carried": {"requests": carried, "punted": {name: count for name, count in counters.items() if count}},
            "asked": self._asked(),
            "legs": {"open": len(self._legs.all) if self._legs else 0, "messages": legs},
            "top": top(programs, self.path.stats()) if self.path else [],
        }

    def _asked(self) -> dict[str, int]:
        """What workers asked for, and what became of it."""
        return {**(self._pairs.counts if self._pairs else {}), **(self._legs.counts if self._legs else {})}

    async def metrics(self) -> str:
        """Prometheus text."""
        text: str = await self._run(self._metrics)
        return text

    def _metrics(self) -> str:
        path, pairs = self.path, self._pairs
        programs = list(self._programs.all.values()) if self._programs else []
        stats, counters = (path.stats(), path.counters()) if path else ({}, {})
        return metrics_text(programs, stats, counters, self._asked(), len(pairs.all) if pairs else 0, self.on, self.probes)


def _refused(ask: link.Pair | link.Leg, reason: str) -> Paired | Legged:
    if isinstance(ask, link.Leg):
        return Legged(ask.number, ok=False, reason=reason)
    return Paired(ask.session, ok=False, reason=reason, lasting=reason == "off")
