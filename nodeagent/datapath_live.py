"""The data path in the kernel: `Datapath` carries out what `datapath_api.DatapathApi` promises. It decides nothing:
contents and order come from `datapath`, verdicts from the plan. Pinned maps outlive it; a new one reconciles by diff."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mesh.dataplane import NodePlan
from mesh.link import Flow, Grant
from nodeagent import cgroups, counters, optional
from nodeagent import netns as spaces  # the API's parameters are called netns
from nodeagent.datapath import FORMER_AGENTS_KEPT, PLANNED, Codec, Contents, digest, former_agents
from nodeagent.datapath_api import DatapathError, DeniedBy, EnrolReport, MapFull, Member, OpenListener, Role
from nodeagent.denied import denied, owners
from nodeagent.enrol import enrol
from nodeagent.express_path import ExpressPath
from nodeagent.grants import Grants, Reach, asker, leads_to, own_addresses
from nodeagent.layouts import Layouts, address
from nodeagent.loading import run_loader, unload
from nodeagent.map_set import MapSet
from nodeagent.places import Place, Places
from nodeagent.pods import Pods
from nodeagent.ring import FlowReader, Names
from nodeagent.sockdiag import ANY_STATE, BOTH, OPEN_STATES, destroy_where

LEVELS_BELOW = 4  # how deep below the attached cgroup a member may lie
_KEY0, _ONE, _U64 = struct.pack("=I", 0), struct.pack("=I", 1), struct.Struct("=Q")


class Datapath:
    """See `datapath_api.DatapathApi` for what each call promises.

    ``cgroup``: where programs attach; never the root. ``bpf_dir``: bpffs for pins. ``run_dir``: ordinary directory for
    layouts.json. Programs deny everything until `load` returned and members are set.
    """

    def __init__(self, cgroup: Path, bpf_dir: Path, run_dir: Path, proxy_cgroup: Path | None = None) -> None:
        self.cgroup, self.bpf_dir, self.run_dir = cgroup, bpf_dir, run_dir
        self._lock = threading.RLock()
        self._maps = MapSet()
        self._places = Places(proxy_cgroup or cgroup / "proxy")
        self._members: tuple[Member, ...] = ()
        self._agents: tuple[int, ...] = ()  # cgroups: our own, then those of former agents
        self._plan: NodePlan | None = None
        self._desired: Contents = {}
        self._config: dict[str, int] = {}
        self._names = Names()
        self._reader: FlowReader | None = None
        self._grants = Grants()
        self._pods = Pods(bpf_dir, run_dir, self._places.whose)
        self._ending_off = ""  # why connections can not be ended here
        self._cpus = counters.possible_cpus()
        self._own = {"map_ops": 0, "repaired": 0, "map_full": 0, "apply_failed": 0, "connections_ended": 0, "flows_lost": 0}

    # ---- start and end

    def load(self) -> dict[str, bool]:
        cgroups.attachable(self.cgroup)
        if cgroups.own_cgroup() not in cgroups.lineages(self.cgroup):
            raise DatapathError(
                f"the agent runs outside {self.cgroup}, its sockets would be a stranger's: start it in a cgroup below"
            )
        status = run_loader(self.cgroup, self.bpf_dir, self.run_dir / "layouts.json")
        self.open()
        with self._lock:
            self._pods.load(self._layouts.enums["PL_MEMBER_PERMISSIVE"])
            self._ending_off = optional.ending()
            return {**status, **({"veth": True} if self._pods.on else {})}

    def off(self) -> dict[str, str]:
        parts = {optional.PODS: self._pods.why, optional.ENDING: self._ending_off}
        return {part: why for part, why in parts.items() if why}

    def open(self) -> None:
        """Use what is pinned already. Raises DatapathError, SchemaMismatch."""
        with self._lock:
            self._layouts = Layouts.read(self.run_dir / "layouts.json")
            self._codec = Codec(self._layouts)
            self._maps.open(self.bpf_dir / "maps", self._layouts, self._codec.openness)
            self._grants.attach(self._maps["grants"], self._layouts)
            self._names.reasons = self._layouts.reasons
            found = self._layouts["pl_config"].unpack(self._maps["config"].get(_KEY0) or bytes(self._layouts["pl_config"].size))
            level = cgroups.level(self.cgroup)
            # The agent's own sockets need it to be a member before anything else can be set up; by the cgroup that outlives it,
            # and by its very own: that one's id is on its sockets when it is gone
            own = (cgroups.cgroup_id(cgroups.agent_path()), cgroups.own_cgroup())
            known = self._codec.agents(self._maps.observed["members"])
            self._agents = (*dict.fromkeys(own), *former_agents(known, own, cgroups.lineages(self.cgroup)))
            self._members = self._agent_members()
            self._maps.put("members", self._codec.members(None, self._members))
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
            self._places.close()
            self._pods.close()
            self._maps.close()

    # ---- network namespaces and sockets

    def adopt(self, netns: Path | None) -> int:
        with self._lock:
            place = Place(netns)
            known = self._places.at(netns)
            if known is not None and known != place.cookie:  # another netns under an old name
                self.forget(known)
            return self._places.keep(place)

    def forget(self, netns: int) -> None:
        with self._lock:
            if self._maps:
                self._maps.remove("listeners", _U64.pack(netns))
            self._places.forget(netns)

    def open_listeners(self, netns: int, addresses: Sequence[str], hbone: bool = True) -> list[OpenListener]:
        with self._lock:
            opened = self._places.open_listeners(netns, addresses, hbone)
            self._pods.opened(addresses)
            self._maps.put("listeners", {_U64.pack(netns): _ONE})
            if self._plan is not None:
                self._settle({"sources": self._sources(self._plan)})
            return opened

    def make_stock(self, netns: int, family: int, count: int) -> list[int]:
        held = self.netns_fd(netns)
        try:
            return spaces.run_in(held, lambda: spaces.client_sockets(family, count))
        finally:
            os.close(held)

    def enrol(self, netns: int, cgroup: Path | None = None) -> EnrolReport:
        with self._lock:
            seen_by = {self._maps[name].id: self._maps[name].fd for name in ("conns", "origins")}
            return enrol(self._place(netns).diag, seen_by, frozenset(cgroups.lineages(self.cgroup)).union(self._agents), cgroup)

    def _place(self, netns: int) -> Place:
        with self._lock:
            return self._places[netns]

    def guard_veth(self, veth: str, addresses: Sequence[str], permissive: bool = False) -> None:
        with self._lock:
            self._pods.guard(veth, addresses, permissive)

    def set_unguarded(self, addresses: Sequence[str]) -> None:
        with self._lock:
            self._pods.set_unguarded(addresses)

    def unguard_veth(self, veth: str) -> None:
        with self._lock:
            self._pods.unguard(veth)

    # ---- express

    def express(self) -> ExpressPath:
        return ExpressPath(self.bpf_dir, self.run_dir)

    def origin(self, sock: socket.socket) -> dict[str, Any] | None:
        layout, enums = self._layouts["pl_origin"], self._layouts.enums
        try:
            raw = sock.getsockopt(enums["PL_LEVEL"], enums["PL_OPT_ORIGIN"], layout.size)
        except OSError:
            return None
        return layout.unpack(raw) if len(raw) == layout.size else None

    def netns_fd(self, netns: int) -> int:
        with self._lock:
            return os.dup(self._places[netns].fd)

    # ---- maps

    def set_members(self, members: Iterable[Member]) -> None:
        with self._lock:
            before = {member.cgroup for member in self._members}
            self._members = (*self._agent_members(), *members)  # whatever is listed, we do not lock ourselves out
            wanted = self._codec.members(self._plan, self._members)
            # A restarted agent has no plan yet: workloads of its former run stay who they were
            for key, value in self._maps.observed["members"].items():
                if self._plan is None and self._codec.is_workload(value) and _U64.unpack(key)[0] not in before:
                    wanted.setdefault(key, value)
            self._settle({"members": wanted})

    def set_names(
        self,
        identities: Mapping[int, str],
        workloads: Mapping[int, str],
        services: Mapping[int, str] = {},
        denied_by: DeniedBy | None = None,
    ) -> None:
        self._names.identities, self._names.workloads, self._names.services = identities, workloads, services
        if denied_by is not None:
            self._names.denied_by = denied_by

    def set_revision(self, node: str, revision: int) -> None:
        self._names.node, self._names.revision = node, revision

    def extend_lease(self, until_ns: int) -> None:
        with self._lock:
            self._config["lease_until_ns"] = until_ns
            self._write_config()

    def leased_until_ns(self) -> int:
        with self._lock:
            return int(self._config["lease_until_ns"])

    def apply(self, plan: NodePlan, generation: int) -> str:
        with self._lock:
            try:
                desired = self._codec.fill(plan, self._config["host_netns"])
                desired["sources"] = self._sources(plan)
                desired["members"] = self._codec.members(plan, self._members)
                ops = self._maps.difference(desired)
                self._maps.check_room(ops)
                if self._config["outbound_allow"] and not plan.outbound_allow:  # closing comes first
                    self._config["outbound_allow"] = 0
                    self._write_config()
                self._grants.settle(plan)
                self._maps.execute(ops)
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
            self._config["connects_max"] = plan.connects_max
            self._config["generation"] = generation
            self._write_config()
            return self.observed_digest()

    def observed_digest(self) -> str:
        with self._lock:
            return digest({name: self._maps[name].items() for name in PLANNED})

    def repair(self) -> int:
        with self._lock:
            self._maps.observe()
            wanted = dict(self._desired)
            if self._plan is not None:
                wanted["members"] = self._codec.members(self._plan, self._members)
                wanted["sources"] = self._sources(self._plan)
            wanted["listeners"] = {_U64.pack(cookie): _ONE for cookie in self._places.listening()}
            ops = self._maps.difference(wanted)
            self._maps.execute(ops)
            found = len(ops)
            self._grants.sweep(self._reached_from)
            if self._maps["config"].get(_KEY0) != self._layouts["pl_config"].pack(**self._config):
                self._write_config()
                found += 1
            found += self._pods.mend()
            self._own["repaired"] += found
            return found

    def _reached_from(self, netns: int) -> frozenset[Reach]:
        """Where connections of a netns lead; nowhere, once it is let go."""
        place = self._places.get(netns)
        return leads_to(place.diag.dump(OPEN_STATES, BOTH)) if place is not None else frozenset()

    def _sources(self, plan: NodePlan) -> dict[bytes, bytes]:
        """What a server shall see of a workload whose socket has a loopback address: the workload's own."""
        layout, found = self._layouts["pl_source"], {}
        for member in plan.members.values():
            known = self._places.addresses.get(member.netns, ())
            v4 = next((address(text) for text in known if ":" not in text), bytes(16))
            v6 = next((address(text) for text in known if ":" in text), bytes(16))
            if known:
                found[struct.pack("=I", member.workload)] = layout.pack(v4=v4, v6=v6)
        return found

    def _settle(self, wanted: Contents) -> None:
        """Make single maps, apart from a plan, hold this."""
        ops = self._maps.difference(wanted)
        self._maps.check_room(ops)
        self._maps.execute(ops)
        for name, content in wanted.items():
            if name in self._desired:
                self._desired[name] = content

    def _write_config(self) -> None:
        self._maps["config"].put(_KEY0, self._layouts["pl_config"].pack(**self._config))

    # ---- connections

    def grant(self, asked: Grant) -> str:
        with self._lock:
            if (plan := self._plan) is None:
                return "not_ready"
            who = asker(asked, plan, lambda: self._place(asked.netns).diag, lambda: cgroups.lineages(self.cgroup))
            return self._grants.ask(asked, plan, who, own_addresses)

    def end_denied(self, plan: NodePlan) -> int:
        with self._lock:
            if self._ending_off:
                return 0
            conns = self._maps["conns"]
            lineages = cgroups.lineages(self.cgroup)
            trusted = {member.cgroup for member in self._members if member.role != Role.WORKLOAD}
            refuse = denied(
                plan,
                self._layouts,
                conns.id,
                owners(plan, lineages),
                lambda cgroup: not trusted.isdisjoint(lineages.get(cgroup, (cgroup,))),
                self._grants.allows,
            )
            ended = 0
            for place in self._places:
                ended += len(destroy_where(place.diag, place.diag.dump(OPEN_STATES, storage_fds=(conns.fd,)), refuse))
            self._own["connections_ended"] += ended
            self._forget_agents()
            return ended

    def _agent_members(self) -> tuple[Member, ...]:
        return tuple(Member(each, Role.AGENT) for each in self._agents)

    def _forget_agents(self) -> None:
        """Those of whom no socket is left, once there are many."""
        if len(self._agents) <= FORMER_AGENTS_KEPT:
            return
        used = {sock.cgroup for place in self._places for sock in place.diag.dump(ANY_STATE, BOTH)}
        kept = (*self._agents[-FORMER_AGENTS_KEPT // 2 :], cgroups.own_cgroup(), cgroups.cgroup_id(cgroups.agent_path()))
        gone = [each for each in self._agents if each not in used and each not in kept]
        self._agents = tuple(each for each in self._agents if each not in gone)
        self._members = tuple(member for member in self._members if member.cgroup not in gone)
        self._settle({"members": self._codec.members(self._plan, self._members)})

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
            self._own["map_ops"] = self._maps.ops_done
            if self._reader is not None:
                self._own["flows_lost"] = self._reader.lost
            self._own |= self._grants.counts
            counts = counters.read(self._maps["counters"], self._layouts.reasons, self._cpus)
            full = self._maps.used() | counters.occupancy(self._maps[name] for name in ("arriving", "datagrams", "grants"))
            return counters.text(counts, full, self._own)

    def hello_layouts(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        return {name: (self._layouts[name].format, self._layouts[name].fields) for name in ("pl_origin", "pl_caller")}
