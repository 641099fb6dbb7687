"""Addresses outside the mesh that are open to a workload because a name it asked for was answered with them. The proxy says
what was answered; who asked, whether its ServiceEntries name that, and which addresses no name opens, is told here. Under the
data path's lock."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from ipaddress import ip_address
from typing import NamedTuple

from mesh.dataplane import NodePlan, rule_number
from mesh.link import Grant
from mesh.outside import GRANT_ADDRESSES_MAX, grant_s, outside
from nodeagent.datapath import PROTOCOLS
from nodeagent.datapath_api import DatapathError
from nodeagent.denied import owners
from nodeagent.layouts import Layouts, address, text_address
from nodeagent.maps import BpfMap
from nodeagent.sockdiag import ANY_STATE, BOTH, Sock, SockDiag

WORKLOAD_GRANTS_MAX = 1024  # (address, port) open to one workload at once
OWN_ADDRESSES_S = 5.0  # how long the node's addresses are remembered
GRANTS_MAX = 30_000  # of the node; each is two entries of the map's 65,536

Reach = tuple[int, str, int]  # protocol number, address, port


class Open(NamedTuple):
    """One thing that is open."""

    workload: int
    address: str  # canonical
    port: int
    protocol: str


def inside(plan: NodePlan) -> frozenset[str]:
    """The addresses of workloads, and of whom the proxy may dial: resolvers."""
    return frozenset(key.address for key in plan.dests) | {dial.address for dial in plan.dials}


def refused(text: str, *taken: Collection[str]) -> bool:
    """Whether no name opens this address: private, local, not canonical, or one of these. Pure."""
    try:
        return not outside(text) or str(ip_address(text)) != text or any(text in each for each in taken)
    except ValueError:
        return True


def asker(
    grant: Grant, plan: NodePlan, diag: Callable[[], SockDiag], lineages: Callable[[], Mapping[int, tuple[int, ...]]]
) -> int | None:
    """The workload that asked, None where it cannot be told. ``diag``: of its netns; ``lineages``: see `denied.owners`."""
    here = {member.workload for member in plan.members.values() if member.netns == grant.netns}
    if len(here) <= 1:
        return next(iter(here), None)
    wanted, owner = (PROTOCOLS.get(grant.transport), grant.client[1]), owners(plan, lineages())
    socks = diag().dump(ANY_STATE, BOTH)
    found = {owner(sock.cgroup) for sock in socks if (sock.protocol, sock.local_port) == wanted}
    member = found.pop() if len(found) == 1 else None  # of two sockets that share a port, either could have asked
    return member.workload if member is not None else None


class Grants:
    """The map `grants`. What is in it is allowed by the plan, always: what the plan no longer names goes first."""

    def __init__(self, clock_ns: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME)) -> None:
        self._clock_ns = clock_ns
        self._open: dict[Open, dict[int, int]] = {}  # rule -> until
        self._count: dict[int, int] = {}  # by workload
        self._netns: dict[int, int] = {}  # of each workload
        self._inside: frozenset[str] = frozenset()
        self._own: Collection[str] = ()
        self._own_at = -(1 << 62)
        self.counts: dict[str, int] = {"granted": 0, "grants_refused": 0}

    def attach(self, table: BpfMap, layouts: Layouts) -> None:
        """Go on with what a former agent left. Raises SchemaMismatch, DatapathError."""
        self._map, self._key, self._value = table, layouts["pl_grant_key"], layouts["pl_grant"]
        table.expect(self._key.size, self._value.size)
        names = {number: name for name, number in PROTOCOLS.items()}
        self._open.clear()
        self._netns.clear()
        for raw, leaf in table.items().items():
            key, value = self._key.unpack(raw), self._value.unpack(leaf)
            if key["workload"] and key["proto"] in names:
                opened = Open(key["workload"], text_address(key["addr"]), key["port"], names[key["proto"]])
                self._open[opened] = {value["rule"]: value["until_ns"]}
        self._recount()

    # ---- what is asked

    def ask(self, grant: Grant, plan: NodePlan, workload: int | None, own: Callable[[], Collection[str]]) -> str:
        """Opens what the plan says of it; the reason where it does not. ``own``: the node's addresses. Raises MapFull,
        DatapathError: nothing is open then that was not asked for."""
        if self._clock_ns() - self._own_at > OWN_ADDRESSES_S * 1e9:
            self._own, self._own_at = own(), self._clock_ns()
        reason = self._ask(grant, plan, workload)
        self.counts["grants_refused" if reason else "granted"] += 1
        return reason

    def _ask(self, grant: Grant, plan: NodePlan, workload: int | None) -> str:
        if workload is None:
            return "unknown_asker"
        ways = [way for way in plan.ways_out.get(workload, ()) if way.names(grant.name)]
        if not ways:
            return "not_named"
        if not grant.addresses or len(grant.addresses) > GRANT_ADDRESSES_MAX or any(
            refused(text, self._inside, self._own) for text in grant.addresses
        ):  # fmt: skip
            return "address"
        wanted = {
            Open(workload, text, port, protocol): rule_number(way.rule)
            for way in ways
            for port, protocol in way.ports
            for text in grant.addresses
        }
        fresh = sum(opened not in self._open for opened in wanted)
        if self._count.get(workload, 0) + fresh > WORKLOAD_GRANTS_MAX or len(self._open) + fresh > GRANTS_MAX:
            return "full"
        until = self._clock_ns() + int(grant_s(grant.ttl_s if grant.ttl_s >= 0 else 0.0) * 1e9)
        for opened, rule in wanted.items():
            if opened not in self._open:
                self._open[opened] = {}
                self._count[workload] = self._count.get(workload, 0) + 1
            known = self._open[opened]
            known[rule] = max(until, known.get(rule, 0))
            self._write(opened)
        return ""

    def allows(self, workload: int, text: str, port: int, protocol: str = "tcp") -> bool:
        """Whether what is open to there may go on."""
        return Open(workload, text, port, protocol) in self._open

    # ---- what ends

    def settle(self, plan: NodePlan) -> None:
        """Closes what this plan does not name. Before its generation is told. Raises DatapathError."""
        self._inside = inside(plan) if plan.ways_out else frozenset()
        places = {member.workload: member.netns for member in plan.members.values()}
        named = {
            (workload, rule_number(way.rule)): way.ports for workload, ways in plan.ways_out.items() for way in ways
        }  # fmt: skip
        for opened, rules in self._open.items():
            for rule in [r for r in rules if (opened.port, opened.protocol) not in named.get((opened.workload, r), ())]:
                del rules[rule]
            if opened.workload not in places or refused(opened.address, self._inside):
                rules.clear()
        self._open = {opened: rules for opened, rules in self._open.items() if rules}
        self._netns = places
        self._recount()
        self._restore()

    def sweep(self, in_use: Callable[[int], Collection[Reach]]) -> int:
        """Forgets what is past its time and has no connection left; how many. ``in_use``: where sockets of a netns lead.
        Raises DatapathError, OSError."""
        now = self._clock_ns()
        past = [opened for opened, rules in self._open.items() if max(rules.values()) <= now]
        used: dict[int, Collection[Reach]] = {}
        gone = 0
        for opened in past:
            netns = self._netns.get(opened.workload)
            if netns is None:
                continue  # no plan has said yet where it lives
            if netns not in used:
                used[netns] = in_use(netns)
            if (PROTOCOLS[opened.protocol], opened.address, opened.port) in used[netns]:
                continue
            del self._open[opened]
            self._write(opened)
            gone += 1
        if past:
            self._recount()
        return gone

    # ---- the map

    def _recount(self) -> None:
        self._count = {}
        for opened in self._open:
            self._count[opened.workload] = self._count.get(opened.workload, 0) + 1

    def _entry(self, opened: Open, workload: int, netns: int) -> bytes:
        proto = PROTOCOLS[opened.protocol]
        return self._key.pack(netns=netns, addr=address(opened.address), workload=workload, port=opened.port, proto=proto)

    def _leaf(self, open_as: Iterable[Open]) -> bytes | None:
        rules = [(until, rule) for opened in open_as for rule, until in self._open.get(opened, {}).items()]
        until, rule = max(rules, default=(0, 0))
        return self._value.pack(until_ns=until, rule=rule) if rules else None

    def _entries(self, opened: Open) -> Mapping[bytes, bytes | None]:
        """Both of the map's for one: the workload's own, and that of all who live beside it."""
        found = {self._entry(opened, opened.workload, 0): self._leaf([opened])}
        netns = self._netns.get(opened.workload)
        if netns:
            beside = [opened._replace(workload=workload) for workload, place in self._netns.items() if place == netns]
            found[self._entry(opened, 0, netns)] = self._leaf(beside)
        return found

    def _write(self, opened: Open) -> None:
        for key, value in self._entries(opened).items():
            if value is None:
                self._map.delete(key)
            else:
                self._map.put(key, value)

    def _restore(self) -> None:
        """The whole map anew: what closes goes first."""
        wanted = {key: value for opened in self._open for key, value in self._entries(opened).items() if value is not None}
        present = self._map.items()
        for key in present.keys() - wanted.keys():
            self._map.delete(key)
        for key, value in wanted.items():
            if present.get(key) != value:
                self._map.put(key, value)


def own_addresses() -> frozenset[str]:
    """Of the netns this runs in: the node's. Raises DatapathError."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            found = (entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS") for entry in route.get_addr())
            return frozenset(text for text in found if text)
    except (NetlinkError, OSError) as error:
        raise DatapathError(f"list the node's addresses: {error}") from error


def leads_to(socks: Iterable[Sock]) -> frozenset[Reach]:
    """Where these sockets are connected to."""
    return frozenset((sock.protocol, sock.remote, sock.remote_port) for sock in socks if sock.remote_port)
