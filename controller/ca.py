"""The certificate authority: a root that only signs intermediates, an intermediate that signs short-lived leaves.

Certificates and the rotation's state are in the store, private keys in files of mode 0600 beside it. A rotation
has three steps, each a transaction: `prepare` (a new root joins the bundle), `activate` (it signs), `retire` (the
old root leaves the bundle). A leaf carries exactly one URI SAN.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controller.files import private_directory, write_atomically
from controller.store import Check, Delete, Op, Put, Store, StoreError

ROOT_TTL_S = 10 * 365 * 86400.0
INTERMEDIATE_TTL_S = 365 * 86400.0
LEAF_TTL_S = 86400.0
BACKDATE_S = 60.0  # for clocks that run behind ours; at most a tenth of a life, so that half life stays half life
CSR_BYTES_MAX = 16 << 10
ROOTS_MAX = 4  # in the bundle at once

Key = ec.EllipticCurvePrivateKey
_LEAF_NAME = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Pillion")])


class BadRequest(Exception):
    """The certificate request is not one we sign; the message says why."""


class Generation(msgspec.Struct, frozen=True):
    """One root with its intermediate, as stored under ``ca/<id>``. state: trusted | active."""

    id: int
    root: str  # PEM
    intermediate: str  # PEM
    state: str
    intermediate_not_after: float  # unix seconds
    root_not_after: float


class Leaf(msgspec.Struct, frozen=True):
    """The index of what was issued, under ``serial/<owner>/<serial>``; owner is ``node:<name>``, ``operator:<name>``…"""

    spiffe: str
    key: str  # fingerprint of the public key
    generation: int
    not_before: float
    not_after: float


@dataclass(frozen=True)
class Issued:
    """``chain`` is PEM, leaf first, without the root; ``serial`` lower-case hex without padding."""

    chain: str
    serial: str
    not_after: float  # unix seconds
    owner: str
    leaf: Leaf

    def index(self) -> Put:
        """What to write, in the transaction that lets this certificate out."""
        return Put(f"serial/{self.owner}/{self.serial}", msgspec.json.encode(self.leaf))


@dataclass(frozen=True)
class Request:
    """A verified certificate request: possession of the key is proven, everything else in it is ignored."""

    public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
    fingerprint: str

    @classmethod
    def parse(cls, pem: str) -> Request:
        """Raises BadRequest."""
        if len(pem) > CSR_BYTES_MAX:
            raise BadRequest(f"csr is over {CSR_BYTES_MAX} bytes")
        try:
            csr = x509.load_pem_x509_csr(pem.encode())
            valid = csr.is_signature_valid
            public = csr.public_key()
        except Exception as error:  # the parser raises many types, all of them the asker's doing
            raise BadRequest(f"csr is not a PEM certificate request: {error}") from error
        if not valid:
            raise BadRequest("csr is not signed by its own key")
        if isinstance(public, ec.EllipticCurvePublicKey):
            if not isinstance(public.curve, ec.SECP256R1 | ec.SECP384R1):
                raise BadRequest(f"csr has a key on {public.curve.name}; use P-256")
        elif not isinstance(public, ed25519.Ed25519PublicKey):
            raise BadRequest("csr has no elliptic curve key; use P-256")
        return cls(public, fingerprint(public))


def fingerprint(public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> str:
    """SHA-256 of the public key (SPKI), hex."""
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def serial_text(text: str | int) -> str:
    """The one form of a serial: lower-case hex without leading zeros (TLS libraries pad and shout)."""
    return format(text if isinstance(text, int) else int(text, 16), "x")


class Authority:
    """Issues certificates for one trust domain. Methods that touch the store are coroutines; `sign` only computes."""

    def __init__(self, store: Store, directory: Path, trust_domain: str, generations: list[Generation]) -> None:
        self._store, self._directory, self._trust_domain = store, directory, trust_domain
        self._generations = generations
        self._load_signer()

    @classmethod
    async def open(cls, store: Store, directory: Path, trust_domain: str) -> Authority:
        """Loads the authority from ``store`` and the keys in ``directory``, or makes both. Raises StoreError."""
        private_directory(directory)
        known = await _load(store)
        if not known:
            first = await asyncio.to_thread(_new_generation, 1, directory, trust_domain, "active")
            await store.put("ca/1", msgspec.json.encode(first), expect=0)
            known = [first]
        return cls(store, directory, trust_domain, known)

    @property
    def bundle(self) -> tuple[str, ...]:
        """The roots to trust, PEM; several while a rotation is under way."""
        return tuple(generation.root for generation in self._generations)

    @property
    def generations(self) -> frozenset[int]:
        """Generations whose certificates are still honoured."""
        return frozenset(generation.id for generation in self._generations)

    @property
    def active(self) -> Generation:
        return self._active

    def sign(
        self, request: Request, spiffe: str, owner: str, *, ttl_s: float = LEAF_TTL_S, addresses: Sequence[str] = ()
    ) -> Issued:
        """Makes a leaf for ``spiffe``. Write `Issued.index` before handing it out, or it can never be revoked."""
        now = time.time()
        not_before, not_after = now - min(BACKDATE_S, ttl_s / 10), min(now + ttl_s, self._active.intermediate_not_after)
        serial = x509.random_serial_number()
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe)]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        builder = (
            _builder(_LEAF_NAME, self._issuer.subject, serial, not_before, not_after)
            .public_key(request.public)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(request.public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        pem = _pem(builder.sign(self._key, hashes.SHA256()))
        leaf = Leaf(spiffe, request.fingerprint, self._active.id, not_before, not_after)
        return Issued(pem + self._active.intermediate, serial_text(serial), not_after, owner, leaf)

    async def prepare_rotation(self) -> int:
        """A new root joins the bundle and signs nothing yet. Returns its generation."""
        if len(self._generations) >= ROOTS_MAX:
            raise BadRequest(f"{ROOTS_MAX} roots are trusted already; retire one first")
        number = max(generation.id for generation in self._generations) + 1
        # Numbers of retired generations may be free again; their key files must not be taken for ours.
        while _key_path(self._directory, number, "root").exists():
            number += 1
        made = await asyncio.to_thread(_new_generation, number, self._directory, self._trust_domain, "trusted")
        await self._store.put(f"ca/{number}", msgspec.json.encode(made), expect=0)
        await self._reload()
        return number

    async def activate(self, number: int) -> None:
        """From now on generation ``number`` signs. Call it when every node has acknowledged the longer bundle."""
        chosen = self._find(number)
        changes = {chosen.id: "active", self._active.id: "trusted"} if chosen.id != self._active.id else {}
        await self._write({id_: msgspec.structs.replace(self._find(id_), state=state) for id_, state in changes.items()})

    async def retire(self, number: int) -> None:
        """Takes a root out of the bundle: what it signed is refused. Its key is deleted."""
        if number == self._active.id:
            raise BadRequest(f"generation {number} signs; activate another one first")
        self._find(number)
        await self._write({number: None})
        for kind in ("root", "intermediate"):
            with contextlib.suppress(FileNotFoundError):
                _key_path(self._directory, number, kind).unlink()

    async def renew_intermediate(self) -> bool:
        """Replaces an intermediate that is past half its life; True if it was."""
        if self._active.intermediate_not_after - time.time() > INTERMEDIATE_TTL_S / 2:
            return False
        renewed = await asyncio.to_thread(_new_intermediate, self._active, self._directory, self._trust_domain)
        await self._write({renewed.id: renewed})
        return True

    def _find(self, number: int) -> Generation:
        for generation in self._generations:
            if generation.id == number:
                return generation
        raise BadRequest(f"there is no generation {number}; known: {sorted(self.generations)}")

    async def _write(self, changes: dict[int, Generation | None]) -> None:
        checks: list[Check] = []
        ops: list[Op] = []
        for number, generation in changes.items():
            key = f"ca/{number}"
            entry = await self._store.get(key)
            checks.append(Check(key, entry.revision if entry else 0))
            ops.append(Delete(key) if generation is None else Put(key, msgspec.json.encode(generation)))
        await self._store.transaction(checks, ops)
        await self._reload()

    async def _reload(self) -> None:
        self._generations = await _load(self._store)
        self._load_signer()

    def _load_signer(self) -> None:
        actives = [generation for generation in self._generations if generation.state == "active"]
        if len(actives) != 1:
            raise StoreError(f"the authority has {len(actives)} signing generations instead of one; restore the state directory")
        self._active = actives[0]
        self._issuer = x509.load_pem_x509_certificate(self._active.intermediate.encode())
        self._key = _read_key(_key_path(self._directory, self._active.id, "intermediate"))
        if fingerprint(self._key.public_key()) != _certified(self._issuer):
            raise StoreError("the intermediate's key file does not match its certificate; restore the state directory as a whole")


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def request_for(key: Key) -> Request:
    """A request for a key made here (the controller's own certificate, an operator's)."""
    return Request(key.public_key(), fingerprint(key.public_key()))


async def _load(store: Store) -> list[Generation]:
    _, entries = await store.list("ca/")
    return sorted((msgspec.json.decode(entry.value, type=Generation) for entry in entries), key=lambda g: g.id)


def _certified(certificate: x509.Certificate) -> str:
    public = certificate.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise StoreError("the intermediate has no elliptic curve key; restore the state directory")
    return fingerprint(public)


def _builder(subject: x509.Name, issuer: x509.Name, serial: int, not_before: float, not_after: float) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(serial)
        .not_valid_before(datetime.fromtimestamp(not_before, UTC))
        .not_valid_after(datetime.fromtimestamp(not_after, UTC))
    )


def _usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _new_generation(number: int, directory: Path, trust_domain: str, state: str) -> Generation:
    key, now = new_key(), time.time()
    not_after = now + ROOT_TTL_S
    name = _name(trust_domain, f"root {number}")
    certificate = (
        _builder(name, name, x509.random_serial_number(), now - BACKDATE_S, not_after)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_key(_key_path(directory, number, "root"), key)
    bare = Generation(number, _pem(certificate), "", state, 0.0, not_after)
    return _new_intermediate(bare, directory, trust_domain)


def _new_intermediate(generation: Generation, directory: Path, trust_domain: str) -> Generation:
    root_key = _read_key(_key_path(directory, generation.id, "root"))
    root = x509.load_pem_x509_certificate(generation.root.encode())
    # A renewed intermediate keeps its key: a crash between key file and certificate can then not part them.
    path = _key_path(directory, generation.id, "intermediate")
    key = _read_key(path) if generation.intermediate else new_key()
    now = time.time()
    not_after = min(now + INTERMEDIATE_TTL_S, generation.root_not_after)
    name = _name(trust_domain, f"intermediate {generation.id}")
    certificate = (
        _builder(name, root.subject, x509.random_serial_number(), now - BACKDATE_S, not_after)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    _write_key(path, key)
    return msgspec.structs.replace(generation, intermediate=_pem(certificate), intermediate_not_after=not_after)


def _name(trust_domain: str, role: str) -> x509.Name:
    common = f"{trust_domain} {role}"
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Pillion"), x509.NameAttribute(NameOID.COMMON_NAME, common[:64])]
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_path(directory: Path, number: int, kind: str) -> Path:
    return directory / f"{number}.{kind}.key"


def _write_key(path: Path, key: Key) -> None:
    write_atomically(path, key_pem(key))


def _read_key(path: Path) -> Key:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} is missing but the database knows its certificate; restore the state directory as a whole"
        ) from error
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except ValueError as error:
        raise StoreError(f"{path} is damaged; restore the state directory from a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StoreError(f"{path} holds no elliptic curve key; restore the state directory from a backup")
    return key
