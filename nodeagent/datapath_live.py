"""The data path in the kernel: `Datapath` carries out what `datapath_api.DatapathApi` promises. It decides nothing:
contents and order come from `datapath`, verdicts from the plan. Pinned maps outlive it; a new one reconciles by diff."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from mesh.dataplane import NodePlan
from mesh.link import Flow
from nodeagent import cgroups, counters, takeover, tc
from nodeagent import netns as spaces  # the API's parameters are called netns
from nodeagent.datapath import PLANNED, Codec, Contents, MapOp, check_room, diff, digest, inverse
from nodeagent.datapath_api import DatapathError, EnrolReport, MapFull, Member, OpenListener, Role
from nodeagent.denied import denied, owners
from nodeagent.enrol import enrol
from nodeagent.layouts import Layouts, address
from nodeagent.loading import run_loader, unload
from nodeagent.maps import BpfMap, close_all, open_all
from nodeagent.ring import FlowReader, Names
from nodeagent.sockdiag import OPEN_STATES, SockDiag, destroy_where

T = TypeVar("T")

FILLED = (*PLANNED, "sources", "members", "listeners")  # what the agent writes, besides config
OPENED = (*FILLED, "config", "arriving", "datagrams", "creators", "origins", "conns", "counters", "events")
LEVELS_MAX = 16  # as in bpf/common.h: how far apart level_lo and level_hi may be
LEVELS_BELOW = 4  # how deep below the attached cgroup a member may lie
_KEY0, _ONE, _U64 = struct.pack("=I", 0), struct.pack("=I", 1), struct.Struct("=Q")


class _Place:
    """A netns we hold open."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.fd = spaces.open_netns(path)
        try:
            self.cookie, self.diag = spaces.run_in(self.fd, lambda: (spaces.cookie_here(), SockDiag()))
        except BaseException:
            os.close(self.fd)
            raise

    def run(self, call: Callable[[], T]) -> T:
        return spaces.run_in(self.fd, call)

    def close(self) -> None:
        self.diag.close()
        os.close(self.fd)


class Datapath:
    """See `datapath_api.DatapathApi` for what each call promises.

    ``cgroup``: where programs attach; never the root. ``bpf_dir``: bpffs for pins. ``run_dir``: ordinary directory for
    layouts.json. Programs deny everything until `load` returned and members are set.
    """

    def __init__(self, cgroup: Path, bpf_dir: Path, run_dir: Path) -> None:
        self.cgroup, self.bpf_dir, self.run_dir = cgroup, bpf_dir, run_dir
        self._lock = threading.RLock()
        self._maps: dict[str, BpfMap] = {}
        self._places: dict[int, _Place] = {}
        self._by_path: dict[Path | None, int] = {}
        self._listeners: dict[str, OpenListener] = {}
        self._addresses: dict[int, tuple[str, ...]] = {}
        self._members: tuple[Member, ...] = ()
        self._plan: NodePlan | None = None
        self._desired: Contents = {}
        self._observed: Contents = {}
        self._config: dict[str, int] = {}
        self._names = Names()
        self._reader: FlowReader | None = None
        self._veths: tc.VethGuard | None = None
        self._guarded: dict[str, tuple[tuple[str, ...], bool]] = {}  # by veth: addresses, permissive
        self._cpus = counters.possible_cpus()
        self._own = {"map_ops": 0, "repaired": 0, "map_full": 0, "apply_failed": 0, "connections_ended": 0, "flows_lost": 0}

    # ---- start and end

    def load(self) -> dict[str, bool]:
        cgroups.attachable(self.cgroup)
        if own_cgroup() not in cgroups.lineages(self.cgroup):
            raise DatapathError(
                f"the agent runs outside {self.cgroup}, its sockets would be a stranger's: start it in {self.cgroup}/agent"
            )
        status = run_loader(self.cgroup, self.bpf_dir, self.run_dir / "layouts.json")
        self.open()
        with self._lock:
            if self._veths is not None:
                self._veths.close()
            self._veths = tc.VethGuard(self.bpf_dir, self.run_dir)
            self._veths.sweep()
        return {**status, "veth": True}

    def open(self) -> None:
        """Use what is pinned already. Raises DatapathError, SchemaMismatch."""
        with self._lock:
            self._layouts = Layouts.read(self.run_dir / "layouts.json")
            self._codec = Codec(self._layouts)
            close_all(self._maps)
            self._maps = open_all(self.bpf_dir / "maps", OPENED)
            self._maps["members"].expect(8, self._layouts["pl_member"].size)
            self._maps["dests"].expect(self._layouts["pl_dest_key"].size, self._layouts["pl_dest"].size)
            self._maps["policy"].expect(self._layouts["pl_policy_key"].size, self._layouts["pl_policy"].size)
            self._maps["config"].expect(4, self._layouts["pl_config"].size)
            self._names.reasons = self._layouts.reasons
            self._observed = {name: self._maps[name].items() for name in FILLED}
            found = self._layouts["pl_config"].unpack(self._maps["config"].get(_KEY0) or bytes(self._layouts["pl_config"].size))
            level = cgroups.level(self.cgroup)
            # The agent's own sockets need it to be a member before anything else can be set up
            self._me = Member(own_cgroup(), Role.AGENT)
            self._members = (self._me,)
            self._put("members", self._codec.members(None, self._members))
            self._config = {
                **found,
                "schema": self._layouts.enums["PL_SCHEMA"],
                "level_lo": level + 1,
                "level_hi": level + LEVELS_BELOW,
            }
            self._write_config()
            self._config["host_netns"] = spaces.cookie_here()
            self._write_config()

    def unload(self) -> None:
        """Detach everything and forget the maps: the workloads are then outside any mesh. Not part of a restart."""
        with self._lock:
            unload(self.bpf_dir)

    def close(self) -> None:
        with self._lock:
            if self._reader is not None:
                self._reader.close()
            for listener in self._listeners.values():
                os.close(listener.fd)
            self._listeners.clear()
            for place in self._places.values():
                place.close()
            self._places.clear()
            self._by_path.clear()
            if self._veths is not None:
                self._veths.close()
                self._veths = None
            close_all(self._maps)
            self._maps.clear()

    # ---- network namespaces and sockets

    def adopt(self, netns: Path | None) -> int:
        with self._lock:
            place = _Place(netns)
            known = self._by_path.get(netns)
            if known is not None and known != place.cookie:  # another netns under an old name
                self.forget(known)
            if place.cookie in self._places:
                place.close()
            else:
                self._places[place.cookie] = place
            self._by_path[netns] = place.cookie
            return place.cookie

    def forget(self, netns: int) -> None:
        with self._lock:
            self._by_path = {path: cookie for path, cookie in self._by_path.items() if cookie != netns}
            self._addresses.pop(netns, None)
            if self._maps:
                self._remove("listeners", _U64.pack(netns))
            for key in [key for key, listener in self._listeners.items() if listener.netns == netns]:
                os.close(self._listeners.pop(key).fd)
            place = self._places.pop(netns, None)
            if place is not None:
                place.close()

    def open_listeners(self, netns: int, addresses: Sequence[str], hbone: bool = True) -> list[OpenListener]:
        with self._lock:
            place = self._place(netns)
            wanted = _listeners_of(netns, addresses if hbone else ())
            for key in [k for k, listener in self._listeners.items() if listener.netns == netns and k not in wanted]:
                os.close(self._listeners.pop(key).fd)
            opened = [self._listeners.get(key) or self._listen(place, wanted[key]) for key in wanted]
            self._addresses[netns] = tuple(addresses)
            for veth, (guarded, _) in self._guarded.items():
                if set(guarded) <= set(addresses):
                    self._guard(veth)
            self._put("listeners", {_U64.pack(netns): _ONE})
            if self._plan is not None:
                self._settle({"sources": self._sources(self._plan)})
            return opened

    def _listen(self, place: _Place, wanted: OpenListener) -> OpenListener:
        make = spaces.bind_udp if wanted.kind == "dns-udp" else spaces.listen_tcp
        try:
            fd = place.run(lambda: make(wanted.address, wanted.port)).detach()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # A former agent gave it to the proxy, which still serves it
            taken = takeover.take(place.diag, wanted, self.cgroup / "proxy")
            if taken is None:
                raise
            fd = taken
        listener = OpenListener(wanted.id, wanted.kind, wanted.netns, wanted.address, wanted.port, fd)
        self._listeners[listener.id] = listener
        return listener

    def make_stock(self, netns: int, family: int, count: int) -> list[int]:
        return self._place(netns).run(lambda: spaces.client_sockets(family, count))

    def enrol(self, netns: int, cgroup: Path | None = None) -> EnrolReport:
        with self._lock:
            seen_by = {self._maps[name].id: self._maps[name].fd for name in ("creators", "conns", "origins")}
            return enrol(self._place(netns).diag, seen_by, self.cgroup, cgroup)

    def _place(self, netns: int) -> _Place:
        with self._lock:
            return self._places[netns]

    def guard_veth(self, veth: str, addresses: Sequence[str], permissive: bool = False) -> None:
        with self._lock:
            self._guarded[veth] = (tuple(addresses), permissive)
            self._guard(veth)

    def _guard(self, veth: str) -> None:
        addresses, permissive = self._guarded[veth]
        if self._veths is None:
            raise DatapathError("the programs are not loaded")
        flags = self._layouts.enums["PL_MEMBER_PERMISSIVE"] if permissive else 0
        self._veths.guard(veth, addresses, self._cookie_of(addresses), flags)

    def _cookie_of(self, addresses: Sequence[str]) -> int:
        """The adopted netns these addresses are in; 0 until its listeners are open (no tunnel could start before)."""
        return next((cookie for cookie, known in self._addresses.items() if set(addresses) <= set(known)), 0)

    def unguard_veth(self, veth: str) -> None:
        with self._lock:
            self._guarded.pop(veth, None)
            if self._veths is not None:
                self._veths.unguard(veth)

    # ---- maps

    def set_members(self, members: Iterable[Member]) -> None:
        with self._lock:
            before = {member.cgroup for member in self._members}
            self._members = (self._me, *members)  # whatever is listed, we do not lock ourselves out
            wanted = self._codec.members(self._plan, self._members)
            # A restarted agent has no plan yet: workloads of its former run stay who they were
            for key, value in self._observed["members"].items():
                if self._plan is None and self._codec.is_workload(value) and _U64.unpack(key)[0] not in before:
                    wanted.setdefault(key, value)
            self._settle({"members": wanted})

    def set_names(self, identities: Mapping[int, str], workloads: Mapping[int, str], services: Mapping[int, str] = {}) -> None:
        self._names.identities, self._names.workloads, self._names.services = identities, workloads, services

    def set_revision(self, node: str, revision: int) -> None:
        self._names.node, self._names.revision = node, revision

    def extend_lease(self, seconds: float | None) -> None:
        with self._lock:
            until = 0 if seconds is None else time.clock_gettime_ns(time.CLOCK_BOOTTIME) + int(seconds * 1e9)
            self._config["lease_until_ns"] = until
            self._write_config()

    def apply(self, plan: NodePlan, generation: int) -> str:
        with self._lock:
            try:
                desired = self._codec.fill(plan)
                desired["sources"] = self._sources(plan)
                desired["members"] = self._codec.members(plan, self._members)
                ops = diff(desired, self._observed, self._codec.openness)
                check_room(ops, self._observed, {name: self._maps[name].entries_max for name in desired})
                if self._config["outbound_allow"] and not plan.outbound_allow:  # closing comes first
                    self._config["outbound_allow"] = 0
                    self._write_config()
                self._execute(ops)
            except (DatapathError, ValueError, KeyError) as error:
                self._own["map_full" if isinstance(error, MapFull) else "apply_failed"] += 1
                if self._plan is not None:
                    self._config["outbound_allow"] = int(self._plan.outbound_allow)
                    self._write_config()
                if isinstance(error, DatapathError):
                    raise
                raise DatapathError(f"the plan does not fit the maps' layouts: {error!r}") from error
            self._plan, self._desired = plan, desired
            self._names.rules = plan.rules
            self._config["outbound_allow"] = int(plan.outbound_allow)
            self._config["generation"] = generation
            self._write_config()
            return self.observed_digest()

    def observed_digest(self) -> str:
        with self._lock:
            return digest({name: self._maps[name].items() for name in PLANNED})

    def repair(self) -> int:
        with self._lock:
            self._observed = {name: self._maps[name].items() for name in FILLED}
            wanted = dict(self._desired)
            if self._plan is not None:
                wanted["members"] = self._codec.members(self._plan, self._members)
                wanted["sources"] = self._sources(self._plan)
            wanted["listeners"] = {_U64.pack(listener.netns): _ONE for listener in self._listeners.values()}
            ops = diff(wanted, self._observed, self._codec.openness)
            self._execute(ops)
            found = len(ops)
            if self._maps["config"].get(_KEY0) != self._layouts["pl_config"].pack(**self._config):
                self._write_config()
                found += 1
            self._own["repaired"] += found
            return found

    def _sources(self, plan: NodePlan) -> dict[bytes, bytes]:
        """What a server shall see of a workload whose socket has a loopback address: the workload's own."""
        layout, found = self._layouts["pl_source"], {}
        for member in plan.members.values():
            known = self._addresses.get(member.netns, ())
            v4 = next((address(text) for text in known if ":" not in text), bytes(16))
            v6 = next((address(text) for text in known if ":" in text), bytes(16))
            if known:
                found[struct.pack("=I", member.workload)] = layout.pack(v4=v4, v6=v6)
        return found

    def _settle(self, wanted: Contents) -> None:
        """Make single maps, apart from a plan, hold this."""
        ops = diff(wanted, self._observed, self._codec.openness)
        check_room(ops, self._observed, {name: self._maps[name].entries_max for name in wanted})
        self._execute(ops)
        for name, content in wanted.items():
            if name in self._desired:
                self._desired[name] = content

    def _put(self, name: str, entries: Mapping[bytes, bytes]) -> None:
        self._execute([MapOp(name, key, value) for key, value in entries.items() if self._observed[name].get(key) != value])

    def _remove(self, name: str, key: bytes) -> None:
        if key in self._observed.get(name, {}):
            self._execute([MapOp(name, key, None)])

    def _execute(self, ops: Sequence[MapOp]) -> None:
        """In order, neighbours of one map together. On failure what was done is undone, and the error raised."""
        done = 0
        try:
            for run in _runs(ops):
                done += len(run)
                bpf_map = self._maps[run[0].map]
                if run[0].value is None:
                    for op in run:
                        bpf_map.delete(op.key)
                else:
                    bpf_map.put_many([(op.key, op.value) for op in run if op.value is not None])
        except DatapathError:
            for op in inverse(ops[:done], self._observed):
                if op.value is None:
                    self._maps[op.map].delete(op.key)
                else:
                    self._maps[op.map].put(op.key, op.value)
            raise
        for op in ops:
            if op.value is None:
                self._observed[op.map].pop(op.key, None)
            else:
                self._observed[op.map][op.key] = op.value
        self._own["map_ops"] += len(ops)

    def _write_config(self) -> None:
        self._maps["config"].put(_KEY0, self._layouts["pl_config"].pack(**self._config))

    # ---- connections

    def end_denied(self, plan: NodePlan) -> int:
        with self._lock:
            conns = self._maps["conns"]
            lineages = cgroups.lineages(self.cgroup)
            trusted = {member.cgroup for member in self._members if member.role != Role.WORKLOAD}
            refuse = denied(
                plan,
                self._layouts,
                conns.id,
                owners(plan, lineages),
                lambda cgroup: not trusted.isdisjoint(lineages.get(cgroup, (cgroup,))),
            )
            ended = 0
            for place in list(self._places.values()):
                ended += len(destroy_where(place.diag, place.diag.dump(OPEN_STATES, storage_fds=(conns.fd,)), refuse))
            self._own["connections_ended"] += ended
            return ended

    # ---- telling

    async def flows(self) -> AsyncIterator[Flow]:
        with self._lock:
            if self._reader is None:
                self._reader = FlowReader(self._maps["events"].fd, self._layouts["pl_event"], self._names)
            reader = self._reader
        async for flow in reader.flows():
            yield flow

    def metrics_text(self) -> str:
        with self._lock:
            if self._reader is not None:
                self._own["flows_lost"] = self._reader.lost
            counts = counters.read(self._maps["counters"], self._layouts.reasons, self._cpus)
            full = {name: (len(self._observed[name]), self._maps[name].entries_max) for name in FILLED}
            full |= counters.occupancy(self._maps[name] for name in ("arriving", "datagrams"))
            return counters.text(counts, full, self._own)

    def hello_layouts(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        return {name: (self._layouts[name].format, self._layouts[name].fields) for name in ("pl_origin", "pl_caller")}


def own_cgroup() -> int:
    """Id of the cgroup this process is in."""
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return cgroups.cgroup_id(cgroups.mount() / line[3:].lstrip("/"))


def _listeners_of(cookie: int, addresses: Sequence[str]) -> dict[str, OpenListener]:
    """What a netns needs, not open yet (fd -1), by id."""
    where = [(kind, at, port) for at in ("127.0.0.1", "::1") for kind, port in _LOOPBACK]
    where += [("hbone", at, spaces.PORT_HBONE) for at in addresses]
    return {
        f"{cookie}/{kind}/{at}": OpenListener(f"{cookie}/{kind}/{at}", kind, cookie, at, port, -1) for kind, at, port in where
    }


_LOOPBACK = (("outbound", spaces.PORT_OUTBOUND), ("dns-udp", spaces.PORT_DNS), ("dns-tcp", spaces.PORT_DNS))


def _runs(ops: Sequence[MapOp]) -> Iterable[list[MapOp]]:
    """Neighbours of the same map and kind."""
    run: list[MapOp] = []
    for op in ops:
        if run and (op.map, op.value is None) != (run[0].map, run[0].value is None):
            yield run
            run = []
        run.append(op)
    if run:
        yield run
