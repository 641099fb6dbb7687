"""The authority: shapes of certificates, key files, rotation with overlapping bundles."""

from __future__ import annotations

import base64
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from controller import ca
from controller.ca import Authority, BadRequest, Request
from controller.sqlite import SqliteStore
from tests.controller.rig import csr_for, new_key, pem_of

WEB = "spiffe://mesh.local/ns/shop/sa/web"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    made = await SqliteStore.open(tmp_path / "db")
    yield made
    await made.close()


def handshake(bundle: tuple[str, ...], chain: str, key: str, directory: Path) -> str:
    """A TLS handshake in memory, both sides with the same certificate; the peer's URI."""
    pair = directory / "pair.pem"
    pair.write_text(key + chain)
    contexts = []
    for purpose in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        context = ssl.SSLContext(purpose)
        context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
        context.load_verify_locations(cadata="".join(bundle))
        context.load_cert_chain(pair)
        contexts.append(context)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts[0].wrap_bio(to_client, to_server)
    server = contexts[1].wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    certificate = server.getpeercert()
    assert certificate is not None
    names: Any = certificate["subjectAltName"]
    ((_, uri),) = names
    return str(uri)


async def test_a_leaf_is_what_the_mesh_expects(store: SqliteStore, tmp_path: Path) -> None:
    authority = await Authority.open(store, tmp_path / "ca", "mesh.local")
    key = new_key()
    issued = authority.sign(Request.parse(csr_for(key)), WEB, "node:n1")
    leaf, intermediate = (x509.load_pem_x509_certificate(f"{pem}{END}".encode()) for pem in issued.chain.split(END)[:2])
    root = x509.load_pem_x509_certificate(authority.bundle[0].encode())
    constraints = [
        certificate.extensions.get_extension_for_class(x509.BasicConstraints).value for certificate in (leaf, intermediate, root)
    ]
    assert [(value.ca, value.path_length) for value in constraints] == [(False, None), (True, 0), (True, 1)]
    assert leaf.issuer == intermediate.subject and intermediate.issuer == root.subject
    assert abs(issued.not_after - time.time() - 86400) < 5
    assert abs(authority.active.root_not_after - time.time() - 3650 * 86400) < 5
    assert issued.serial == format(leaf.serial_number, "x") and leaf.serial_number.bit_length() > 64
    assert handshake(authority.bundle, issued.chain, pem_of(key), tmp_path) == WEB
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "ca").iterdir()}
    assert modes == {"1.root.key": 0o600, "1.intermediate.key": 0o600}
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700


END = "-----END CERTIFICATE-----\n"


async def test_a_short_life_has_its_half_ahead(store: SqliteStore, tmp_path: Path) -> None:
    authority = await Authority.open(store, tmp_path / "ca", "mesh.local")
    leaf = authority.sign(Request.parse(csr_for(new_key())), WEB, "node:n1", ttl_s=10.0).leaf
    assert time.time() + 3 < (leaf.not_before + leaf.not_after) / 2 < time.time() + 6


async def test_the_same_authority_opens_again(store: SqliteStore, tmp_path: Path) -> None:
    first = await Authority.open(store, tmp_path / "ca", "mesh.local")
    again = await Authority.open(store, tmp_path / "ca", "mesh.local")
    assert again.bundle == first.bundle and again.active == first.active


async def test_roots_rotate_with_an_overlap(store: SqliteStore, tmp_path: Path) -> None:
    authority = await Authority.open(store, tmp_path / "ca", "mesh.local")
    key = new_key()
    request = Request.parse(csr_for(key))
    old, old_bundle = authority.sign(request, WEB, "node:n1"), authority.bundle
    number = await authority.prepare_rotation()
    both = authority.bundle
    assert len(both) == 2 and authority.active.id == 1
    # Not signing yet: nodes that know the old root only must go on.
    assert handshake(old_bundle, authority.sign(request, WEB, "node:n1").chain, pem_of(key), tmp_path) == WEB
    await authority.activate(number)
    new = authority.sign(request, WEB, "node:n1")
    for chain in (old.chain, new.chain):
        assert handshake(both, chain, pem_of(key), tmp_path) == WEB
    with pytest.raises(ssl.SSLError):
        handshake(old_bundle, new.chain, pem_of(key), tmp_path)
    with pytest.raises(BadRequest):
        await authority.retire(number)
    await authority.retire(1)
    assert len(authority.bundle) == 1 and authority.generations == {number}
    with pytest.raises(ssl.SSLError):
        handshake(authority.bundle, old.chain, pem_of(key), tmp_path)
    reopened = await Authority.open(store, tmp_path / "ca", "mesh.local")
    assert reopened.bundle == authority.bundle
    assert await reopened.prepare_rotation() == number + 1


async def test_the_intermediate_is_renewed_at_half_life(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ca, "INTERMEDIATE_TTL_S", 100.0)
        authority = await Authority.open(store, tmp_path / "ca", "mesh.local")
    key = new_key()
    before = authority.sign(Request.parse(csr_for(key)), WEB, "node:n1")
    assert before.not_after <= authority.active.intermediate_not_after
    assert await authority.renew_intermediate() is True
    assert await authority.renew_intermediate() is False
    after = authority.sign(Request.parse(csr_for(key)), WEB, "node:n1")
    for issued in (before, after):
        assert handshake(authority.bundle, issued.chain, pem_of(key), tmp_path) == WEB


@pytest.mark.parametrize(
    "bad", ["", "junk", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----", "x" * 20_000]
)
def test_what_is_no_request_is_refused(bad: str) -> None:
    with pytest.raises(BadRequest):
        Request.parse(bad)


def test_a_request_signed_by_another_key_is_refused() -> None:
    mine, other = csr_for(new_key()), csr_for(new_key())
    der = x509.load_pem_x509_csr(mine.encode()).public_bytes(serialization.Encoding.DER)
    forged = der[:-8] + x509.load_pem_x509_csr(other.encode()).public_bytes(serialization.Encoding.DER)[-8:]
    pem = "-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(forged).decode() + "-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(BadRequest):
        Request.parse(pem)


def test_an_rsa_key_is_refused() -> None:
    key = rsa.generate_private_key(65537, 2048)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(BadRequest, match="P-256"):
        Request.parse(pem)
