"""What one rollout asks of the data path, in the order it promises to be safe in. Runs in the agent's kernel thread."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from mesh import link
from mesh.dataplane import NodePlan, plan_node
from mesh.model import Identity, Service, TlsMode, Workload
from nodeagent import cgroups, optional
from nodeagent import reconcile_events as ev
from nodeagent.blame import Blame
from nodeagent.datapath_api import DatapathApi, DatapathError, Member, OpenListener, Role
from nodeagent.forwarders import families_of
from nodeagent.moves import Moves
from nodeagent.roster import KEPT_OUT, PODS_OFF
from nodeagent.workloads import Spec

log = structlog.get_logger()


@dataclass(slots=True)
class Result:
    """Of one application: what the agent may serve now."""

    digest: str
    listeners: dict[str, OpenListener] = field(default_factory=dict)
    families: dict[int, frozenset[int]] = field(default_factory=dict)  # netns cookie -> socket families
    forward: frozenset[int] = frozenset()  # families of sockets to resolvers outside
    serving: frozenset[str] = frozenset()
    errors: dict[str, str] = field(default_factory=dict)


class KernelWork:
    """Blocking calls, one at a time: the caller owns a thread for them. Netns paths are looked up by their inode, so
    that a workload made anew under an old name is another."""

    def __init__(self, datapath: DatapathApi, node: str, cgroup: Path, proxy_cgroup: Path | None = None) -> None:
        self._datapath, self._node, self._cgroup, self._proxy = datapath, node, cgroup, proxy_cgroup
        self._cookies: dict[str | None, tuple[tuple[int, int], int]] = {}
        self._enrolled: set[tuple[str, int, int]] = set()
        self._guarded: dict[str, tuple[tuple[str, ...], bool]] = {}
        self._open: set[int] = set()  # cookies with listeners
        self._leaving: set[int] = set()  # nobody's any more, but their connections are still to be ended
        self._plan = NodePlan()
        self._groups: dict[str, Path] = {}  # of workloads that are enforced
        self.moves = Moves()
        self.older_ended = 0  # connections that stood before their workload was enrolled

    def start(self) -> dict[str, bool]:
        """Loads the programs. Raises DatapathError."""
        for name in () if self._proxy else ("agent", "proxy", "workloads"):  # else a service manager makes them
            cgroups.create(self._cgroup / name)
        return self._datapath.load()  # the lease a former agent left stays

    # ---- where workloads are

    def place(self, specs: Iterable[Spec]) -> dict[str, ev.Placed]:
        """Cookie and cgroup id of each; never raises."""
        specs = list(specs)
        for netns in self._cookies.keys() - {spec.netns for spec in specs}:
            self._lose(netns)
        return {spec.key: self._place(spec) for spec in specs}

    def _lose(self, netns: str | None) -> None:
        """The path is nobody's any more, or another netns has it; one that is in use goes with the next rollout."""
        known = self._cookies.pop(netns, None)
        if known is not None and known[1] not in self._open | self._leaving:
            self._datapath.forget(known[1])

    def _place(self, spec: Spec) -> ev.Placed:
        try:
            group = cgroups.cgroup_id(Path(spec.cgroup))
        except OSError as error:
            return ev.Placed(spec, error=f"its cgroup {spec.cgroup} is not there: {error.strerror}")
        try:
            cookie = self._cookie(spec.netns)
        except OSError as error:
            return ev.Placed(spec, error=f"its netns {spec.netns or 'of the node'} is not there: {error.strerror}")
        return ev.Placed(spec, cookie, group)

    def _cookie(self, netns: str | None) -> int:
        try:
            stat = Path(netns or "/proc/self/ns/net").stat()
        except OSError:
            self._lose(netns)
            raise
        mark = stat.st_dev, stat.st_ino
        known = self._cookies.get(netns)
        if known is None or known[0] != mark:
            self._lose(netns)
            known = self._cookies[netns] = mark, self._datapath.adopt(Path(netns) if netns else None)
        return known[1]

    # ---- one state

    def apply(self, order: ev.ApplyKernel) -> Result:
        """Raises DatapathError, SnapshotError, ValueError, OSError: the maps' former content is then in force."""
        result = Result("")
        enrolled = self._possible(order.enrolled, result)
        local = [link.LocalWorkload(entry.spec.key, entry.netns, entry.cgroup) for entry in enrolled]
        plan = plan_node(order.state, self._node, local)
        self._datapath.set_members((*self._roles(), *(_member(entry) for entry in enrolled)))
        self._listen(enrolled, result)
        result.forward = families_of(plan.dials)
        self._name(order, plan)
        result.digest = self._datapath.apply(plan, order.generation)
        self._plan = plan
        self._guard(enrolled, result)
        self._enrol(enrolled, result)
        self._forget(enrolled)
        self._groups = {entry.spec.key.removeprefix("Workload/"): Path(entry.spec.cgroup) for entry in enrolled}
        result.serving = frozenset(entry.spec.key for entry in enrolled if entry.spec.key not in result.errors)
        return result

    def _possible(self, enrolled: tuple[ev.Enrolled, ...], result: Result) -> tuple[ev.Enrolled, ...]:
        """Without pods where their packets can not be filtered: nobody's then, so denied everything."""
        why = self._datapath.off().get(optional.PODS)
        if why is None:
            return enrolled
        pods = {entry.spec.key for entry in enrolled if entry.spec.veth is not None}
        result.errors.update(dict.fromkeys(pods, f"{PODS_OFF}: {why}"))
        return tuple(entry for entry in enrolled if entry.spec.key not in pods)

    def _roles(self) -> list[Member]:
        """The agent and the proxy; a cgroup that is not there yet has no members."""
        found = []
        for path, role in ((self._cgroup / "agent", Role.AGENT), (self._proxy or self._cgroup / "proxy", Role.PROXY)):
            try:
                found.append(Member(cgroups.cgroup_id(path), role))
            except OSError:
                continue
        return found

    def _listen(self, enrolled: tuple[ev.Enrolled, ...], result: Result) -> None:
        addresses: dict[int, list[str]] = {}
        for entry in enrolled:
            known = addresses.setdefault(entry.netns, [])
            known += [address for address in entry.item.addresses if address not in known]
        for netns, wanted in addresses.items():
            try:
                opened = self._datapath.open_listeners(netns, wanted)
            except (OSError, KeyError) as error:
                there = [entry for entry in enrolled if entry.netns == netns]
                result.errors.update(dict.fromkeys((entry.spec.key for entry in there), _unheard(error, there)))
                continue
            self._open.add(netns)
            result.listeners.update({listener.frame.id: listener for listener in opened})
            families = {socket.AF_INET6 if ":" in address else socket.AF_INET for address in wanted}
            result.families[netns] = frozenset(int(family) for family in families)

    def _name(self, order: ev.ApplyKernel, plan: NodePlan) -> None:
        items = order.state.values()
        self._datapath.set_names(
            {item.id: item.spiffe for item in items if isinstance(item, Identity)},
            {item.id: key for key, item in order.state.items() if isinstance(item, Workload)},
            {item.id: key for key, item in order.state.items() if isinstance(item, Service)},
            Blame(order.state, plan),
        )
        self._datapath.set_revision(self._node, order.revision)

    def _guard(self, enrolled: tuple[ev.Enrolled, ...], result: Result) -> None:
        wanted = {
            entry.spec.veth: (entry.item.addresses, entry.item.tls is TlsMode.PERMISSIVE)
            for entry in enrolled
            if entry.spec.veth is not None
        }
        for veth in self._guarded.keys() - wanted.keys():
            self._datapath.unguard_veth(veth)
            del self._guarded[veth]
        without = [entry for entry in enrolled if entry.spec.veth is None]
        try:
            self._datapath.set_unguarded(sorted({address for entry in without for address in entry.item.addresses}))
        except (DatapathError, OSError) as error:
            result.errors.update({entry.spec.key: f"pods of this node could not reach it: {error}" for entry in without})
        owners = {entry.spec.veth: entry.spec.key for entry in enrolled}
        for veth, rules in wanted.items():
            if self._guarded.get(veth) == rules:
                continue
            try:
                self._datapath.guard_veth(veth, *rules)
                self._guarded[veth] = rules
            except Exception as error:  # pyroute2's own kinds among them; this workload is told, the others go on
                result.errors.setdefault(owners[veth], f"its interface {veth} cannot be guarded: {error}")

    def _enrol(self, enrolled: tuple[ev.Enrolled, ...], result: Result) -> None:
        """Once for each place: what stood there before is ended."""
        now = {(entry.spec.key, entry.netns, entry.cgroup): entry for entry in enrolled}
        self._enrolled &= now.keys()
        for mark, entry in now.items():
            if mark in self._enrolled or entry.spec.key in result.errors:
                continue
            try:
                report = self._datapath.enrol(entry.netns, Path(entry.spec.cgroup) if entry.spec.netns is None else None)
            except Exception as error:  # it is not ready then, and tried again
                result.errors[entry.spec.key] = f"older sockets cannot be looked at: {error}"
                continue
            if report.survived:
                result.errors[entry.spec.key] = f"older connections cannot be ended: {report.survived[0]}"
                continue
            self._enrolled.add(mark)
            self.older_ended += len(report.destroyed)
            log.info(
                "enrolled",
                workload=entry.spec.key,
                spiffe=entry.item.spiffe,
                destroyed=len(report.destroyed),
                old_listeners=list(report.old_listeners[:8]),
            )

    def _forget(self, enrolled: tuple[ev.Enrolled, ...]) -> None:
        """Netns no workload is in are let go, so that they can be deleted: after `end_denied` has looked into them."""
        kept = {entry.netns for entry in enrolled}
        self._leaving = (self._leaving | self._open) - kept
        self._open &= kept

    def _let_go(self) -> None:
        for cookie in self._leaving:
            self._datapath.forget(cookie)
        self._cookies = {path: known for path, known in self._cookies.items() if known[1] not in self._leaving}
        self._leaving.clear()

    # ---- the rest

    def lease(self, until_ns: int) -> None:
        """Raises DatapathError, OSError."""
        self._datapath.extend_lease(until_ns)

    def leased_until_ns(self) -> int:
        """As the maps have it."""
        return self._datapath.leased_until_ns()

    def end_denied(self) -> int:
        """Raises DatapathError, OSError."""
        ended = self._datapath.end_denied(self._plan)
        self._let_go()
        return ended

    def repair(self) -> tuple[str, int]:
        """(digest of the maps now, entries that were put right). Raises DatapathError, OSError."""
        self._let_go()  # after a rollout that had nothing to end
        self.moves.look(self._groups)
        repaired = self._datapath.repair()
        return self._datapath.observed_digest(), repaired

    def stock(self, netns: int, family: int, count: int) -> list[int]:
        """Raises OSError, KeyError."""
        return self._datapath.make_stock(netns, family, count)


def _member(entry: ev.Enrolled) -> Member:
    permissive = entry.item.tls is TlsMode.PERMISSIVE
    return Member(entry.cgroup, Role.WORKLOAD, entry.item.id, entry.item.identity, entry.netns, permissive)


def _unheard(error: OSError | KeyError, there: list[ev.Enrolled]) -> str:
    """Why the workloads of a netns have no listeners, and what to do."""
    what = (error.strerror if isinstance(error, OSError) else "") or str(error)
    if not isinstance(error, OSError) or error.errno != errno.EADDRINUSE:
        return f"its listeners cannot be opened: {what}"
    netns = next((entry.spec.netns for entry in there if entry.spec.netns), None)
    find = f"nsenter --net={netns} ss -lntup" if netns else "ss -lntup"
    text = KEPT_OUT if all(entry.spec.veth for entry in there) else "its listeners cannot be opened"
    return f"{text}: {what} (`{find}` shows which, end it: the workload is then served by itself)"
