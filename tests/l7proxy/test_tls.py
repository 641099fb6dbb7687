"""What a peer's certificate must be, and what each mistake is counted as, over real handshakes."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import structlog
from cryptography.x509.oid import ExtendedKeyUsageOID

from l7proxy.admission import Refusal
from l7proxy.inbound import LOGGED_PER_S_MAX, DestinationTunnel
from l7proxy.tls import PeerRefused, check_peer, revoked_nodes, revoked_serials
from mesh.model import key_of
from tests.l7proxy.pki import Authority, Entry
from tests.l7proxy.two_nodes import CLIENT, CLIENT_IP, DB, TD, WEB, WEB_IP, Collect, TwoNodes, until, workload

OTHER_DOMAIN = "spiffe://evil.example/ns/shop/sa/client"


@pytest_asyncio.fixture
async def nodes() -> AsyncIterator[TwoNodes]:
    made = TwoNodes()
    yield made
    await made.close()


async def dial(nodes: TwoNodes, **arguments: Any) -> Collect:
    client = nodes.dial(**arguments)
    await until(lambda: client.answered)
    return client


def client_certificate(case: str, authority: Authority) -> Entry:
    match case:
        case "expired":
            return authority.svid(CLIENT, starts_s=-7200, lasts_s=-3600)
        case "not yet":
            return authority.svid(CLIENT, starts_s=3600, lasts_s=7200)
        case "other trust domain":
            return authority.svid(OTHER_DOMAIN)
        case "other root":
            return Authority("root").svid(CLIENT)
        case "no usage":
            return authority.svid(CLIENT, usages=None)
        case "client usage only":
            return authority.svid(CLIENT, usages=(ExtendedKeyUsageOID.CLIENT_AUTH,))
        case "server usage only":
            return authority.svid(CLIENT, usages=(ExtendedKeyUsageOID.SERVER_AUTH,))
        case "no name":
            return authority.svid([])
        case "two names":
            return authority.svid([CLIENT, WEB])
        case "a node's name":
            return authority.svid(f"spiffe://{TD}/node/n1")
        case "unknown identity":
            return authority.svid(f"spiffe://{TD}/ns/shop/sa/nobody")
        case "right certificate, wrong address":
            return authority.svid(DB)
    raise AssertionError(case)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("expired", "cert_expired"),
        ("not yet", "cert_not_yet_valid"),
        ("other trust domain", "cert_trust_domain"),
        ("other root", "cert_untrusted"),
        ("no usage", "cert_eku"),
        ("client usage only", "cert_eku"),
        ("server usage only", "cert_eku"),
        ("no name", "cert_spiffe"),
        ("two names", "cert_spiffe"),
        ("a node's name", "cert_spiffe"),
        ("unknown identity", "identity_unknown"),
        ("right certificate, wrong address", "peer_address"),
    ],
)
async def test_client_certificates_refused(nodes: TwoNodes, case: str, reason: str) -> None:
    nodes.source.svids[CLIENT] = client_certificate(case, nodes.authority)
    client = await dial(nodes)
    assert client.failure is not None
    await until(lambda: nodes.destination.reasons)
    assert nodes.destination.reasons == [reason]
    assert not nodes.destination.served
    assert nodes.destination.flows[0]["reason"] == reason


@pytest.mark.parametrize("case", ["expired", "other root", "no usage", "client usage only", "other trust domain", "wrong spiffe"])
async def test_server_certificates_refused(nodes: TwoNodes, case: str) -> None:
    bad = nodes.authority.svid(DB) if case == "wrong spiffe" else client_certificate(case, nodes.authority)
    nodes.destination.svids[WEB] = bad
    client = await dial(nodes)
    assert client.failure is not None
    assert client.failure.reason in ("peer_identity", "tls_failed")
    assert not nodes.destination.served


async def test_revoked_serial_is_refused_and_ends_what_is_open(nodes: TwoNodes) -> None:
    open_before = await dial(nodes)
    assert open_before.failure is None
    serial = nodes.source.svids[CLIENT].serial.upper()
    nodes.configure(revoked=(serial,))
    await until(lambda: open_before.lost)
    assert nodes.destination.reasons == ["cert_revoked"]
    client = await dial(nodes)
    assert client.failure is not None


async def test_cut_node_loses_its_tunnels(nodes: TwoNodes) -> None:
    open_before = await dial(nodes)
    nodes.configure(revoked=("node:n1",))
    await until(lambda: open_before.lost)
    assert nodes.destination.reasons == ["node_cut"]
    assert (await dial(nodes)).failure is not None


async def test_tunnel_to_a_cut_node_ends(nodes: TwoNodes) -> None:
    open_before = await dial(nodes)
    nodes.configure(revoked=("node:n2",))
    await until(lambda: open_before.lost)
    client = await dial(nodes)
    assert client.failure is not None and "n2 is cut" in client.failure.detail


async def test_withdrawn_certificates(nodes: TwoNodes) -> None:
    client = await dial(nodes)
    del nodes.destination.svids[WEB]
    for call in nodes.destination.on_svid:
        call(WEB)
    await until(lambda: client.lost)
    assert (await dial(nodes)).failure is not None
    assert nodes.destination.reasons == ["no_svid"]
    del nodes.source.svids[CLIENT]
    again = await dial(nodes)
    assert again.failure is not None and again.failure.reason == "no_svid"


# ---- handshakes by hand


async def shake(
    nodes: TwoNodes, change: Any = None, *, name: str | None = "web.shop.mesh.local", certificate: bool = True
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=nodes.authority.root)
    context.set_alpn_protocols(["h2"])
    if certificate:
        entry = nodes.source.svids[CLIENT]
        fd = os.memfd_create("chain")
        os.write(fd, entry.chain.encode())
        context.load_cert_chain(f"/proc/self/fd/{fd}", f"/proc/self/fd/{entry.key_fd}")
        os.close(fd)
    if change is not None:
        change(context)

    def blocking() -> None:
        with socket.create_connection((WEB_IP, 15008), source_address=(CLIENT_IP, 0)) as raw:
            raw.settimeout(5)
            try:
                with context.wrap_socket(raw, server_hostname=name) as tls:
                    tls.recv(1)
            except (ssl.SSLError, OSError):
                pass

    await asyncio.to_thread(blocking)


async def test_wrong_server_name(nodes: TwoNodes) -> None:
    await shake(nodes, name="db.shop.mesh.local")
    await until(lambda: nodes.destination.reasons)
    assert nodes.destination.reasons == ["sni_unknown"]


async def test_no_client_certificate(nodes: TwoNodes) -> None:
    await shake(nodes, certificate=False)
    await until(lambda: nodes.destination.reasons)
    assert nodes.destination.reasons == ["cert_missing"]


async def test_old_tls(nodes: TwoNodes) -> None:
    def old(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    await shake(nodes, old)
    await until(lambda: nodes.destination.reasons)
    assert nodes.destination.reasons == ["tls_version"]


async def test_no_h2(nodes: TwoNodes) -> None:
    await shake(nodes, lambda context: context.set_alpn_protocols(["http/1.1"]))
    await until(lambda: nodes.destination.reasons)
    assert nodes.destination.reasons == ["tls_handshake"]


async def test_a_certificate_withdrawn_during_the_handshake_serves_nobody(
    nodes: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_open = DestinationTunnel.on_open

    def late(tunnel: DestinationTunnel) -> None:
        nodes.destination.svids.pop(WEB, None)
        on_open(tunnel)

    monkeypatch.setattr(DestinationTunnel, "on_open", late)
    client = await dial(nodes)
    assert client.failure is not None
    assert nodes.destination.reasons == ["no_svid"] and not nodes.destination.served


async def test_plaintext_and_silence(nodes: TwoNodes) -> None:
    _, writer = await asyncio.open_connection(WEB_IP, 15008, local_addr=(CLIENT_IP, 0))
    writer.write(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")
    await until(lambda: nodes.destination.reasons)
    writer.close()
    _, silent = await asyncio.open_connection(WEB_IP, 15008, local_addr=(CLIENT_IP, 0))
    await until(lambda: nodes.inbound.handshakes)
    for call in nodes.destination.on_sweep:
        call(time.perf_counter() + 11)
    await until(lambda: not nodes.inbound.handshakes)
    assert "handshake_timeout" in nodes.destination.reasons
    silent.close()


async def test_handshakes_of_one_source_are_bounded(nodes: TwoNodes) -> None:
    flood = [await asyncio.open_connection(WEB_IP, 15008, local_addr=(CLIENT_IP, 0)) for _ in range(80)]
    await until(lambda: nodes.destination.reasons)
    assert nodes.destination.reasons == ["handshake_flood"]
    assert len(nodes.inbound.handshakes) <= 64
    for _, writer in flood:
        writer.close()


async def test_shared_address_is_told_apart_by_name(nodes: TwoNodes) -> None:
    for item in (
        workload(310, "web-h", "n2", WEB, "127.77.1.254", 8080),
        workload(311, "db-h", "n2", DB, "127.77.1.254", 3306),
    ):
        nodes.items[key_of(item)] = item
    for worker in (nodes.source, nodes.destination):
        worker.reconfigure(nodes.items)
    nodes.destination.reconfigure(nodes.items, ("Workload/shop/web-h", "Workload/shop/db-h"))
    nodes.listeners.append(nodes.listen("127.77.1.254"))
    web = await dial(nodes, address="127.77.1.254", key="Workload/shop/web-h")
    db = await dial(nodes, address="127.77.1.254", port=3306, key="Workload/shop/db-h")
    assert (web.failure, db.failure) == (None, None)
    assert {t.served for t in nodes.inbound.tunnels} == {WEB, DB}
    crossed = await dial(nodes, address="127.77.1.254", port=3306, key="Workload/shop/web-h")
    assert crossed.failure is not None
    assert "authority_port" in nodes.destination.reasons


def test_revocation_lists() -> None:
    revoked = ("00AB", "ab:cd", "node:n3", "not a serial")
    assert revoked_serials(revoked) == {"ab", "abcd"}
    assert revoked_nodes(revoked) == {"n3"}


def test_check_peer_is_pure() -> None:
    authority = Authority()
    entry = authority.svid(CLIENT)
    der = ssl.PEM_cert_to_DER_cert(entry.chain[: entry.chain.index("-----END CERTIFICATE-----") + 26])
    peer = check_peer(der, TD, frozenset())
    assert (peer.spiffe, peer.serial) == (CLIENT, entry.serial)
    with pytest.raises(PeerRefused, match="cert_expired"):
        check_peer(der, TD, frozenset(), now=peer.not_after)
    with pytest.raises(PeerRefused, match="cert_missing"):
        check_peer(None, TD, frozenset())
    with pytest.raises(PeerRefused, match="cert_malformed"):
        check_peer(b"\x30\x03abc", TD, frozenset())


async def test_a_flood_of_refusals_is_counted_and_not_logged_in_full(nodes: TwoNodes) -> None:
    with structlog.testing.capture_logs() as lines:
        nodes.destination.log = structlog.get_logger()
        for _ in range(1000):
            nodes.inbound.refused(Refusal("handshake_flood", "too many"), "", "10.0.0.1")
        nodes.destination.sweep()
        nodes.inbound.refused(Refusal("handshake_flood", "too many"), "", "10.0.0.1")
    assert nodes.destination.metrics.denials["handshake_flood"] == 1001
    told = [line for line in lines if line["event"] == "inbound tunnel refused"]
    assert len(told) == LOGGED_PER_S_MAX + 1
    assert [line["more"] for line in lines if "more" in line] == [1000 - LOGGED_PER_S_MAX]
