"""Which open connections a plan denies. The programs ask the same of each packet after a new generation
(`reconsider` in bpf/packet.h); an idle connection has no packets, so the agent asks here and ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from mesh.dataplane import Egress, KernelVerdict, Member, NodePlan, PolicyKey
from nodeagent.layouts import Layouts, text_address
from nodeagent.sockdiag import Sock


class EgressTable:
    """The plan's egress ranges; the longest that holds the address decides."""

    def __init__(self, plan: NodePlan) -> None:
        self._otherwise = plan.outbound_allow
        ranges: list[tuple[IPv4Network | IPv6Network, Egress]] = [
            (ip_network(cidr), egress) for cidr, egress in plan.egress.items()
        ]
        self._ranges = sorted(ranges, key=lambda entry: -entry[0].prefixlen)

    def allows(self, address: str, port: int) -> bool:
        """Whether a workload may reach this address outside the mesh."""
        parsed = ip_address(address)
        for network, egress in self._ranges:
            if parsed.version == network.version and parsed in network:
                return egress.allow and (not egress.ports or port in egress.ports)
        return self._otherwise


def denied(
    plan: NodePlan,
    layouts: Layouts,
    conns_id: int,
    owner_of: Callable[[int], Member | None],
    trusted: Callable[[int], bool],
    granted: Callable[[int, str, int], bool] = lambda _workload, _address, _port: False,
) -> Callable[[Sock], bool]:
    """A predicate for sockets dumped with the storage of ``conns`` (map id ``conns_id``).

    ``owner_of``: cgroup id -> the plan's workload it belongs to, None for nobody's; ``trusted``: whether it is the agent's
    or the proxy's; ``granted``: whether a name opens this address and port to a workload. Captured and proxied connections
    the proxy judges itself, but for a plain denial.
    """
    conn_of, enums = layouts["pl_conn"], layouts.enums
    native, proxy, local = enums["PL_ARRIVAL_NATIVE"], enums["PL_ARRIVAL_PROXY"], enums["PL_ARRIVAL_LOCAL"]
    captured, outbound, outside = enums["PL_ARRIVAL_CAPTURED"], enums["PL_CONN_OUTBOUND"], enums["PL_CONN_OUTSIDE"]
    server_flag = enums["PL_CONN_SERVER"]
    egress = EgressTable(plan)

    def doomed(sock: Sock) -> bool:
        stored = sock.storage.get(conns_id)
        if stored is None or trusted(sock.cgroup):
            return False
        conn = conn_of.unpack(stored)
        kind, server = conn["kind"], bool(conn["flags"] & server_flag)
        if kind not in (native, proxy, local, captured, outbound, outside):
            return False
        owner = owner_of(sock.cgroup)
        if owner is None:
            return True  # its workload is no more
        if not server and conn["identity"] != owner.identity:
            return True
        if kind == outbound:
            peer = text_address(conn["peer"]), conn["peer_port"]
            return not egress.allows(*peer) and not granted(owner.workload, *peer)
        if kind == captured or (kind == local and not server):
            return False
        workload = owner.workload if server else conn["workload"]
        if kind == local and conn["workload"] == owner.workload:
            return False
        entry = plan.policy.get(PolicyKey(workload, conn["identity"], conn["port"], "tcp"))
        if entry is None:
            return True
        if kind == outside and not owner.permissive:
            return True
        return kind != proxy and entry.verdict is not KernelVerdict.ALLOW

    return doomed


def owners(plan: NodePlan, lineages: Mapping[int, tuple[int, ...]]) -> Callable[[int], Member | None]:
    """cgroup id -> the plan's workload. ``lineages``: cgroup id -> ids from itself upwards."""

    def owner_of(cgroup: int) -> Member | None:
        return next((plan.members[above] for above in lineages.get(cgroup, (cgroup,)) if above in plan.members), None)

    return owner_of
