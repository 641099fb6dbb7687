"""What a CONNECT may ask for: the table of authorities, callers, and what each refusal is counted as."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.admission import Refusal, parse_connect, parse_forwarded, parse_host_port
from l7proxy.stream_transport import StreamTransport
from mesh.model import Workload
from tests.l7proxy.two_nodes import CLIENT_IP, DB_IP, NODE_IP, WEB_IP, TwoNodes, until

GOOD = f'for="{CLIENT_IP}:41000"'.encode()


@pytest_asyncio.fixture
async def nodes() -> AsyncIterator[TwoNodes]:
    made = TwoNodes()
    yield made
    await made.close()


async def ask(nodes: TwoNodes, *headers: tuple[bytes, bytes]) -> tuple[int, str]:
    """Send these fields on an open tunnel; the status and reason that come back."""
    if not nodes.pool._open:
        client = nodes.dial()
        await until(lambda: client.answered)
        assert client.failure is None
    (tunnel,) = nodes.pool._open
    answers = []
    tunnel.on_response = lambda stream, fields: answers.append(dict(fields))  # type: ignore[method-assign]
    stream = tunnel.core.open(headers)
    StreamTransport(tunnel, stream)
    tunnel.arm()
    await until(lambda: answers)
    return int(answers[0][b":status"]), answers[0].get(b"x-pillion-reason", b"").decode()


@pytest.mark.parametrize(
    ("authority", "reason"),
    [
        ("127.0.0.1:6379", "authority_not_local"),
        ("[::1]:6379", "authority_not_local"),
        ("169.254.169.254:80", "authority_not_local"),
        (f"{NODE_IP}:8080", "authority_not_local"),
        (f"{NODE_IP}:15443", "authority_not_local"),
        ("0.0.0.0:8080", "authority_not_local"),
        (f"{WEB_IP}:15001", "authority_port"),
        (f"{WEB_IP}:15008", "authority_port"),
        (f"{WEB_IP}:22", "authority_port"),
        (f"{DB_IP}:3306", "authority_identity"),
        (f"{CLIENT_IP}:8080", "authority_not_local"),
        ("localhost:8080", "authority_malformed"),
        ("web.shop.mesh:8080", "authority_malformed"),
        (f"0{WEB_IP}:8080", "authority_malformed"),
        ("127.077.1.1:8080", "authority_malformed"),
        ("2135752961:8080", "authority_malformed"),
        ("0x7f4d0101:8080", "authority_malformed"),
        (f"[::ffff:{WEB_IP}]:8080", "authority_malformed"),
        ("[fd77::0:1]:8080", "authority_malformed"),
        ("[FD77::1]:8080", "authority_malformed"),
        ("[fd77::1%eth0]:8080", "authority_malformed"),
        ("fd77::1:8080", "authority_malformed"),
        (f"{WEB_IP}:08080", "authority_malformed"),
        (f"{WEB_IP}:+8080", "authority_malformed"),
        (f"{WEB_IP}:0", "authority_malformed"),
        (f"{WEB_IP}:65536", "authority_malformed"),
        (f"{WEB_IP}:73616", "authority_malformed"),
        (f"{WEB_IP}", "authority_malformed"),
        (f"{WEB_IP}:", "authority_malformed"),
    ],
)
async def test_authorities(nodes: TwoNodes, authority: str, reason: str) -> None:
    before = len(nodes.destination.served)
    got = await ask(nodes, (b":method", b"CONNECT"), (b":authority", authority.encode()), (b"forwarded", GOOD))
    assert got == (403, reason)
    assert nodes.destination.reasons == [reason]
    assert len(nodes.destination.served) <= max(1, before)  # nothing but the dial that opened the tunnel


@pytest.mark.parametrize(
    ("forwarded", "reason"),
    [
        (f'for="{WEB_IP}:41000"', "forwarded_foreign"),
        ('for="127.0.0.1:41000"', "forwarded_foreign"),
        ('for="10.9.9.9:41000"', "forwarded_foreign"),
        (f"for={CLIENT_IP}:41000", "forwarded_malformed"),
        (f'for="{CLIENT_IP}:41000", for="10.0.0.1:1"', "forwarded_malformed"),
        (f'for="{CLIENT_IP}"', "forwarded_malformed"),
        ("", "forwarded_malformed"),
        (None, "forwarded_missing"),
    ],
)
async def test_callers(nodes: TwoNodes, forwarded: str | None, reason: str) -> None:
    fields = [(b":method", b"CONNECT"), (b":authority", f"{WEB_IP}:8080".encode())]
    if forwarded is not None:
        fields.append((b"forwarded", forwarded.encode()))
    assert await ask(nodes, *fields) == (403, reason)
    assert nodes.destination.reasons == [reason]


async def test_methods(nodes: TwoNodes) -> None:
    get = [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), (b":authority", f"{WEB_IP}:8080".encode())]
    assert await ask(nodes, *get, (b"forwarded", GOOD)) == (405, "method")


async def test_good_one(nodes: TwoNodes) -> None:
    fields = ((b":method", b"CONNECT"), (b":authority", f"{WEB_IP}:8080".encode()), (b"forwarded", GOOD))
    assert await ask(nodes, *fields) == (200, "")


async def test_streams_end_when_what_admitted_them_goes(nodes: TwoNodes) -> None:
    client = nodes.dial()
    other = nodes.dial(address=DB_IP, port=3306, key="Workload/shop/db-1")
    await until(lambda: client.answered and other.answered)
    web = nodes.items["Workload/shop/web-1"]
    assert isinstance(web, Workload)
    changed = dict(nodes.items)
    changed["Workload/shop/web-1"] = Workload(**{**{f: getattr(web, f) for f in web.__struct_fields__}, "ports": (9999,)})
    nodes.destination.reconfigure(changed)
    await until(lambda: client.lost)
    assert nodes.destination.reasons == ["authority_port"]
    assert not other.lost


async def test_workload_that_moved_away(nodes: TwoNodes) -> None:
    client = nodes.dial()
    await until(lambda: client.answered)
    nodes.destination.reconfigure(nodes.items, ("Workload/shop/db-1",))
    await until(lambda: client.lost)
    assert nodes.destination.reasons == ["authority_not_local"]


async def test_caller_that_lost_its_address(nodes: TwoNodes) -> None:
    client = nodes.dial()
    await until(lambda: client.answered)
    changed = {key: item for key, item in nodes.items.items() if key != "Workload/shop/client-1"}
    nodes.destination.reconfigure(changed)
    await until(lambda: client.lost)
    assert nodes.destination.reasons == ["peer_address"]


@given(st.text(max_size=60))
def test_parsers_refuse_or_return_what_they_read(text: str) -> None:
    try:
        address, port = parse_host_port(text, "authority_malformed")
    except Refusal:
        pass
    else:
        assert text in (f"{address}:{port}", f"[{address}]:{port}")
    try:
        parse_forwarded(text)
    except Refusal:
        pass


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=40)), max_size=6))
def test_parse_connect_never_fails_otherwise(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(Refusal):
        parse_connect((*headers, (b":method", b"PUT")))
