"""What is outside the mesh: which ports a range of addresses opens, which addresses a name may lead to, and which names an
identity may reach. Pure; the proxy asks before it forwards a question, the agent before it opens an address."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from mesh.identity import IdentityError, SpiffeId
from mesh.matching import IpNetwork, is_for, matches_pattern
from mesh.model import CONFIG_KEY, VIP4, VIP6, Config, ServiceEntry, State

# How long an address stays open after its name was answered: the record's own TTL and a little, within these
GRANT_S_MIN = 30.0
GRANT_S_MAX = 3600.0
GRANT_GRACE_S = 10.0  # from the answer to the connect() it was for
GRANT_ADDRESSES_MAX = 16  # of one answer

# Python's is_global takes for public what is not: a carrier's addresses, a protocol's own, and of IPv6 all that nobody has
# assigned yet, among it site-local addresses, IPv4 written as ::a.b.c.d, and whatever prefix a NAT64 of one's own has
_LOCAL4 = (ip_network("100.64.0.0/10"), ip_network("192.0.0.0/24"))
_UNICAST6 = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")


def outside(address: str) -> bool:
    """Whether an answer for a name outside the mesh may carry this address: nothing private, local, or ours. Raises
    ValueError for no address."""
    ip: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(ip, IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            ip = inner
        elif ip in _NAT64:
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
    if any(ip in net for net in (VIP4, VIP6) if net.version == ip.version):
        return False
    if any(ip in net for net in _LOCAL4) if ip.version == 4 else ip not in _UNICAST6:
        return False
    return ip.is_global and not ip.is_multicast


def open_ports(ranges: Iterable[tuple[str, Iterable[int]]]) -> dict[IpNetwork, frozenset[int] | None]:
    """What each range opens, of (CIDR, ports), no ports being every port: the longest range decides in the kernel, so each opens
    what the wider ones around it open as well. None: every port. Raises ValueError."""
    own: dict[IpNetwork, frozenset[int] | None] = {}
    for cidr, ports in ranges:
        network, named = ip_network(cidr, strict=False), frozenset(ports)
        before = own.get(network, frozenset())
        own[network] = before | named if named and before is not None else None
    lengths = {(network.version, network.prefixlen) for network in own}
    found = {}
    for inner, total in own.items():
        shorter = (bits for version, bits in lengths if version == inner.version and bits < inner.prefixlen)
        for bits in shorter:
            more = own.get(inner.supernet(new_prefix=bits), frozenset())
            total = None if more is None or total is None else total | more
        found[inner] = total
    return found


def grant_s(ttl_s: float) -> float:
    """For how long an answer of this TTL opens its addresses."""
    return min(max(ttl_s + GRANT_GRACE_S, GRANT_S_MIN), GRANT_S_MAX)


@dataclass(frozen=True, slots=True)
class WayOut:
    """One host of a ServiceEntry, and what it opens."""

    rule: str  # "shop/api#api.example.com"
    host: str  # a name or ``*.suffix``
    ports: tuple[tuple[int, str], ...]  # (port, "tcp" or "udp")

    def names(self, name: str) -> bool:
        """``name``: lower case, without the last dot."""
        return matches_pattern(self.host, name)


class WaysOut:
    """The ServiceEntries of one State, by identity."""

    def __init__(self, state: State) -> None:
        config = state.get(CONFIG_KEY)
        self._root = config.root_namespace if isinstance(config, Config) else ""
        found = (item for item in state.values() if isinstance(item, ServiceEntry))
        self._entries = sorted(found, key=lambda entry: (entry.namespace, entry.name))
        self._known: dict[str, tuple[WayOut, ...]] = {}

    def of(self, spiffe: str) -> tuple[WayOut, ...]:
        """What this identity may reach by name."""
        if not self._entries:
            return ()
        found = self._known.get(spiffe)
        if found is None:
            found = self._known[spiffe] = tuple(self._make(spiffe))
        return found

    def open_to(self, spiffe: str, name: str) -> bool:
        """Whether the identity may ask for, and reach, this name."""
        return any(way.names(name) for way in self.of(spiffe))

    def __bool__(self) -> bool:
        return bool(self._entries)

    def _make(self, spiffe: str) -> Iterable[WayOut]:
        try:
            who = SpiffeId.parse(spiffe)
        except IdentityError:
            return
        for entry in self._entries:
            if is_for(who, entry.namespace, entry.principals, self._root):
                for host in entry.hosts:
                    yield WayOut(f"{entry.namespace}/{entry.name}#{host}", host, entry.ports)
