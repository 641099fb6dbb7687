"""Keys and certificates, as functions: made on the node, asked for with a CSR, checked when the answer comes.

Key bytes travel in `Secret`, which prints as ``Secret(…)``: no log line can carry one by accident.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import random
import time
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CHAIN_BYTES_MAX = 64 << 10
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class CertificateRefused(ValueError):
    """What came back is not what was asked for; it is not used."""


class Secret:
    """PEM of a private key."""

    __slots__ = ("pem",)

    def __init__(self, pem: bytes) -> None:
        self.pem = pem

    def __repr__(self) -> str:
        return "Secret(…)"


def make_key() -> Secret:
    """EC P-256, PKCS#8 PEM."""
    return Secret(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def _load(key: Secret) -> ec.EllipticCurvePrivateKey:
    try:
        loaded = serialization.load_pem_private_key(key.pem, None)
    except (ValueError, TypeError) as error:
        raise CertificateRefused("the stored key is not a PEM key") from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise CertificateRefused("the stored key is not an EC key")
    return loaded


def make_csr(key: Secret, uri: str = "", common_name: str = "") -> str:
    """PEM of a request. The controller takes the key from it and decides all else; the names are for people."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])] if common_name else [])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if uri:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = builder.add_extension(names, critical=not common_name)
    return builder.sign(_load(key), hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def _instant(certificate: x509.Certificate, name: str) -> float:
    aware = getattr(certificate, f"{name}_utc", None)  # since cryptography 42
    if not isinstance(aware, datetime.datetime):
        aware = getattr(certificate, name).replace(tzinfo=datetime.UTC)
    return float(aware.timestamp())


class Leaf:
    """What the node needs to know about a certificate chain it holds."""

    def __init__(self, chain: str) -> None:
        """Raises CertificateRefused when the first certificate of ``chain`` (PEM, leaf first) cannot be read."""
        if len(chain) > CHAIN_BYTES_MAX:
            raise CertificateRefused(f"a chain of {len(chain)} bytes; at most {CHAIN_BYTES_MAX}")
        try:
            certificate = x509.load_pem_x509_certificate(chain.encode())
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, x509.ExtensionNotFound) as error:
            raise CertificateRefused("no certificate with a subject alternative name") from error
        self.uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        self.serial = format(certificate.serial_number, "x")
        self.not_before = _instant(certificate, "not_valid_before")
        self.not_after = _instant(certificate, "not_valid_after")
        self._public = certificate.public_key()

    def check(self, key: Secret, uri: str, now: float | None = None) -> Leaf:
        """Returns itself if it certifies this key for this URI now. Raises CertificateRefused."""
        spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        if self._public.public_bytes(*spki) != _load(key).public_key().public_bytes(*spki):
            raise CertificateRefused("the certificate is for another key")
        if self.uris != [uri]:
            raise CertificateRefused(f"the certificate names {', '.join(self.uris) or 'nobody'}, asked was {uri}")
        if self.not_after <= (time.time() if now is None else now):
            raise CertificateRefused("the certificate has expired; is this node's clock right?")
        return self


def renew_at(not_before: float, not_after: float, rng: random.Random) -> float:
    """Unix seconds of the next renewal: half of the life, ± 10 % of it, so that a fleet does not ask at once."""
    life = max(not_after - not_before, 0.0)
    return not_before + life * (0.5 + rng.uniform(-0.1, 0.1))


def sealed_memfd(key: Secret) -> int:
    """A descriptor with the PEM that nobody can change any more, reader included. The caller closes it."""
    fd = os.memfd_create("svid", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(key.pem)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def bundle_text(roots: Iterable[str]) -> str:
    """PEM roots as one text."""
    return "".join(root if root.endswith("\n") else root + "\n" for root in roots)
