"""Certificates on :15008: TLS 1.3 contexts from a workload's SVID, the choice of certificate by address and
SNI, and what a peer's certificate must be before a byte of it is believed.

The key comes as a sealed memfd and is loaded through ``/proc/self/fd``; no key ever has a path on disk.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Protocol

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from mesh.identity import SpiffeId

ALPN = "h2"
SAN_URIS_MAX = 1  # SPIFFE: exactly one URI
CERTIFICATES_MAX = 1024  # read ones that are remembered
_VERIFY_REASONS = {9: "cert_not_yet_valid", 10: "cert_expired", 26: "cert_eku"}  # X509_V_ERR_*


class Svid(Protocol):
    """What `contexts` needs of a worker's SVID entry."""

    @property
    def chain(self) -> str: ...
    @property
    def key_fd(self) -> int: ...
    @property
    def serial(self) -> str: ...
    @property
    def not_after(self) -> float: ...


class PeerRefused(Exception):
    """The peer's certificate is not good enough. ``reason`` is a counted enum, ``detail`` is for the log."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """What a verified leaf says. ``serial`` is lower-case hex without leading zeros, times are unix seconds."""

    spiffe: str
    serial: str
    not_before: float
    not_after: float


def serial_text(serial: str) -> str:
    """One spelling for serials, whoever wrote them. Raises ValueError."""
    return f"{int(serial.replace(':', ''), 16):x}"


def revoked_serials(revoked: Iterable[str]) -> frozenset[str]:
    """The serials in ``Config.revoked``; the ``node:<name>`` entries are `revoked_nodes`'s."""
    out = set()
    for entry in revoked:
        if not entry.startswith("node:"):
            try:
                out.add(serial_text(entry))
            except ValueError:
                continue  # the controller's spelling mistake revokes nothing; it has no serial to match
    return frozenset(out)


def revoked_nodes(revoked: Iterable[str]) -> frozenset[str]:
    return frozenset(entry.removeprefix("node:") for entry in revoked if entry.startswith("node:"))


def _unix(certificate: x509.Certificate, name: str) -> float:
    aware = getattr(certificate, f"{name}_utc", None)  # cryptography >= 42
    if aware is None:
        naive: datetime = getattr(certificate, name)
        aware = naive.replace(tzinfo=UTC)
    return float(aware.timestamp())


@lru_cache(CERTIFICATES_MAX)  # a peer shows the same one again and again; verified before, so it is of this mesh
def read_certificate(der: bytes | None) -> tuple[PeerCertificate, frozenset[str]]:
    """The certificate's facts and its extended key usages (dotted). Raises PeerRefused when it is no SVID."""
    if not der:
        raise PeerRefused("cert_missing", "the peer sent no certificate")
    try:
        certificate = x509.load_der_x509_certificate(der)
        sans = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = sans.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound as error:
        raise PeerRefused("cert_spiffe", "the certificate has no subject alternative name") from error
    except ValueError as error:
        raise PeerRefused("cert_malformed", str(error)) from error
    if len(uris) != SAN_URIS_MAX:
        raise PeerRefused("cert_spiffe", f"the certificate names {len(uris)} URIs, an SVID names one")
    try:
        spiffe = str(SpiffeId.parse(uris[0]))
    except ValueError as error:
        raise PeerRefused("cert_spiffe", f"{uris[0]!r} is not a workload's identity: {error}") from error
    try:
        usages = frozenset(
            oid.dotted_string for oid in certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        )
    except x509.ExtensionNotFound:
        usages = frozenset()
    facts = PeerCertificate(
        spiffe, f"{certificate.serial_number:x}", _unix(certificate, "not_valid_before"), _unix(certificate, "not_valid_after")
    )
    return facts, usages


_USAGES = {ExtendedKeyUsageOID.CLIENT_AUTH.dotted_string, ExtendedKeyUsageOID.SERVER_AUTH.dotted_string}


def check_peer(der: bytes | None, trust_domain: str, revoked: frozenset[str], now: float | None = None) -> PeerCertificate:
    """The peer behind a chain OpenSSL has already verified against the mesh's bundle. Raises PeerRefused.

    ``revoked``: serials as `revoked_serials` gives them. OpenSSL checks an extended key usage only where there is
    one; an SVID must carry both, since a workload is a client and a server.
    """
    peer, usages = read_certificate(der)
    if SpiffeId.parse(peer.spiffe).trust_domain != trust_domain:
        raise PeerRefused("cert_trust_domain", f"{peer.spiffe} is not of {trust_domain}")
    if not usages >= _USAGES:
        raise PeerRefused("cert_eku", "the certificate lacks client and server authentication")
    check_times(peer, revoked, time.time() if now is None else now)
    return peer


def check_times(peer: PeerCertificate, revoked: frozenset[str], now: float) -> None:
    """What may change while a connection lives. Raises PeerRefused."""
    if now >= peer.not_after:
        raise PeerRefused("cert_expired", f"the certificate of {peer.spiffe} ended {now - peer.not_after:.0f} s ago")
    if now < peer.not_before - 60:  # clocks
        raise PeerRefused("cert_not_yet_valid", f"the certificate of {peer.spiffe} starts in {peer.not_before - now:.0f} s")
    if peer.serial in revoked:
        raise PeerRefused("cert_revoked", f"certificate {peer.serial} of {peer.spiffe} is revoked")


def refusal_of(error: Exception) -> PeerRefused:
    """What a failed handshake was, as a counted reason."""
    if isinstance(error, PeerRefused):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return PeerRefused(_VERIFY_REASONS.get(error.verify_code, "cert_untrusted"), error.verify_message)
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return PeerRefused("cert_missing", "the peer sent no certificate")
        if reason in {"UNSUPPORTED_PROTOCOL", "NO_SHARED_CIPHER", "WRONG_VERSION_NUMBER", "HTTP_REQUEST"}:
            return PeerRefused("tls_version", "the peer does not speak TLS 1.3")
        return PeerRefused("tls_handshake", reason.lower() or str(error))
    return PeerRefused("tls_handshake", f"{type(error).__name__}: {error}")


def _context(purpose: int, bundle: Iterable[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # identities are SPIFFE URIs; `check_peer` compares them
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([ALPN])
    roots = "\n".join(bundle)
    if roots:
        context.load_verify_locations(cadata=roots)
    return context


def _load(context: ssl.SSLContext, svid: Svid) -> None:
    chain = os.memfd_create("chain", os.MFD_CLOEXEC)  # load_cert_chain takes paths only
    try:
        os.write(chain, svid.chain.encode())
        context.load_cert_chain(f"/proc/self/fd/{chain}", f"/proc/self/fd/{svid.key_fd}")
    finally:
        os.close(chain)


class ServerSide(ssl.SSLObject):
    """A server's end of a handshake that remembers whose certificate it showed, or why none."""

    served: str | None = None
    refused: str | None = None


class Contexts:
    """TLS contexts of one worker, made when first asked for and kept until their SVID or the bundle changes. A server's is
    asked for in the midst of a handshake, by another thread."""

    def __init__(self, svids: Callable[[], Mapping[str, Svid]]) -> None:
        self._svids = svids
        self._bundle: tuple[str, ...] = ()
        self._made: dict[tuple[str, bool], tuple[str, ssl.SSLContext]] = {}
        self._lock = threading.Lock()  # what is forgotten is not made from what was before, nor its key's descriptor used

    def set_bundle(self, bundle: tuple[str, ...]) -> None:
        """The mesh's roots (PEM). Contexts of another bundle are forgotten; live connections keep theirs."""
        if bundle != self._bundle:
            with self._lock:
                self._bundle = bundle
                self._made.clear()

    def forget(self, spiffe: str) -> None:
        with self._lock:
            self._made.pop((spiffe, True), None)
            self._made.pop((spiffe, False), None)

    def _get(self, spiffe: str, server: bool) -> ssl.SSLContext:
        with self._lock:
            svid = self._svids().get(spiffe)
            if svid is None:
                raise PeerRefused("no_svid", f"this node holds no certificate for {spiffe} yet")
            made = self._made.get((spiffe, server))
            if made is not None and made[0] == svid.serial:
                return made[1]
            context = _context(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT, self._bundle)
            _load(context, svid)
            if server:
                context.num_tickets = 0  # no resumption: every connection shows its certificate
            self._made[spiffe, server] = (svid.serial, context)
            return context

    def client(self, spiffe: str) -> ssl.SSLContext:
        """Raises PeerRefused("no_svid"), ssl.SSLError or OSError for a key that does not load."""
        return self._get(spiffe, server=False)

    def server(self, spiffe: str) -> ssl.SSLContext:
        return self._get(spiffe, server=True)

    def front(self, identities: Callable[[], Iterable[str]]) -> ssl.SSLContext:
        """A context that picks the certificate by SNI among ``identities()``, those of the listener's address.

        Without SNI the certificate must be the only one there. A name nobody here has ends the handshake.
        """
        context = _context(ssl.PROTOCOL_TLS_SERVER, self._bundle)
        context.num_tickets = 0
        context.sslobject_class = ServerSide

        def choose(sslobj: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int | None:
            if not isinstance(sslobj, ServerSide):
                return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
            here = list(identities())
            found = [spiffe for spiffe in here if name is None or SpiffeId.parse(spiffe).sni() == name]
            if len(found) != 1:
                sslobj.refused = "sni_missing" if name is None else "sni_unknown"
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
            try:
                sslobj.context = self.server(found[0])
            except (PeerRefused, OSError) as error:
                sslobj.refused = error.reason if isinstance(error, PeerRefused) else "svid_unusable"
                return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
            sslobj.served = found[0]
            return None

        context.sni_callback = choose
        return context
