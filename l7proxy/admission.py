"""What a tunnel and a stream from another node must prove before they are served. Pure: the configuration, the
peer's certificate and the request in, an `Admission` or a counted `Refusal` out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from l7proxy.hbone.stream import Headers
from l7proxy.target import Caller
from l7proxy.tls import PeerCertificate, revoked_nodes

if TYPE_CHECKING:
    from l7proxy.config import Config

_FORWARDED = re.compile(r'for="(\[[0-9a-f:.]{2,45}\]|[0-9.]{7,15}):([0-9]{1,5})"')


class Refusal(Exception):
    """A stream that is not served. ``status``: what the other proxy is told."""

    def __init__(self, reason: str, detail: str, status: int = 403) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.status = reason, detail, status


def parse_host_port(text: str, reason: str) -> tuple[str, int]:
    """A literal address and port in their one canonical spelling. Raises Refusal(reason)."""
    host, colon, port_text = text.rpartition(":")
    port = int(port_text) if port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 else 0
    if not colon or not 0 < port < 65536 or str(port) != port_text:
        raise Refusal(reason, f"{text[:80]!r} does not end in a port")
    try:
        if host.startswith("[") and host.endswith("]"):
            v6 = IPv6Address(host[1:-1])
            if v6.ipv4_mapped is not None or v6.scope_id is not None:
                raise Refusal(reason, f"{text[:80]!r} is not canonical")
            address = str(v6)
            same = address == host[1:-1]
        else:
            address = str(IPv4Address(host))
            same = address == host
    except AddressValueError as error:
        raise Refusal(reason, f"{text[:80]!r} is no literal address and port") from error
    if not same:
        raise Refusal(reason, f"{text[:80]!r} is not canonical: {address}")
    return address, port


def parse_forwarded(text: str) -> tuple[str, int]:
    """``for="10.0.0.1:4000"`` or ``for="[fd77::1]:4000"``, one hop, nothing else. Raises Refusal."""
    match = _FORWARDED.fullmatch(text)
    if match is None:
        raise Refusal("forwarded_malformed", f"forwarded: {text[:80]!r}")
    return parse_host_port(f"{match[1]}:{match[2]}", "forwarded_malformed")


@dataclass(frozen=True, slots=True)
class Connect:
    """What a CONNECT asks for."""

    address: str
    port: int
    client: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Admission:
    workload: str  # item key
    port: int
    caller: Caller


def parse_connect(headers: Headers) -> Connect:
    """From the request's fields. Raises Refusal."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in found and name in (b":method", b":authority", b"forwarded"):
            raise Refusal("connect_malformed", f"{name.decode()} comes twice", 400)
        found[name] = value
    if found.get(b":method") != b"CONNECT" or b":protocol" in found:
        raise Refusal("method", "only CONNECT is served here", 405)
    address, port = parse_host_port(found.get(b":authority", b"").decode("latin-1"), "authority_malformed")
    if b"forwarded" not in found:
        raise Refusal("forwarded_missing", "no forwarded field names the application's address")
    return Connect(address, port, parse_forwarded(found[b"forwarded"].decode("latin-1")))


def check_source(config: Config, peer: PeerCertificate, address: str) -> None:
    """The connection must come from an address where the peer's identity is registered, on a node that is not cut."""
    if peer.spiffe not in config.spiffe_id:
        raise Refusal("identity_unknown", f"{peer.spiffe} is not known to this mesh")
    homes = [w for w in config.by_address.get(address, ()) if w.spiffe == peer.spiffe]
    if not homes:
        raise Refusal("peer_address", f"{address} is no address of {peer.spiffe}")
    cut = revoked_nodes(config.revoked)
    if all(w.node in cut for w in homes):
        raise Refusal("node_cut", f"node {homes[0].node} is cut from the mesh")


def admit(config: Config, served: str, listener: str, peer: PeerCertificate, asked: Connect) -> Admission:
    """Whether a stream may reach what it asks for. Pure. Raises Refusal.

    ``served``: the identity whose certificate was shown; ``listener``: the local address the tunnel arrived at.
    """
    here = [w for w in config.by_address.get(asked.address, ()) if f"Workload/{w.namespace}/{w.name}" in config.local]
    if not here:
        raise Refusal("authority_not_local", f"{asked.address} is no workload of this node")
    here = [w for w in here if w.spiffe == served and listener in w.addresses]
    if not here:
        raise Refusal("authority_identity", f"{asked.address} is not {served}, to whom this tunnel was opened")
    workload = next((w for w in here if asked.port in w.ports), None)
    if workload is None:
        raise Refusal("authority_port", f"port {asked.port} of {asked.address} is not declared by a service")
    address, port = asked.client
    homes = [w for w in config.by_address.get(address, ()) if w.spiffe == peer.spiffe]
    if not homes:
        raise Refusal("forwarded_foreign", f"{address} is no address of {peer.spiffe}")
    cut = revoked_nodes(config.revoked)
    if all(w.node in cut for w in homes):
        raise Refusal("node_cut", f"node {homes[0].node} is cut from the mesh")
    home = f"Workload/{homes[0].namespace}/{homes[0].name}"
    caller = Caller(peer.spiffe, config.spiffe_id.get(peer.spiffe, 0), address, port, home if home in config.local else None)
    return Admission(f"Workload/{workload.namespace}/{workload.name}", asked.port, caller)
