"""Who is called what, which addresses they have and how they reach each other. Pure: data in, `ip` batch lines out.

The bridge lives in a namespace of its own, so the host sees no new link, route or address::

    pl-<lab>-net   br0 10.77.0.2 fd77::2 (the controller)
        | eth0 of each node
    pl-<lab>-n1    10.77.0.11 fd77::11, routes 10.77.1.0/24 and fd77:1::/64 to its workloads
        | pod10 … eth0
    pl-<lab>-n1-web-1   10.77.1.10 fd77:1::10
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

RUN_ROOT = Path("/run/pillion/lab")
NETNS_ROOT = Path("/run/netns")
LAB_NAME = re.compile(r"[a-z][a-z0-9]{0,11}")  # no dash: "pl-<lab>-" can then be no other lab's prefix
NODE_NAME = re.compile(r"n([1-9][0-9]?)")
WORKLOAD_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
NODES_MAX = 99
WORKLOADS_PER_NODE_MAX = 240
FIRST_POD = 10

CONTROLLER_ADDRESSES = ("10.77.0.2", "fd77::2")

# Spoofed sources must meet the agent's own filters, not rp_filter; addresses are ours alone, so no duplicate detection.
SYSCTLS_COMMON = {
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/all/accept_ra": "0",
    "net/ipv6/conf/default/accept_ra": "0",
}
SYSCTLS_ROUTER = SYSCTLS_COMMON | {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}


class PlanError(ValueError):
    """A name the lab cannot use; the message says which names it can."""


def check_lab_name(name: str) -> str:
    if not LAB_NAME.fullmatch(name):
        raise PlanError(f"lab name {name!r}: use up to 12 of a-z 0-9, a letter first")
    return name


def check_workload_name(name: str) -> str:
    if not WORKLOAD_NAME.fullmatch(name):
        raise PlanError(f"workload name {name!r}: use up to 40 of a-z 0-9 and dashes inside")
    return name


def node_index(name: str) -> int:
    match = NODE_NAME.fullmatch(name)
    if match is None:
        raise PlanError(f"node name {name!r}: nodes of a lab are n1 to n{NODES_MAX}")
    return int(match[1])


def node_names(count: int) -> tuple[str, ...]:
    if not 1 <= count <= NODES_MAX:
        raise PlanError(f"{count} nodes: a lab has 1 to {NODES_MAX}")
    return tuple(f"n{index}" for index in range(1, count + 1))


@dataclass(frozen=True)
class NodePlan:
    """One node: a router between the bridge and its workloads."""

    lab: str
    name: str

    @property
    def index(self) -> int:
        return node_index(self.name)

    @property
    def netns(self) -> str:
        return f"pl-{self.lab}-{self.name}"

    @property
    def addresses(self) -> tuple[str, str]:
        return f"10.77.0.{10 + self.index}", f"fd77::{10 + self.index}"

    @property
    def pod_networks(self) -> tuple[str, str]:
        return f"10.77.{self.index}.0/24", f"fd77:{self.index}::/64"

    @property
    def gateways(self) -> tuple[str, str]:
        """What workloads route through; each host-side veth carries them."""
        return f"10.77.{self.index}.1", f"fd77:{self.index}::1"

    def uplink(self, others: Iterable[NodePlan]) -> list[str]:
        """Lines for the node's namespace: its address on the bridge and the way to the other nodes' workloads."""
        v4, v6 = self.addresses
        lines = [
            "link set lo up",
            f"addr add {v4}/24 dev eth0",
            f"addr add {v6}/64 dev eth0 nodad",
            "link set eth0 up",
            f"route add unreachable {self.pod_networks[0]}",
            f"route add unreachable {self.pod_networks[1]}",
        ]
        for other in others:
            if other.name != self.name:
                lines += [f"route add {net} via {via}" for net, via in zip(other.pod_networks, other.addresses, strict=True)]
        return lines


@dataclass(frozen=True)
class PodPlan:
    """One workload's namespace and its cable to the node."""

    node: NodePlan
    name: str
    index: int  # the last part of its addresses, unique on the node while it lives

    @property
    def netns(self) -> str:
        return f"{self.node.netns}-{self.name}"

    @property
    def netns_path(self) -> Path:
        return NETNS_ROOT / self.netns

    @property
    def veth(self) -> str:
        return f"pod{self.index}"

    @property
    def addresses(self) -> tuple[str, str]:
        return f"10.77.{self.node.index}.{self.index}", f"fd77:{self.node.index}::{self.index}"

    def on_node(self) -> list[str]:
        """Lines for the node's namespace: make the cable, own the gateway addresses, route to the workload."""
        gw4, gw6 = self.node.gateways
        v4, v6 = self.addresses
        n4, n6 = self.node.addresses
        return [
            f"link add {self.veth} type veth peer name eth0 netns {self.netns}",
            f"addr add {gw4}/32 dev {self.veth}",
            f"addr add {gw6}/128 dev {self.veth} nodad",
            f"link set {self.veth} up",
            f"route add {v4}/32 dev {self.veth} src {n4}",
            f"route add {v6}/128 dev {self.veth} src {n6}",
        ]

    def inside(self) -> list[str]:
        """Lines for the workload's own namespace."""
        gw4, gw6 = self.node.gateways
        v4, v6 = self.addresses
        return [
            "link set lo up",
            f"addr add {v4}/32 dev eth0",
            f"addr add {v6}/128 dev eth0 nodad",
            "link set eth0 up",
            f"route add {gw4}/32 dev eth0",
            f"route add default via {gw4} dev eth0 src {v4}",
            f"route add {gw6}/128 dev eth0",
            f"route add default via {gw6} dev eth0 src {v6}",
        ]


@dataclass(frozen=True)
class LabPlan:
    """The whole lab by name; nothing here touches the machine."""

    name: str
    nodes: tuple[NodePlan, ...]

    @classmethod
    def of(cls, name: str, nodes: Iterable[str]) -> LabPlan:
        return cls(check_lab_name(name), tuple(NodePlan(name, node) for node in nodes))

    @property
    def prefix(self) -> str:
        """Every namespace of this lab starts so, and no other lab's does."""
        return f"pl-{self.name}-"

    @property
    def netns(self) -> str:
        return f"{self.prefix}net"

    def bridge(self) -> list[str]:
        """Lines for the bridge's namespace, where the controller runs as well."""
        v4, v6 = CONTROLLER_ADDRESSES
        lines = [
            "link set lo up",
            "link add br0 type bridge mcast_snooping 0",
            f"addr add {v4}/24 dev br0",
            f"addr add {v6}/64 dev br0 nodad",
            "link set br0 up",
        ]
        for node in self.nodes:
            lines += [
                f"link add {node.name} type veth peer name eth0 netns {node.netns}",
                f"link set {node.name} master br0 up",
            ]
        return lines

    def bridge_routes(self) -> list[str]:
        """After the nodes are up: the way from the bridge's namespace to the workloads."""
        return [
            f"route add {net} via {via}"
            for node in self.nodes
            for net, via in zip(node.pod_networks, node.addresses, strict=True)
        ]


@dataclass(frozen=True)
class Paths:
    """Where a lab keeps its files; all under one directory that `down` removes."""

    name: str

    @property
    def base(self) -> Path:
        return RUN_ROOT / self.name

    @property
    def state_file(self) -> Path:
        return self.base / "state.json"

    @property
    def logs(self) -> Path:
        return self.base / "logs"

    @property
    def pids(self) -> Path:
        return self.base / "pids"

    @property
    def controller_state(self) -> Path:
        return self.base / "controller" / "state"

    @property
    def controller_run(self) -> Path:
        return self.base / "controller" / "run"

    @property
    def controller_socket(self) -> Path:
        return self.controller_run / "controller.sock"

    def node(self, node: str) -> Path:
        return self.base / node

    def agent_state(self, node: str) -> Path:
        return self.node(node) / "state"

    def agent_run(self, node: str) -> Path:
        return self.node(node) / "run"

    def agent_socket(self, node: str) -> Path:
        return self.agent_run(node) / "agent.sock"

    def workloads_file(self, node: str) -> Path:
        return self.node(node) / "workloads.yaml"

    def join_token(self, node: str) -> Path:
        return self.node(node) / "join-token"

    def workload(self, workload: str) -> Path:
        return self.base / "w" / workload


def free_index(taken: Iterable[int]) -> int:
    """The lowest pod index not in use on a node."""
    used = set(taken)
    for index in range(FIRST_POD, FIRST_POD + WORKLOADS_PER_NODE_MAX):
        if index not in used:
            return index
    raise PlanError(f"a lab node holds at most {WORKLOADS_PER_NODE_MAX} workloads; remove one first")


def resolv_conf(namespace: str) -> str:
    """Any server will do: the mesh answers port 53 whatever the address. One is needed, or libc asks ::1."""
    return f"nameserver 127.0.0.53\nsearch {namespace}.mesh mesh\noptions timeout:2 attempts:2\n"
