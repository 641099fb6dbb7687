"""From a plan to map contents and from contents to operations. Pure: bytes in, bytes out; `datapath_live` executes.

Which op comes first matters, since programs read the maps while we write: what closes goes before what opens, a
backend before the destination that names it, a verdict before the destination that needs it, the generation last.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Container, Iterable, Mapping
from ipaddress import ip_network
from typing import NamedTuple

from mesh.dataplane import NODE_NETNS, DestKind, KernelVerdict, NodePlan, PolicyKey
from mesh.model import EGRESS_PORTS_MAX
from nodeagent.datapath_api import MapFull, Member, Role
from nodeagent.layouts import Layouts, address

Content = dict[bytes, bytes]
Contents = dict[str, Content]  # by map name

PLANNED = ("dests", "backends", "policy", "egress", "dials")  # the maps a plan fills, nobody else writes them
PROTOCOLS = {"tcp": 6, "udp": 17}
FORMER_AGENTS_MAX = 1024  # in members, of its 16384; past FORMER_AGENTS_KEPT those without a socket are forgotten
FORMER_AGENTS_KEPT = 64
_EGRESS_PORTS = struct.Struct(f"={EGRESS_PORTS_MAX}H")


class MapOp(NamedTuple):
    """One write; ``value`` None deletes."""

    map: str
    key: bytes
    value: bytes | None


class Codec:
    """Turns plans into bytes by the compiled layouts."""

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        enums = layouts.enums
        self._kinds = {
            DestKind.NATIVE: enums["PL_DEST_NATIVE"],
            DestKind.PROXY: enums["PL_DEST_PROXY"],
            DestKind.DENY: enums["PL_DEST_DENY"],
        }
        self._verdicts = {KernelVerdict.ALLOW: enums["PL_ALLOW"], KernelVerdict.L7: enums["PL_L7"]}
        self._roles = {
            Role.WORKLOAD: enums["PL_ROLE_WORKLOAD"],
            Role.AGENT: enums["PL_ROLE_AGENT"],
            Role.PROXY: enums["PL_ROLE_PROXY"],
        }
        # How open an entry leaves its key, no entry being 0
        self._open_dest = {enums["PL_DEST_DENY"]: 1, enums["PL_DEST_PROXY"]: 2, enums["PL_DEST_NATIVE"]: 3}
        self._open_policy = {enums["PL_DENY"]: 1, enums["PL_L7"]: 2, enums["PL_ALLOW"]: 3}

    def fill(self, plan: NodePlan, host_netns: int = 0) -> Contents:
        """What the planned maps must hold. ``host_netns``: cookie of the node's own. Raises ValueError for an address or
        range that is none."""
        return {
            "dests": dict(self._dests(plan)),
            "backends": dict(self._backends(plan)),
            "policy": dict(self._policy(plan)),
            "egress": dict(self._egress(plan)),
            "dials": dict(self._dials(plan, host_netns)),
        }

    def _dests(self, plan: NodePlan) -> Iterable[tuple[bytes, bytes]]:
        key_of, value_of = self.layouts["pl_dest_key"], self.layouts["pl_dest"]
        reasons = {reason: number for number, reason in enumerate(self.layouts.reasons)}
        for key, dest in plan.dests.items():
            yield (
                key_of.pack(addr=address(key.address), port=key.port, proto=PROTOCOLS[key.protocol]),
                value_of.pack(
                    kind=self._kinds[dest.kind],
                    service=dest.service,
                    backends=dest.backends,
                    reason=reasons[dest.reason] if dest.reason else 0,
                ),
            )

    def _backends(self, plan: NodePlan) -> Iterable[tuple[bytes, bytes]]:
        key_of, value_of = self.layouts["pl_backend_key"], self.layouts["pl_backend"]
        for key, entry in plan.backends.items():
            yield (
                key_of.pack(service=key.group, port=key.port, slot=key.slot),
                value_of.pack(addr=address(entry.address), workload=entry.workload, port=entry.port),
            )

    def _policy(self, plan: NodePlan) -> Iterable[tuple[bytes, bytes]]:
        value_of = self.layouts["pl_policy"]
        for key, entry in plan.policy.items():
            yield self.policy_key(key), value_of.pack(verdict=self._verdicts[entry.verdict], rule=entry.rule)

    def policy_key(self, key: PolicyKey) -> bytes:
        """The key under which a verdict is filed."""
        return self.layouts["pl_policy_key"].pack(
            workload=key.workload, identity=key.identity, port=key.port, proto=PROTOCOLS[key.protocol]
        )

    def _egress(self, plan: NodePlan) -> Iterable[tuple[bytes, bytes]]:
        key_of, value_of = self.layouts["pl_egress_key"], self.layouts["pl_egress"]
        for cidr, egress in plan.egress.items():
            network = ip_network(cidr)
            length = network.prefixlen + (96 if network.version == 4 else 0)
            ports = egress.ports + (0,) * (EGRESS_PORTS_MAX - len(egress.ports))
            yield (
                key_of.pack(prefixlen=length, addr=address(str(network.network_address))),
                value_of.pack(allow=int(egress.allow), nports=len(egress.ports), ports=_EGRESS_PORTS.pack(*ports)),
            )

    def _dials(self, plan: NodePlan, host_netns: int) -> Iterable[tuple[bytes, bytes]]:
        key_of = self.layouts["pl_dial_key"]
        for dial in plan.dials:
            netns = host_netns if dial.netns == NODE_NETNS else dial.netns
            yield key_of.pack(netns=netns, addr=address(dial.address), port=dial.port), DIAL_VALUE

    def members(self, plan: NodePlan | None, listed: Iterable[Member]) -> Content:
        """Who is who: the plan's workloads, and what was listed besides (agent, proxy)."""
        permissive, no_express = self.layouts.enums["PL_MEMBER_PERMISSIVE"], self.layouts.enums["PL_MEMBER_NO_EXPRESS"]
        layout = self.layouts["pl_member"]
        found: Content = {}
        slow = set()
        for member in listed:
            if not member.express:
                slow.add(member.cgroup)
            found[struct.pack("=Q", member.cgroup)] = layout.pack(
                role=self._roles[member.role],
                flags=(permissive if member.permissive else 0) | (0 if member.express else no_express),
                workload=member.workload,
                identity=member.identity,
                netns=member.netns,
            )
        for cgroup, entry in (plan.members if plan is not None else {}).items():
            found[struct.pack("=Q", cgroup)] = layout.pack(
                role=self._roles[Role.WORKLOAD],
                flags=(permissive if entry.permissive else 0) | (no_express if cgroup in slow else 0),
                workload=entry.workload,
                identity=entry.identity,
                netns=entry.netns,
            )
        return found

    def is_workload(self, member: bytes) -> bool:
        """Whether a members entry is a workload's."""
        return bool(self.layouts["pl_member"].unpack(member)["role"] == self._roles[Role.WORKLOAD])

    def agents(self, content: Content) -> list[int]:
        """The cgroups that are an agent's by what the map members holds."""
        layout, agent = self.layouts["pl_member"], self._roles[Role.AGENT]
        return [struct.unpack("=Q", key)[0] for key, value in content.items() if layout.unpack(value)["role"] == agent]

    def openness(self, name: str, value: bytes | None) -> int:
        """How much an entry lets pass, to compare entries of one key; 0 for none."""
        if value is None:
            return 0
        if name == "dests":
            return self._open_dest.get(self.layouts["pl_dest"].unpack(value)["kind"], 0)
        if name == "policy":
            return self._open_policy.get(self.layouts["pl_policy"].unpack(value)["verdict"], 0)
        return 1


DIAL_VALUE = struct.pack("=I", 1)


def former_agents(known: Iterable[int], own: Container[int], living: Container[int]) -> tuple[int, ...]:
    """Cgroups of agents that ran here before: the proxy has listeners, connections and fresh sockets of theirs, and a socket
    keeps the cgroup it was made in. Pure.

    ``known``: what the pinned map has, so they are trusted for as long as the programs stand, and no longer than the kernel
    runs. That lets nobody new in: a cgroup that was removed can not be entered, so no socket is made in it any more, and
    its id is never another's (64 bits, counted up by the kernel; the low half may come round, the high half then moves).
    One that still lives is left out: who is in there now is not known.
    """
    former = sorted(each for each in known if each not in own and each not in living)
    if len(former) > FORMER_AGENTS_MAX:  # the oldest made the listeners, the newest may have made sockets since
        former = former[: FORMER_AGENTS_MAX // 2] + former[-FORMER_AGENTS_MAX // 2 :]
    return tuple(former)


# Stages of an apply. A destination's removal is not a closing: the address then is outside the mesh.
_PUT_STAGE = {"backends": 2, "policy": 3, "egress": 4, "dials": 4, "dests": 5}
_DELETE_STAGE = {"policy": 0, "egress": 0, "dials": 1, "dests": 6, "backends": 7}
_CLOSING_STAGE = 0


def diff(desired: Contents, observed: Contents, openness: Callable[[str, bytes | None], int]) -> list[MapOp]:
    """The writes that turn ``observed`` into ``desired``, in the safe order. Maps that ``desired`` lacks are left alone."""
    staged: list[tuple[int, MapOp]] = []
    for name, wanted in desired.items():
        present = observed.get(name, {})
        for key, value in wanted.items():
            before = present.get(key)
            if before == value:
                continue
            closing = before is not None and openness(name, value) < openness(name, before)
            staged.append((_CLOSING_STAGE if closing else _PUT_STAGE.get(name, 4), MapOp(name, key, value)))
        staged += [(_DELETE_STAGE.get(name, 1), MapOp(name, key, None)) for key in present if key not in wanted]
    staged.sort(key=lambda entry: entry[0])  # stable: the plan's order within a stage
    return [op for _, op in staged]


def inverse(ops: Iterable[MapOp], observed: Contents) -> list[MapOp]:
    """What undoes these ops, given what was there before: what was opened last is closed first."""
    return [MapOp(op.map, op.key, observed.get(op.map, {}).get(op.key)) for op in reversed(list(ops))]


def check_room(ops: Iterable[MapOp], observed: Contents, entries_max: Mapping[str, int]) -> None:
    """Raises MapFull if, at any moment of carrying out ``ops``, a map would hold more than it can."""
    used = {name: len(content) for name, content in observed.items()}
    for op in ops:
        present = op.key in observed.get(op.map, {})
        if op.value is None:
            used[op.map] = used.get(op.map, 0) - int(present)
        elif not present:
            used[op.map] = used.get(op.map, 0) + 1
            if used[op.map] > entries_max.get(op.map, 1 << 62):
                raise MapFull(
                    f"map {op.map} has room for {entries_max[op.map]} entries, the plan needs more: the former policy stays in "
                    "force; reduce what this node's workloads can reach or build with a larger map"
                )


def digest(contents: Contents) -> str:
    """Equal contents, equal digest (hex), whatever the order."""
    total = hashlib.sha256()
    for name in sorted(contents):
        total.update(f"{name}:{len(contents[name])};".encode())
        for key in sorted(contents[name]):
            total.update(key)
            total.update(contents[name][key])
    return total.hexdigest()
