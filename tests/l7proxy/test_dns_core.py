"""DNS answers as a table, what is forwarded and believed, and that junk is only ever answered or dropped."""

from __future__ import annotations

import struct
import subprocess
import sys

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy import dns_core
from l7proxy.dns_core import Forward, Names, Refused
from mesh.model import DnsForward, Protocol, Service, ServicePort

WEB = Service(
    id=400,
    name="web",
    namespace="shop",
    vips=("240.0.0.7", "fd50:494c::7"),
    ports=(
        ServicePort(port=80, target_port=8080, name="http"),
        ServicePort(port=53, target_port=53, name="udp", protocol=Protocol.UDP),
    ),
)
V4 = Service(id=401, name="old", namespace="shop", vips=("240.0.0.8",), ports=(ServicePort(port=1, target_port=1),))
MANY = Service(
    id=402,
    name="many",
    namespace="shop",
    vips=("240.0.0.9",),
    ports=tuple(ServicePort(port=n, target_port=n, name=f"p{n}") for n in range(1, 200)),
)
SERVICES = {"web.shop": WEB, "old.shop": V4, "many.shop": MANY}
NAMES = Names(SERVICES)


def ask(name: str, rdtype: str = "A", *, names: Names = NAMES, tcp: bool = False, **options: object) -> dns.message.Message:
    query = dns.message.make_query(name, rdtype, **options)  # type: ignore[arg-type]  # passed through
    reply = names.answer(query.to_wire(), tcp=tcp)
    if isinstance(reply, Refused):
        reply = reply.reply
    assert isinstance(reply, bytes)
    message = dns.message.from_wire(reply)
    assert message.id == query.id and message.question == query.question
    return message


def records(message: dns.message.Message) -> list[str]:
    return sorted(rdata.to_text() for rrset in message.answer for rdata in rrset)


@pytest.mark.parametrize(
    ("name", "rdtype", "rcode", "answer"),
    [
        ("web.shop.mesh.", "A", "NOERROR", ["240.0.0.7"]),
        ("WEB.Shop.MESH.", "A", "NOERROR", ["240.0.0.7"]),
        ("web.shop.mesh.", "AAAA", "NOERROR", ["fd50:494c::7"]),
        ("web.shop.mesh.", "ANY", "NOERROR", ["0 0 53 web.shop.mesh.", "0 0 80 web.shop.mesh.", "240.0.0.7", "fd50:494c::7"]),
        ("web.shop.mesh.", "SRV", "NOERROR", ["0 0 53 web.shop.mesh.", "0 0 80 web.shop.mesh."]),
        ("_http._tcp.web.shop.mesh.", "SRV", "NOERROR", ["0 0 80 web.shop.mesh."]),
        ("_http._tcp.web.shop.mesh.", "A", "NOERROR", []),
        ("_udp._tcp.web.shop.mesh.", "SRV", "NXDOMAIN", []),
        ("_nope._tcp.web.shop.mesh.", "SRV", "NXDOMAIN", []),
        ("old.shop.mesh.", "AAAA", "NOERROR", []),  # NODATA: the name exists
        ("web.shop.mesh.", "MX", "NOERROR", []),
        ("shop.mesh.", "A", "NOERROR", []),
        ("mesh.", "SOA", "NOERROR", []),
        ("nope.shop.mesh.", "A", "NXDOMAIN", []),
        ("web.nope.mesh.", "A", "NXDOMAIN", []),
        ("nope.mesh.", "A", "NXDOMAIN", []),
        ("a.web.shop.mesh.", "A", "NXDOMAIN", []),
        ("example.com.shop.mesh.", "A", "NXDOMAIN", []),
        ("example.com.", "A", "REFUSED", []),
        ("web.shop.", "A", "REFUSED", []),
        ("meshed.", "A", "REFUSED", []),
        ("7.0.0.240.in-addr.arpa.", "PTR", "REFUSED", []),
    ],
)
def test_answers(name: str, rdtype: str, rcode: str, answer: list[str]) -> None:
    message = ask(name, rdtype)
    assert dns.rcode.to_text(message.rcode()) == rcode
    assert records(message) == answer
    if answer:
        assert all(rrset.ttl == dns_core.TTL_S for rrset in message.answer) and message.flags & dns.flags.AA
    elif rcode != "REFUSED":
        assert message.authority[0].rdtype == dns.rdatatype.SOA  # so that the absence may be cached


def test_asked_again_with_another_id() -> None:
    first, second = ask("web.shop.mesh."), ask("web.shop.mesh.")
    assert first.id != second.id or first == second
    assert records(first) == records(second)


def test_case_of_the_question_is_kept() -> None:
    assert ask("wEb.sHop.mesh.").question[0].name.to_text() == "wEb.sHop.mesh."


def test_edns() -> None:
    assert ask("web.shop.mesh.").edns == -1
    assert ask("web.shop.mesh.", use_edns=0, payload=4096).edns == 0
    assert ask("web.shop.mesh.", use_edns=1).rcode() == dns.rcode.BADVERS


def test_truncated_over_udp_whole_over_tcp() -> None:
    short = ask("many.shop.mesh.", "SRV")
    assert short.flags & dns.flags.TC and not short.answer
    assert ask("many.shop.mesh.", "SRV", use_edns=0, payload=65000).flags & dns.flags.TC  # our own limit
    assert len(records(ask("many.shop.mesh.", "SRV", tcp=True))) == 199


@pytest.mark.parametrize(
    ("wire", "rcode"),
    [
        (b"", None),
        (b"\0" * 11, None),
        (dns.message.make_response(dns.message.make_query("web.shop.mesh.", "A", id=7)).to_wire(), None),  # a response
        (b"\0\1\0\0\0\1\0\0\0\0\0\0", "FORMERR"),
        (b"\0\1\0\0\0\0\0\0\0\0\0\0", "FORMERR"),
        (b"\0\1\x10\0\0\1\0\0\0\0\0\0\1a\0\0\1\0\1", "NOTIMP"),  # STATUS
        (b"\0\1\0\0\0\2\0\0\0\0\0\0\1a\0\0\1\0\1\1b\0\0\1\0\1", "FORMERR"),
        (b"\0\1\0\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1", "FORMERR"),  # a name that points at itself
        (b"\0\1\0\0\0\1\0\0\0\0\0\0" + b"\1a" * 600, "FORMERR"),
        (b"\0\1\0\0\0\1\0\0\0\0\0\0\4mesh\0\0\1\0\3", "REFUSED"),  # class CHAOS
    ],
)
def test_bad_queries(wire: bytes, rcode: str | None) -> None:
    reply = NAMES.answer(wire)
    if rcode is None:
        assert reply is None
    else:
        if isinstance(reply, Refused):
            reply = reply.reply
        assert isinstance(reply, bytes)
        assert dns.rcode.to_text(dns.rcode.Rcode(reply[3] & 15)) == rcode and reply[2] & 0x80 and reply[:2] == wire[:2]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_junk_never_raises(wire: bytes) -> None:
    assert isinstance(NAMES.answer(wire), bytes | Refused | None)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_queries_never_raise(data: st.DataObject) -> None:
    wire = bytearray(dns.message.make_query("web.shop.mesh.", "SRV", use_edns=0).to_wire())
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    reply = Names(SERVICES, (DnsForward(("*",)),)).answer(bytes(wire))
    assert isinstance(reply, bytes | Forward | Refused | None)
    if isinstance(reply, Forward):
        dns_core.ask(reply, tcp=False)


def test_cache_is_bounded() -> None:
    names = Names(SERVICES)
    for n in range(dns_core.CACHE_ENTRIES_MAX + 100):
        names.answer(struct.pack("!HHHHHH", n % 65536, n // 4096, 1, 0, 0, 0) + b"\x05n%04d\0\0\1\0\1" % (n % 10000))
    assert len(names._cache) <= dns_core.CACHE_ENTRIES_MAX


# ---- other names


@pytest.mark.parametrize(
    ("patterns", "name", "forwarded"),
    [
        ((), "example.com.", False),
        (("*",), "example.com.", True),
        (("*",), "web.shop.mesh.", False),
        (("*",), "nope.shop.mesh.", False),
        (("example.com",), "EXAMPLE.com.", True),
        (("example.com",), "www.example.com.", False),
        (("*.example.com.",), "www.example.com.", True),
        (("api.*",), "api.example.com.", True),
        (("*.example.com",), "example.com.", False),
        (("*.example.com",), "badexample.com.", False),
    ],
)
def test_what_may_be_forwarded(patterns: tuple[str, ...], name: str, forwarded: bool) -> None:
    reply = Names(SERVICES, (DnsForward(patterns),)).answer(dns.message.make_query(name, "A").to_wire())
    assert isinstance(reply, Forward) is forwarded


def upstream(records_text: list[str], rdtype: str = "A", **change: object) -> tuple[bytes | None, str]:
    """The upstream's answer, with its changes, believed or not."""
    query = dns.message.make_query("Example.com.", rdtype, use_edns=0)
    forward = Names({}, (DnsForward(("*",)),)).answer(query.to_wire())
    assert isinstance(forward, Forward)
    asked, wire = dns_core.ask(forward, tcp=False)
    response = dns.message.make_response(dns.message.from_wire(wire))
    if records_text:
        response.answer.append(dns.rrset.from_text(asked.name, 300, "IN", rdtype, *records_text))
    if "id" in change:
        response.id = asked.id ^ 1
    if "add" in change:
        response.additional.append(dns.rrset.from_text(str(change["add"]), 300, "IN", "A", "93.184.215.14"))
    if "case" in change:
        response.question[0].name = dns.name.from_text(asked.name.to_text().swapcase())
    if "query" in change:
        response.flags &= ~dns.flags.QR
    return dns_core.believe(asked, response.to_wire())


def test_a_good_answer_comes_as_the_client_asked() -> None:
    reply, reason = upstream(["93.184.215.14"])
    assert reply is not None and not reason
    message = dns.message.from_wire(reply)
    assert message.question[0].name.to_text() == "Example.com." and records(message) == ["93.184.215.14"]


@pytest.mark.parametrize("change", ["id", "case", "query"])
def test_answers_to_other_questions_are_not_believed(change: str) -> None:
    assert upstream(["93.184.215.14"], **{change: True}) == (None, "")


@pytest.mark.parametrize(
    ("rdtype", "address"),
    [
        ("A", "10.0.0.1"),
        ("A", "192.168.1.1"),
        ("A", "172.16.0.1"),
        ("A", "127.0.0.1"),
        ("A", "169.254.169.254"),
        ("A", "240.0.0.7"),
        ("A", "100.64.0.1"),
        ("A", "0.0.0.0"),
        ("A", "224.0.0.1"),
        ("AAAA", "fd77::1"),
        ("AAAA", "fd50:494c::7"),
        ("AAAA", "fe80::1"),
        ("AAAA", "::1"),
        ("AAAA", "::ffff:10.0.0.1"),
        ("AAAA", "64:ff9b::a00:1"),
        ("AAAA", "2002:a00:1::1"),
    ],
)
def test_rebinding_is_refused(rdtype: str, address: str) -> None:
    reply, reason = upstream([address] if rdtype == "AAAA" else ["93.184.215.14", address], rdtype)
    assert reason == "dns_rebinding" and reply is not None
    message = dns.message.from_wire(reply)
    assert message.rcode() == dns.rcode.REFUSED and not message.answer


@pytest.mark.parametrize(
    ("rdtype", "record"),
    [("HTTPS", "1 . ipv4hint=93.184.215.14,10.0.0.1"), ("HTTPS", "1 . ipv6hint=fd77::1"), ("SVCB", "1 . ipv4hint=127.0.0.1")],
)
def test_hints_are_addresses_too(rdtype: str, record: str) -> None:
    assert upstream([record], rdtype)[1] == "dns_rebinding"
    assert upstream(["1 . ipv4hint=93.184.215.14"], rdtype)[1] == ""


def test_an_answer_about_the_meshs_own_names_is_refused() -> None:
    """A cache in the workload would keep it."""
    assert upstream(["93.184.215.14"], add="web.shop.mesh.")[1] == "dns_rebinding"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_upstream_junk_is_not_believed(wire: bytes) -> None:
    forward = Names({}, (DnsForward(("*",)),)).answer(dns.message.make_query("example.com.", "A").to_wire())
    assert isinstance(forward, Forward)
    asked, _ = dns_core.ask(forward, tcp=False)
    assert dns_core.believe(asked, wire) == (None, "")


def test_questions_upstream_are_ours_alone() -> None:
    query = dns.message.make_query(
        "a-long-enough-name.example.com.", "A", use_edns=0, options=[dns.edns.CookieOption(b"12345678", b"")]
    )
    forward = Names({}, (DnsForward(("*",)),)).answer(query.to_wire())
    assert isinstance(forward, Forward)
    sent = [dns.message.from_wire(dns_core.ask(forward, tcp=False)[1]) for _ in range(8)]
    assert len({m.id for m in sent}) > 4 and not any(m.options for m in sent)
    assert len({m.question[0].name.labels for m in sent}) > 4  # 0x20


def test_nothing_is_imported_when_the_first_query_comes() -> None:
    """The confined proxy may be unable to read its own library: what is not loaded by then never will be."""
    program = """
import sys
import l7proxy.main
import dns.message
from l7proxy.dns_core import Names
from mesh.model import DnsForward, Service, ServicePort
service = Service(300, "web", "shop", ("240.1.2.3", "fd50:494c::1"), (ServicePort(80, 8080, "http"),))
names = Names({"web.shop": service}, (DnsForward(("*",)),))
queries = [dns.message.make_query(f"{name}.mesh.", kind, use_edns=edns).to_wire()
           for name in ("web.shop", "none.shop") for kind in ("A", "AAAA", "SRV", "MX", "SOA", "TXT", "ANY") for edns in (0, -1)]
before = set(sys.modules)
for query in queries:
    for tcp in (False, True):
        names.answer(query, tcp=tcp)
print(sorted(set(sys.modules) - before))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
