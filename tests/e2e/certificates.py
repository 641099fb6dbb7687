"""Certificates for whoever attacks :15008: good ones by the mesh's own authority, whose key the test may read, and bad ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOUR_S = 3600.0
BOTH = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> str:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()


def request_pem(key: Key) -> str:
    """A certificate signing request."""
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


@dataclass(frozen=True)
class Issuer:
    """Whoever signs."""

    certificate: x509.Certificate
    key: Key

    @classmethod
    def foreign(cls) -> Issuer:
        """A root of its own, that no mesh trusts."""
        key, name = new_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody else")])
        builder = _builder(name, name, -HOUR_S, HOUR_S).public_key(key.public_key())
        made = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
        return cls(made, key)

    def issue(
        self,
        uris: Sequence[str],
        *,
        usages: Sequence[x509.ObjectIdentifier] = BOTH,
        starts_in_s: float = -60.0,
        ends_in_s: float = HOUR_S,
    ) -> tuple[str, str]:
        """(chain, key), PEM. No usages: without the extension."""
        key = new_key()
        builder = (
            _builder(x509.Name([]), self.certificate.subject, starts_in_s, ends_in_s)
            .public_key(key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        )
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        leaf = builder.sign(self.key, hashes.SHA256())
        chain = "".join(each.public_bytes(serialization.Encoding.PEM).decode() for each in (leaf, self.certificate))
        return chain, key_pem(key)


def _builder(subject: x509.Name, issuer: x509.Name, starts_in_s: float, ends_in_s: float) -> x509.CertificateBuilder:
    now = time.time()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(now + starts_in_s, UTC))
        .not_valid_after(datetime.fromtimestamp(now + ends_in_s, UTC))
    )
