"""Target dns: queries from workloads, and answers from upstream servers that may lie."""

from __future__ import annotations

import struct
from collections.abc import Hashable
from random import Random

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
from dns.rdtypes.IN.A import A
from dns.rdtypes.IN.AAAA import AAAA

from fuzz.target import Disagreement, Target
from l7proxy import dns_core
from l7proxy.dns_core import Asked, Forward, Names, Refused
from l7proxy.dns_grants import ANSWER_TTL_S_MAX, answered
from mesh.model import DnsForward, Protocol, Service, ServicePort
from mesh.outside import GRANT_ADDRESSES_MAX, outside

QUERY, ANSWER = b"Q", b"A"  # a case's first byte: which side it comes from
SERVICES = {
    "web.shop": Service(256, "web", "shop", vips=("240.0.0.1", "fd50:494c::1"), ports=(ServicePort(80, 8080, "http",
        Protocol.HTTP),)),
    "db.shop": Service(257, "db", "shop", vips=("240.0.0.2",), ports=(ServicePort(5432, 5432, "pg"), ServicePort(53, 53, "u",
        Protocol.UDP))),
    "many.shop": Service(258, "many", "shop", vips=("240.0.0.3", "fd50:494c::3"), ports=tuple(ServicePort(n, n,
        f"p{n}") for n in range(1, 60))),
}  # fmt: skip
NAMES = (
    b"\3web\4shop\4mesh\0", b"\3WEB\4Shop\4mEsH\0", b"\2db\4shop\4mesh\0", b"\4many\4shop\4mesh\0", b"\4shop\4mesh\0",
    b"\4mesh\0", b"\0",
    b"\5_http\4_tcp\3web\4shop\4mesh\0", b"\3_p1\4_tcp\4many\4shop\4mesh\0", b"\7example\3com\0", b"\7ExAmPlE\3com\0",
    b"\1a\4test\0",
    b"\x08web.shop\4mesh\0", b"\3web\4shop\5mesh.\0", b"\3web\4shop\4mesh", b"\xc0\x0c", b"\xc0\x0e", b"\3web\xc0\x0c",
    b"\x40a\0",
    b"\x3f" + b"a" * 63 + b"\0", (b"\x3f" + b"a" * 63) * 4 + b"\0", b"\1\0\4mesh\0", b"\1\xff\4mesh\0", b"\1*\4mesh\0",
    b"\5a.b/c\3com\0",
    b"\1\\\3com\0", b"\4xn--\3com\0", b"\1[\3com\0",
)  # fmt: skip
ASKERS = ("spiffe://mesh.local/ns/shop/sa/web",)
FORWARD = (
    DnsForward(("example.com",), ("mesh.local/ns/shop/sa/*",)),
    DnsForward(("*.test",)),
    DnsForward(("a.com",), ("mesh.local/ns/x/*",)),
)
TYPES = (1, 28, 33, 255, 5, 12, 15, 16, 41, 65, 0, 6, 250, 251, 252, 65535)
_OPT = b"\0\0\x29\x04\xd0\0\0\0\0\0\0"
_CLIENT = dns.message.make_query("example.com.", "A", id=7)
_ASKED_NAME = dns.name.from_text("eXamPLE.cOm.")
ASKED_ID = 0x1234


class Dns(Target):
    name = "dns"
    tokens = (
        *NAMES,
        _OPT,
        b"\0\1\0\1",
        b"\0\x1c\0\1",
        b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4",
        b"\0\0\x29",
        b"\x80\0",
        b"\0\5",
        b"\x12\x34",
        b"\xff\xff",
    )

    def __init__(self) -> None:
        super().__init__()
        self.compared = {"answered": 0, "forwarded": 0, "believed": 0, "refused": 0, "opened": 0}

    def generate(self, rng: Random) -> bytes:
        random = rng.random

        def one(choices: tuple[bytes, ...]) -> bytes:
            return choices[int(random() ** 1.5 * len(choices))]

        def record(name: bytes) -> bytes:
            kind = TYPES[int(random() ** 2 * len(TYPES))]
            data = (
                bytes([(93, 10, 127, 240, 169, 0, 100, 224)[int(random() * 8)], 184, 216, 34]) if kind == 1
                else (b"\x20\1" if random() < 0.5 else one((b"\xfd\x50", b"\0\0", b"\xfe\x80",
                    b"\0\x64"))) + bytes(13) + b"\1" if kind == 28
                else one(NAMES) if kind in (5, 12)
                else bytes(int(random() * 12))
            )  # fmt: skip
            length = len(data) if random() < 0.97 else int(random() * 40)
            return name + struct.pack("!HHIH", kind, 1 if random() < 0.95 else 255, 60, length) + data

        query = random() < 0.5
        flags = (0x0100 if query else 0x8180) if random() < 0.85 else int(random() * 65536)
        questions = 1 if random() < 0.95 else int(random() * 3)
        kind = TYPES[int(random() ** 2 * len(TYPES))] if query else 1
        body = [
            (one(NAMES) if query else b"\7eXamPLE\3cOm\0")
            + struct.pack("!HH", kind, 1 if random() < 0.95 else int(random() * 256))
        ] * questions
        answers = [
            record(b"\xc0\x0c" if random() < 0.8 else one(NAMES))
            for _ in range(0 if query and random() < 0.95 else int(random() * 4))
        ]
        extra = [] if random() < 0.5 else [_OPT if random() < 0.8 else b"\0\0\x29" + rng.randbytes(8)]
        counts = [questions, len(answers), 0, len(extra)]
        if random() < 0.05:
            counts[int(random() * 4)] = int(random() * 65536)
        number = int(random() * 65536) if query else ASKED_ID
        wire = struct.pack("!HHHHHH", number, flags, *counts) + b"".join(body + answers + extra)
        return (QUERY if query else ANSWER) + wire + (rng.randbytes(3) if random() < 0.03 else b"")

    def check(self, case: bytes, *, deep: bool = False) -> Hashable:  # noqa: ARG002  # of every target
        if case[:1] == QUERY:
            return self._query(case[1:])
        if case[:1] == ANSWER:
            return self._answer(case[1:])
        return None

    def _query(self, wire: bytes) -> Hashable:
        names = Names(SERVICES, FORWARD)
        kinds = []
        for tcp in (False, True):
            reply = names.answer(wire, tcp=tcp, askers=ASKERS)
            if names.answer(wire, tcp=tcp, askers=ASKERS) != reply and not isinstance(reply, Forward):
                raise Disagreement("pillion", "another answer the second time")
            if isinstance(reply, Forward):
                self._forward(reply, tcp)
                kinds.append("forward")
            elif reply is None:
                kinds.append("silent")
                if len(wire) >= 12 and not wire[2] & 0x80:
                    raise Disagreement("pillion", "no answer to a query")
            elif isinstance(reply, Refused):
                self.compared["refused"] += 1
                kinds.append("refused " + self._reply(wire, reply.reply, tcp))
            else:
                self.compared["answered"] += 1
                kinds.append(self._reply(wire, reply, tcp))
                other = names.answer(b"\xab\xcd" + wire[2:], tcp=tcp, askers=ASKERS)
                if other != b"\xab\xcd" + reply[2:]:
                    raise Disagreement("pillion", "an id changes the answer")
        return tuple(kinds)

    def _reply(self, wire: bytes, reply: bytes, tcp: bool) -> str:
        message = dns.message.from_wire(reply)
        if reply[:2] != wire[:2] or not message.flags & dns.flags.QR:
            raise Disagreement("pillion", "an answer that is none", repr(reply[:20]))
        if len(reply) > (dns_core.MESSAGE_BYTES_MAX if tcp else dns_core.UDP_BYTES_MAX):
            raise Disagreement("pillion", "an answer too long", str(len(reply)))
        for rrset in message.answer:
            for rdata in rrset:
                vips = {vip for service in SERVICES.values() for vip in service.vips}
                if isinstance(rdata, A | AAAA) and rdata.address not in vips:
                    raise Disagreement("pillion", "an address from nowhere", rdata.address)
        if message.question and message.rcode() == dns.rcode.NOERROR:
            # the question comes back as it came, its case included
            asked = dns.message.from_wire(wire)
            if message.question[0].name.labels != asked.question[0].name.labels or message.question != asked.question:
                raise Disagreement("pillion", "an answer to another question")
        return f"{message.rcode()} {len(message.answer)} {bool(message.flags & dns.flags.TC)}"

    def _forward(self, forward: Forward, tcp: bool) -> None:
        self.compared["forwarded"] += 1
        asked, wire = dns_core.ask(forward, tcp=tcp)
        question = dns.message.from_wire(wire).question[0]
        if question.name != forward.query.question[0].name or question.rdtype != asked.rdtype:
            raise Disagreement("pillion", "asks upstream for another name", str(question))
        if not (forward.name == "example.com" or forward.name.endswith(".test")):
            raise Disagreement("pillion", "forwards a name it may not", forward.name)

    def _answer(self, wire: bytes) -> Hashable:
        kinds = []
        for tcp in (False, True):
            asked = Asked(ASKED_ID, _ASKED_NAME, dns.rdatatype.A, _CLIENT, tcp)
            reply, reason = dns_core.believe(asked, wire)
            if reply is None:
                kinds.append("no")
                continue
            message = dns.message.from_wire(reply)
            if message.id != _CLIENT.id or message.question != _CLIENT.question or not message.flags & dns.flags.QR:
                raise Disagreement("pillion", "an answer to another question", repr(reply[:40]))
            if len(reply) > (dns_core.MESSAGE_BYTES_MAX if tcp else dns_core.UDP_BYTES_MAX):
                raise Disagreement("pillion", "an answer too long", str(len(reply)))
            self.compared["refused" if reason else "believed"] += 1
            for rrset in (*message.answer, *message.authority, *message.additional):
                for rdata in rrset:
                    if isinstance(rdata, A | AAAA) and not outside(rdata.address):
                        raise Disagreement("pillion", "an inner address from outside", str(rrset))
            kinds.append(f"{reason} {message.rcode()} {len(message.answer)} {self._opened(reply)}")
        return tuple(kinds)

    def _opened(self, reply: bytes) -> int:
        """How many addresses an answer opens: those the client then reads, no others, and outside."""
        found = answered(reply)
        if found is None:
            return 0
        self.compared["opened"] += 1
        message = dns.message.from_wire(found.wire)
        read = {rdata.address for rrset in message.answer for rdata in rrset if isinstance(rdata, A | AAAA)}
        if set(found.addresses) != read or len(found.addresses) > GRANT_ADDRESSES_MAX or not all(map(outside, found.addresses)):
            raise Disagreement("pillion", "opens what it does not answer", f"{found.addresses} {read}")
        if any(rrset.ttl > ANSWER_TTL_S_MAX for rrset in message.answer):
            raise Disagreement("pillion", "outlives what it opens", str(message))
        return len(found.addresses)
