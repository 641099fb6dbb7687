"""What an answer opens, as a table; and that the client has it when that is open."""

from __future__ import annotations

import asyncio

import dns.message
import dns.rcode
import dns.rrset
import pytest

from l7proxy import dns_grants
from l7proxy.dns_grants import ANSWER_TTL_S_MAX, answered
from mesh.link import Grant, Granted
from mesh.model import CONFIG_KEY, ServiceEntry, Workload
from mesh.outside import GRANT_ADDRESSES_MAX
from tests.l7proxy.test_dns import CALLER, Setup, setup
from tests.l7proxy.two_nodes import until

__all__ = ["setup"]

THERE, THERE6 = "93.184.215.14", "2606:2800:21f:cb07::14"


def wire(*records: tuple[str, int, str, str], name: str = "api.test.", kind: str = "A") -> bytes:
    response = dns.message.make_response(dns.message.make_query(name, kind))
    response.answer += [dns.rrset.from_text(owner, ttl, "IN", rdtype, *text.split(",")) for owner, ttl, rdtype, text in records]
    return response.to_wire()


@pytest.mark.parametrize(
    ("records", "addresses", "ttl"),
    [
        ([("api.test.", 60, "A", THERE)], (THERE,), 60),
        ([("API.test.", 60, "A", f"{THERE},93.184.215.15")], (THERE, "93.184.215.15"), 60),
        ([("api.test.", 9, "CNAME", "b.test."), ("b.test.", 60, "A", THERE)], (THERE,), 9),
        ([("b.test.", 60, "A", THERE), ("api.test.", 90, "CNAME", "b.test.")], (THERE,), 60),
        ([("api.test.", 60, "A", THERE), ("other.test.", 60, "A", "93.184.215.15")], (THERE,), 60),
        ([("other.test.", 60, "A", THERE)], None, 0),
        ([("api.test.", 60, "AAAA", THERE6)], None, 0),
        ([("api.test.", 9, "CNAME", "b.test."), ("b.test.", 9, "CNAME", "api.test.")], None, 0),
        ([("api.test.", 9, "CNAME", "b.test.")], None, 0),
        ([], None, 0),
    ],
)
def test_what_an_answer_opens(records: list[tuple[str, int, str, str]], addresses: tuple[str, ...] | None, ttl: int) -> None:
    found = answered(wire(*records))
    if addresses is None:
        assert found is None
        return
    assert found is not None and (set(found.addresses), found.ttl_s) == (set(addresses), ttl)  # servers turn the order
    message = dns.message.from_wire(found.wire)
    assert {rdata.to_text() for rdata in message.answer[-1]} == set(addresses)
    assert not any(rrset.name.to_text() == "other.test." for rrset in message.answer)


def test_other_questions_open_nothing() -> None:
    assert answered(wire(("api.test.", 60, "TXT", "x"), kind="TXT")) is None
    assert answered(wire(("api.test.", 60, "HTTPS", f"1 . ipv4hint={THERE}"), kind="HTTPS")) is None
    assert answered(b"\0" * 12) is None and answered(b"junk") is None
    found = answered(wire(("api.test.", 60, "AAAA", THERE6), kind="AAAA"))
    assert found is not None and found.addresses == (THERE6,)


def test_the_client_reads_no_more_and_no_longer_than_is_open() -> None:
    many = ",".join(f"93.184.1.{n}" for n in range(40))
    found = answered(wire(("api.test.", 1_000_000, "A", many)))
    assert found is not None and len(found.addresses) == GRANT_ADDRESSES_MAX
    (rrset,) = dns.message.from_wire(found.wire).answer
    assert (len(rrset), rrset.ttl) == (GRANT_ADDRESSES_MAX, ANSWER_TTL_S_MAX)


async def prepared(setup: Setup) -> None:
    upstream = await setup.forwarding()
    upstream.answer = THERE
    item = setup.items[CALLER]
    assert isinstance(item, Workload)
    principal = item.spiffe.removeprefix("spiffe://")
    entry = ServiceEntry("api", item.namespace, ("api.bank.test",), ((443, "tcp"),), (principal,))
    items = {**setup.items, CONFIG_KEY: setup.worker.config.mesh, "ServiceEntry/shop/api": entry}
    items[CONFIG_KEY] = type(setup.worker.config.mesh)(
        trust_domain="mesh.local", dns_upstreams=setup.worker.config.mesh.dns_upstreams, dns_forward=()
    )
    setup.worker.reconfigure(items, (CALLER,))


@pytest.mark.parametrize("tcp", [False, True])
async def test_the_agent_opens_before_the_client_hears(setup: Setup, tcp: bool) -> None:
    await prepared(setup)
    asking = asyncio.create_task(setup.ask("API.bank.test.", tcp=tcp))
    await until(lambda: setup.worker.sent)
    (grant,) = setup.worker.sent
    assert isinstance(grant, Grant)
    assert (grant.netns, grant.client[0], grant.transport) == (7, "127.0.0.1", "tcp" if tcp else "udp")
    assert (grant.name, grant.addresses, grant.ttl_s) == ("api.bank.test", (THERE,), 300.0)
    await asyncio.sleep(0)
    assert not asking.done()
    assert setup.server.asking.hear(Granted(grant.number + 1)) and not asking.done()  # of another question
    assert setup.server.asking.hear(Granted(grant.number))
    assert (await asking).answer[0][0].to_text() == THERE
    assert "grant_refused" not in setup.worker.reasons


@pytest.mark.parametrize("how", ["refused", "late", "no agent"])
async def test_an_answer_that_opens_nothing_is_an_answer(setup: Setup, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(dns_grants, "WAIT_S", 0.01)
    await prepared(setup)
    setup.worker.agent = how != "no agent"
    asking = asyncio.create_task(setup.ask("api.bank.test."))
    if how == "refused":
        await until(lambda: setup.worker.sent)
        setup.server.asking.hear(Granted(setup.worker.sent[0].number, "full"))
    assert (await asking).answer
    assert setup.worker.metrics.denials["grant_refused"] == 1


async def test_who_has_no_entry_may_not_ask(setup: Setup) -> None:
    await prepared(setup)
    assert (await setup.ask("www.bank.test.")).rcode() == dns.rcode.REFUSED
    setup.worker.reconfigure(setup.worker.config.state, ("Workload/shop/web-1",))
    assert (await setup.ask("api.bank.test.")).rcode() == dns.rcode.REFUSED
    assert not setup.worker.sent


def test_a_record_of_another_class_is_no_address() -> None:
    reply = bytearray(wire(("api.test.", 60, "A", THERE)))
    at = reply.rindex(b"\x00\x01\x00\x01\x00\x00\x00\x3c")
    reply[at + 3] = 255
    assert answered(bytes(reply)) is None
