"""DNS, sans-IO: what a query for the mesh's names is answered with, what may be forwarded, and which upstream answers
are believed. Bytes in, bytes out; never raises on what a network sent.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from dns.rdtypes.IN.A import A
from dns.rdtypes.IN.AAAA import AAAA
from dns.rdtypes.svcbbase import ParamKey, SVCBBase

from mesh.matching import any_pattern
from mesh.model import DnsForward, Protocol, Service
from mesh.outside import WaysOut, outside

# The confined proxy may not be able to read a file of the library any more (an installation below /root is enough)
dns.rdata.load_all_types()  # type: ignore[no-untyped-call]  # the library types it not

ZONE = "mesh"
TTL_S = 60
NEGATIVE_TTL_S = 5  # a service just applied should be found soon
UDP_BYTES_MAX = 1232  # no fragments, whatever the client offers
UDP_BYTES_MIN = 512
MESSAGE_BYTES_MAX = 65535
QUERY_BYTES_MAX = 1024
CACHE_ENTRIES_MAX = 4096

_IN = dns.rdataclass.IN
_ZONE = dns.name.from_text(f"{ZONE}.")
_SOA = dns.rdata.from_text(_IN, dns.rdatatype.SOA, f"ns.mesh. pillion.mesh. 1 60 60 60 {NEGATIVE_TTL_S}")


@dataclass(frozen=True, slots=True)
class Forward:
    """Not ours to answer, and allowed to be asked. ``name``: lower case, without the last dot."""

    query: dns.message.Message
    name: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Not ours to answer, and not to be asked by these askers."""

    reply: bytes
    name: str


Answer = bytes | Forward | Refused | None  # None: no query at all, say nothing
Askers = tuple[str, ...]  # SPIFFE URIs of all that could have asked: more than one where a netns has several identities


class Names:
    """One configuration's names. ``services``: "web.shop" -> Service; ``forward``, ``ways_out``: what may be asked outside."""

    def __init__(
        self, services: Mapping[str, Service], forward: tuple[DnsForward, ...] = (), ways_out: WaysOut | None = None
    ) -> None:
        self._services, self._ways_out = services, ways_out or WaysOut({})
        self._namespaces = {service.namespace for service in services.values()}
        self._forward = [(tuple(name.rstrip(".").lower() for name in rule.names), rule.principals) for rule in forward]
        self._cache: dict[tuple[bytes, bool, Askers], bytes | Refused] = {}  # of an answer no askers: it is anybody's

    def answer(self, wire: bytes, *, tcp: bool = False, askers: Askers = ()) -> Answer:
        """The reply to one query. Asking again costs a look-up."""
        cached = self._cache.get((wire[2:], tcp, ())) or self._cache.get((wire[2:], tcp, askers))
        if isinstance(cached, bytes):
            return wire[:2] + cached
        if cached is not None:
            return Refused(wire[:2] + cached.reply, cached.name)
        reply = self._answer(wire, tcp, askers)
        if len(wire) <= QUERY_BYTES_MAX:
            if isinstance(reply, bytes):
                self._keep((wire[2:], tcp, ()), reply[2:])
            elif isinstance(reply, Refused) and askers:
                self._keep((wire[2:], tcp, askers), Refused(reply.reply[2:], reply.name))
        return reply

    def _keep(self, key: tuple[bytes, bool, Askers], reply: bytes | Refused) -> None:
        if len(self._cache) >= CACHE_ENTRIES_MAX:
            self._cache.pop(next(iter(self._cache)))
        self._cache[key] = reply

    def opens(self, name: str, askers: Askers) -> bool:
        """Whether somebody who could have asked may reach, not only know, what this name is answered with."""
        return any(self._ways_out.open_to(asker, name) for asker in askers)

    def _answer(self, wire: bytes, tcp: bool, askers: Askers) -> Answer:
        if len(wire) < 12 or wire[2] & 0x80:  # too short for a head, or a response
            return None
        if len(wire) > QUERY_BYTES_MAX:
            return _bare(wire, dns.rcode.FORMERR)
        try:
            query = dns.message.from_wire(wire)
        except (dns.exception.DNSException, ValueError, IndexError, KeyError):
            return _bare(wire, dns.rcode.FORMERR)
        if query.opcode() != dns.opcode.QUERY:
            return _bare(wire, dns.rcode.NOTIMP)
        if len(query.question) != 1 or query.answer or query.authority:
            return _bare(wire, dns.rcode.FORMERR)
        try:
            response = dns.message.make_response(
                query, our_payload=UDP_BYTES_MAX, recursion_available=bool(self._forward or self._ways_out)
            )
            if query.edns > 0:
                response.set_rcode(dns.rcode.BADVERS)
                return _wire(response, query, tcp)
            question = query.question[0]
            name = question.name
            if question.rdclass != _IN or not name.is_subdomain(_ZONE):
                text = name.to_text(omit_final_dot=True).lower()
                if question.rdclass == _IN and self._may_ask(text, askers):
                    return Forward(query, text)
                response.set_rcode(dns.rcode.REFUSED)
                return Refused(_wire(response, query, tcp), text)
            response.flags |= dns.flags.AA
            self._fill(response, name, question.rdtype)
            return _wire(response, query, tcp)
        except (dns.exception.DNSException, ValueError):
            return _bare(wire, dns.rcode.SERVFAIL)

    def _may_ask(self, name: str, askers: Askers) -> bool:
        """Whether everyone who could have asked may."""
        rules = [principals for names, principals in self._forward if any_pattern(names, name)]
        return all(
            any(not principals or any_pattern(principals, asker.removeprefix("spiffe://")) for principals in rules)
            or self._ways_out.open_to(asker, name)
            for asker in askers or ("",)
        )

    def _fill(self, response: dns.message.Message, name: dns.name.Name, rdtype: dns.rdatatype.RdataType) -> None:
        labels = [label.decode("latin-1").lower() for label in name.relativize(_ZONE).labels]
        port_name = ""
        if len(labels) == 4 and labels[0].startswith("_") and labels[1] == "_tcp":
            port_name, labels = labels[0][1:], labels[2:]
        service = self._services.get(".".join(labels)) if len(labels) == 2 else None
        if service is not None and port_name:
            ports = [p for p in service.ports if p.name == port_name and p.protocol is not Protocol.UDP]
            if not ports:
                service = None
        elif service is not None:
            ports = list(service.ports)
        if service is None:
            known = not labels or (len(labels) == 1 and labels[0] in self._namespaces)
            if not known or port_name:
                response.set_rcode(dns.rcode.NXDOMAIN)
            _negative(response)
            return
        own = dns.name.from_text(f"{service.name}.{service.namespace}.{ZONE}.")
        wanted = [dns.rdatatype.A, dns.rdatatype.AAAA] if rdtype == dns.rdatatype.ANY else [rdtype]
        if not port_name:
            for kind in wanted:
                _addresses(response.answer, name, service, kind)
        if rdtype in (dns.rdatatype.SRV, dns.rdatatype.ANY) and ports:
            records = [dns.rdata.from_text(_IN, dns.rdatatype.SRV, f"0 0 {port.port} {own}") for port in ports]
            response.answer.append(dns.rrset.from_rdata_list(name, TTL_S, records))
            for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
                _addresses(response.additional, own, service, kind)
        if not response.answer:
            _negative(response)


def _addresses(section: list[dns.rrset.RRset], name: dns.name.Name, service: Service, rdtype: dns.rdatatype.RdataType) -> None:
    if rdtype not in (dns.rdatatype.A, dns.rdatatype.AAAA):
        return
    vips = [vip for vip in service.vips if (":" in vip) == (rdtype == dns.rdatatype.AAAA)]
    if vips:
        section.append(dns.rrset.from_rdata_list(name, TTL_S, [dns.rdata.from_text(_IN, rdtype, vip) for vip in vips]))


def _negative(response: dns.message.Message) -> None:
    response.authority.append(dns.rrset.from_rdata_list(_ZONE, NEGATIVE_TTL_S, [_SOA]))


def _wire(response: dns.message.Message, query: dns.message.Message, tcp: bool) -> bytes:
    limit = MESSAGE_BYTES_MAX if tcp else max(UDP_BYTES_MIN, min(UDP_BYTES_MAX, query.payload))
    try:
        return response.to_wire(max_size=limit)
    except dns.exception.TooBig:
        for section in (response.answer, response.authority, response.additional):
            section.clear()
        response.flags |= dns.flags.TC
        return response.to_wire(max_size=limit)


def _bare(wire: bytes, rcode: int) -> bytes:
    """A head with an error and nothing else: for what could not be read."""
    return wire[:2] + bytes([0x80 | (wire[2] & 0x79), rcode & 0xF]) + bytes(8)


def refused(query: dns.message.Message, rcode: dns.rcode.Rcode) -> bytes:
    """An error for a query that was to be forwarded."""
    response = dns.message.make_response(query, our_payload=UDP_BYTES_MAX, recursion_available=True)
    response.set_rcode(rcode)
    return response.to_wire()


# ---- upstream


def scramble(name: dns.name.Name) -> dns.name.Name:
    """0x20: random case, so that an answer proves to have seen the question."""
    flip = random.SystemRandom()
    labels = [bytes(c ^ (0x20 * flip.getrandbits(1)) if chr(c).isalpha() else c for c in label) for label in name.labels]
    return dns.name.Name(labels)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question sent upstream."""

    id: int
    name: dns.name.Name  # with its random case
    rdtype: dns.rdatatype.RdataType
    query: dns.message.Message  # the client's own
    tcp: bool


def ask(forward: Forward, *, tcp: bool) -> tuple[Asked, bytes]:
    """The client's question in our words: fresh id, random case, no option of the client's passed on."""
    question = forward.query.question[0]
    name = scramble(question.name)
    message = dns.message.make_query(name, question.rdtype, use_edns=0, payload=4096 if tcp else UDP_BYTES_MAX)
    message.id = secrets.randbelow(65536)
    return Asked(message.id, name, question.rdtype, forward.query, tcp), message.to_wire()


def _named(rdata: dns.rdata.Rdata) -> Iterable[str]:
    """The addresses a record leads to, the hints of SVCB and HTTPS among them."""
    if isinstance(rdata, A | AAAA):
        yield rdata.address
    elif isinstance(rdata, SVCBBase):
        for key in (ParamKey.IPV4HINT, ParamKey.IPV6HINT):
            if (hint := rdata.params.get(key)) is not None:
                yield from hint.addresses


def believe(asked: Asked, wire: bytes) -> tuple[bytes | None, str]:
    """(reply for the client, "") or (None, "") when this is not the answer, or (reply, counted reason) when it is refused."""
    try:
        message = dns.message.from_wire(wire, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError, IndexError, KeyError):
        return None, ""
    if message.id != asked.id or not message.flags & dns.flags.QR or len(message.question) != 1:
        return None, ""
    question = message.question[0]
    if question.name.labels != asked.name.labels or question.rdtype != asked.rdtype:
        return None, ""
    for section in (message.answer, message.authority, message.additional):
        for rrset in section:
            if rrset.name.is_subdomain(_ZONE) or not all(outside(address) for rdata in rrset for address in _named(rdata)):
                return refused(asked.query, dns.rcode.REFUSED), "dns_rebinding"
    if message.flags & dns.flags.TC and asked.tcp:
        return refused(asked.query, dns.rcode.SERVFAIL), "dns_truncated"
    own = asked.query.question[0].name
    response = dns.message.make_response(asked.query, our_payload=UDP_BYTES_MAX, recursion_available=True)
    response.set_rcode(message.rcode())
    response.flags |= message.flags & dns.flags.TC
    for rrset in message.answer:
        if rrset.name.labels == asked.name.labels:
            rrset.name = own
        response.answer.append(rrset)
    response.authority += message.authority
    try:
        return _wire(response, asked.query, asked.tcp), ""
    except dns.exception.DNSException:
        return refused(asked.query, dns.rcode.SERVFAIL), "dns_malformed"
