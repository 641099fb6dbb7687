"""The agent as a whole: carries out the core's commands and turns what comes of them into its events.

Blocking work has threads of its own: one for the data path, so that its calls keep their order; others for files.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import structlog

from mesh import link, snapshot
from mesh.model import CONFIG_KEY, Config
from nodeagent import optional
from nodeagent import reconcile_events as ev
from nodeagent.datapath_api import DatapathApi, DatapathError
from nodeagent.express import Express
from nodeagent.files import many_descriptors
from nodeagent.flows import FlowRing, of_worker
from nodeagent.grant_desk import GrantDesk
from nodeagent.kernel_work import KernelWork, Result
from nodeagent.lease import Lease
from nodeagent.local_workloads import LocalWorkloads
from nodeagent.membership import Membership
from nodeagent.options import Options
from nodeagent.proxy_link import ProxyFleet
from nodeagent.reconcile import Reconciler
from nodeagent.state_store import StateCorrupt, StateStore
from nodeagent.svid import Held, SvidDirectory, Svids
from nodeagent.workloads import Spec

log = structlog.get_logger()
T = TypeVar("T")

TICK_S = 0.5
LOAD_RETRY_S = 5.0
STOCKING_MAX = 64  # requests for sockets at once


class Agent:
    """`run` serves until `stop`. What the local API needs is public."""

    def __init__(self, options: Options, datapath: DatapathApi) -> None:
        self.options = options
        self.core = Reconciler(options.node)
        self.ring = FlowRing()
        self.counts = {"bugs": 0, "state_corrupt": 0, "stock_failed": 0}
        self.workloads = LocalWorkloads(options)
        self.membership = Membership(options, self.workloads, self.post, lambda: self.core.resume)
        self.svids = Svids(SvidDirectory(options.state_dir / "svids"), self.membership.sign, self._svid_held, self._svid_gone)
        self.fleet = ProxyFleet(options.proxy_dir, self._hello, self)
        self.express = Express(datapath, self.fleet, wanted=options.express, ledger=options.run_dir / "pairs.json")
        self.express_asked, self.worker_equipped = self.express.message, self.express.worker_ready
        kernel = self._in_kernel_thread
        self.grant_asked = GrantDesk(self.fleet, lambda grant: kernel(datapath.grant, grant), self._spawn).asked
        self.load_error = ""
        self.lease = Lease()
        self._datapath = datapath
        self.work = KernelWork(datapath, options.node, options.cgroup, options.proxy_cgroup)
        self._store = StateStore(options.state_dir)
        self._kernel_thread = ThreadPoolExecutor(1, thread_name_prefix="kernel")
        self._events: deque[ev.Event] = deque()
        self._handling = False
        self._loaded = False
        self._stocking = 0
        self._leased_ns = -1
        self._waiters: set[asyncio.Event] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._execute: dict[type, Callable[[Any], None]] = {
            ev.Send: lambda command: self.membership.send(command.message),
            ev.Reconnect: lambda _: self.membership.reconnect(),
            ev.Register: lambda command: self._spawn(self.membership.register(command.spec)),
            ev.Unregister: lambda command: self._spawn(self.membership.unregister(command.key)),
            ev.ApplyKernel: lambda command: self._spawn(self._apply(command)),
            ev.EndDenied: lambda command: self._spawn(self._end_denied(command)),
            ev.Persist: lambda command: self._spawn(self._persist(command)),
            ev.Repair: lambda _: self._spawn(self._repair()),
            ev.UpdateWorker: self._update_worker,
            ev.EquipWorker: lambda command: self.fleet.equip(command.worker),
            ev.DropWorker: self._do_drop,
            ev.WantSvids: lambda command: self.svids.want(command.spiffes),
            ev.Revoke: lambda command: self.express.revoked(self.svids.revoke(command.serials)),
            ev.TrustRoots: lambda command: self.membership.trust(command.roots),
        }

    # ---- life

    async def run(self) -> None:
        """Serves until `stop` is called; the programs in the kernel carry on afterwards."""
        many_descriptors()
        self.core.roster.stale |= self.workloads.load()
        await asyncio.to_thread(self._restore)
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("kernel", self._start_kernel()),
                ("controller", self.membership.follow()),
                ("ticks", self._tick_for_ever()),
                ("stop", self._stopping.wait()),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.get_name() != "stop":
                    task.result()  # a bug: say which, and leave; the supervisor starts another agent
        finally:
            for task in (*tasks, *self._tasks):
                task.cancel()
            await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
            await self.svids.close()
            await self.membership.close()
            await self.express.close()
            await asyncio.get_running_loop().run_in_executor(self._kernel_thread, self._datapath.close)
            self._kernel_thread.shutdown()

    def stop(self) -> None:
        self._stopping.set()

    def _restore(self) -> None:
        try:
            found = self._store.restore(self.options.node)
        except StateCorrupt as error:
            self.counts["state_corrupt"] += 1
            log.error("state_refused", path=str(self._store.path), reason=str(error), remedy="the controller sends it again")
            return
        if found is not None:
            state, generation, written = found
            self.lease.restored(written)
            log.info("state_restored", revision=state.revision, items=len(state.state))
            self._events.append(ev.Restored(state, generation))

    async def _start_kernel(self) -> None:
        while True:
            try:
                programs = await self._in_kernel_thread(self.work.start)
                self.lease.granted(await self._in_kernel_thread(self.work.leased_until_ns))
                break
            except Exception as error:  # an older kernel, another Pillion's pins, no privilege: told until it is mended
                self.load_error = str(error) or type(error).__name__
                log.error("programs_not_loaded", error=self.load_error)
                await asyncio.sleep(LOAD_RETRY_S)
        self.load_error, self._loaded = "", True
        log.info("programs_loaded", programs=programs)
        await self.express.start()
        await self._refresh()  # the first rollout must know them all: who is missing in it is denied
        self.post(ev.Started(programs))
        self._spawn(self._kernel_flows())
        await self.fleet.run()

    async def _kernel_flows(self) -> None:
        async for flow in self._datapath.flows():
            self.ring.add(flow)

    async def _tick_for_ever(self) -> None:
        while True:
            await self._refresh()
            for key in self.workloads.ended():
                await self.remove_workload(key)
            self.post(ev.Tick())
            self._renew_lease()
            self.express.tick()
            await asyncio.sleep(TICK_S)

    def _renew_lease(self) -> None:
        """The kernel and every worker may let in new connections for as long as the policy is not too old."""
        if not self.core.kernel_error:
            self.lease.heard(self.membership.heard_at)
        config = self.core.enforced.state.get(CONFIG_KEY)
        if not self.core.programs or not isinstance(config, Config):
            return
        until = self.lease.until_ns(config.policy_lease_s)
        self.fleet.lease(until)
        if until != self._leased_ns:
            self._leased_ns = until
            self._spawn(self._in_kernel_thread(self.work.lease, until))

    def lease_s(self) -> float:
        """The operator's limit in force; 0: none."""
        config = self.core.enforced.state.get(CONFIG_KEY)
        return config.policy_lease_s if isinstance(config, Config) else 0.0

    # ---- events and commands

    def post(self, event: ev.Event) -> None:
        """From the loop only. Commands are carried out in order, also those of events that commands cause."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                commands: list[ev.Command] = []
                try:
                    commands = self.core.handle(self._events.popleft(), time.monotonic())
                except Exception:
                    self.counts["bugs"] += 1
                    log.exception("bug_in_reconcile")
                for command in commands:
                    try:
                        self._execute[type(command)](command)
                    except Exception:
                        self.counts["bugs"] += 1
                        log.exception("bug_in_command", command=type(command).__name__)
        finally:
            self._handling = False
        for waiter in self._waiters:
            waiter.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until the condition, looked at after every event, holds; False after the timeout."""
        waiter = asyncio.Event()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    waiter.clear()
                    await waiter.wait()
        except TimeoutError:
            return condition()
        finally:
            self._waiters.discard(waiter)
        return True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._stopping.is_set():
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.counts["bugs"] += 1
            log.error("bug_in_task", exc_info=task.exception())

    async def _in_kernel_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._kernel_thread, call, *arguments)

    async def kernel_answers(self) -> None:
        """Returns when the kernel thread has done what it was asked before: a hung one never does."""
        await self._in_kernel_thread(int)

    async def _apply(self, order: ev.ApplyKernel) -> None:
        started = time.monotonic()
        try:
            result: Result = await self._in_kernel_thread(self.work.apply, order)
        except Exception as error:  # whatever it is, the former state is in force and the next try may do better
            expected = isinstance(error, (DatapathError, snapshot.SnapshotError, OSError))
            log.error("kernel_refused", revision=order.revision, error=str(error), exc_info=not expected)
            self.post(ev.KernelFailed(order.token, str(error) or type(error).__name__))
            return
        self.fleet.listeners, self.fleet.netns = result.listeners, result.families
        self.fleet.forward = result.forward
        ms, many = round((time.monotonic() - started) * 1e3, 1), len(order.enrolled)
        log.info("applied", revision=order.revision, generation=order.generation, workloads=many, errors=result.errors, ms=ms)
        local = (link.LocalWorkload(entry.spec.key, entry.netns, entry.cgroup) for entry in order.enrolled)
        self.express.state(order.state, order.generation, local)
        self.post(ev.KernelApplied(order.token, result.digest, result.serving, result.errors))

    async def _end_denied(self, command: ev.EndDenied) -> None:
        try:
            ended = await self._in_kernel_thread(self.work.end_denied)
        except Exception as error:  # told to the controller; tried again
            log.error("connections_not_ended", error=str(error))
            self.post(ev.Ended(command.token, 0, f"denied connections could not be ended: {error}"))
            return
        if ended:
            log.info("connections_ended", count=ended)
        self.post(ev.Ended(command.token, ended))

    async def _persist(self, command: ev.Persist) -> None:
        try:
            await asyncio.to_thread(self._store.keep, self.options.node, command.state, command.generation)
        except OSError as error:
            log.error("state_not_kept", error=str(error))
            self.post(ev.Persisted(command.token, str(error)))
            return
        self.post(ev.Persisted(command.token))

    async def _repair(self) -> None:
        try:
            digest, repaired = await self._in_kernel_thread(self.work.repair)
        except Exception as error:  # told in the readiness; tried again
            log.error("repair_failed", error=str(error))
            self.post(ev.Observed("", 0, str(error) or type(error).__name__))
            return
        if repaired:
            log.warning("maps_repaired", entries=repaired)
        self.post(ev.Observed(digest, repaired))

    def _update_worker(self, command: ev.UpdateWorker) -> None:
        self._renew_lease()  # a state that sets a limit must not find a worker without a lease
        self.fleet.update(command.worker, command.update)

    def _do_drop(self, command: ev.DropWorker) -> None:
        log.warning("worker_dropped", worker=command.worker, reason=command.reason)
        self.fleet.drop(command.worker, command.reason)

    # ---- workloads

    async def _refresh(self) -> None:
        """Look where every workload is, and tell the core if something moved."""
        if not self._loaded:
            return  # nothing can be placed before the data path is there
        changed = await self.workloads.refresh(lambda specs: self._in_kernel_thread(self.work.place, specs))
        if changed is not None:
            self.post(changed)

    async def add_workload(self, spec: Spec) -> None:
        """One of the API. Raises WorkloadsError when it does not go with the others."""
        await self.workloads.add(spec)
        await self._refresh()
        self.post(ev.Tick())

    async def remove_workload(self, key: str) -> bool:
        """Whether there was one of the API under this key."""
        found = await self.workloads.remove(key)
        if found:
            await self._refresh()
            self.post(ev.Tick())
        return found

    # ---- certificates

    def _svid_held(self, held: Held) -> None:
        self.fleet.svids[held.spiffe] = held
        self._svids_changed()

    def _svid_gone(self, spiffe: str) -> None:
        self.fleet.svids.pop(spiffe, None)
        self._svids_changed()

    def _svids_changed(self) -> None:
        self.post(ev.SvidsChanged(frozenset(self.svids.held), dict(self.svids.errors)))

    # ---- the proxy (FleetHandler)

    def _hello(self) -> link.Hello:
        layouts = self._datapath.hello_layouts()
        return link.Hello(self.options.node, *layouts["pl_origin"], *layouts["pl_caller"], **self.express.hello())

    def worker_up(self, worker: str) -> None:
        self.post(ev.WorkerUp(worker))

    def worker_leaving(self, worker: str) -> None:
        self.post(ev.WorkerLeaving(worker))

    def worker_down(self, worker: str, gone: bool) -> None:
        self.express.worker_down(worker)
        self.post(ev.WorkerDown(worker, gone))

    def worker_acked(self, worker: str, revision: int, digest: str) -> None:
        self.post(ev.WorkerAcked(worker, revision, digest))

    def worker_refused(self, worker: str, revision: int, error: str) -> None:
        log.warning("worker_refused_state", worker=worker, revision=revision, error=error)
        self.post(ev.WorkerRefused(worker, revision, error))

    def flow(self, flow: link.Flow) -> None:
        self.ring.add(of_worker(flow, self.options.node, time.time()))

    def stock_wanted(self, worker: str, netns: int, family: int, count: int) -> None:
        if self._stocking >= STOCKING_MAX:
            self.counts["stock_failed"] += 1  # the worker asks again
            return
        self._stocking += 1
        self._spawn(self._stock(worker, netns, family, count))

    async def _stock(self, worker: str, netns: int, family: int, count: int) -> None:
        try:
            fds = await asyncio.to_thread(self.work.stock, netns, family, count)
        except (OSError, KeyError) as error:  # its netns went, or this process is out of descriptors
            self.counts["stock_failed"] += 1
            log.warning("no_stock", netns=netns, error=str(error))
            return
        finally:
            self._stocking -= 1
        self.fleet.stock(worker, netns, family, fds)

    # ---- for the metrics

    def off(self) -> dict[str, str]:  # what the kernel of this node lacks, and why
        return optional.off(self._datapath, self.express.why)

    def kernel_metrics(self) -> str:
        return self._datapath.metrics_text() if self.core.programs else ""
