"""security.md 9: a joined workload, or somebody else, shows the far proxy a certificate that is not good enough."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from lab.pace import SLOW
from tests.attacks.mutants import Counted, Mutant
from tests.attacks.test_09_authority import ANY_ADDRESS, PROGRAM, allowed, ask, far_client_allowed, taken_over
from tests.e2e.certificates import HOUR_S, Issuer
from tests.e2e.mesh import HTTP_PORT, TRUST_DOMAIN, Mesh, until
from tests.e2e.test_fail_closed import FAR_CLIENT, authority_of, loot, told

__all__ = ["far_client_allowed", "taken_over"]

FOREIGN = Issuer.foreign()

ANY_USAGE = Mutant(
    "d",
    "a peer's certificate says it is for that",
    ("l7proxy/tls.py", "    if not usages >= _USAGES:\n", "    if False:\n"),
)
ANY_TIME = Mutant(
    "d",
    "a certificate has its time",
    ("l7proxy/tls.py", "    context.verify_mode = ssl.CERT_REQUIRED\n",
     "    context.verify_mode = ssl.CERT_REQUIRED\n    context.verify_flags |= 0x200000  # X509_V_FLAG_NO_CHECK_TIME\n"),
    ("l7proxy/tls.py", "    if now >= peer.not_after:\n", "    if False:\n"),
    ("l7proxy/tls.py", "    if now < peer.not_before - 60:  # clocks\n", "    if False:\n"),
)  # fmt: skip
ANY_SUBJECT = Mutant(
    "d",
    "a certificate names one identity, of a workload",
    ("l7proxy/tls.py", "    if len(uris) != SAN_URIS_MAX:\n", "    if not uris:\n"),
    ("l7proxy/tls.py", "        spiffe = str(SpiffeId.parse(uris[0]))\n", "        spiffe = uris[0]\n"),
)
ANY_MESH = Mutant(
    "d",
    "a certificate is of this mesh",
    ("l7proxy/tls.py", "    if SpiffeId.parse(peer.spiffe).trust_domain != trust_domain:\n", "    if not trust_domain:\n"),
    ("l7proxy/admission.py", "    if peer.spiffe not in config.spiffe_id:\n", "    if not peer.spiffe:\n"),
    (
        "l7proxy/tls.py",
        "        context.load_verify_locations(cadata=roots)\n",
        f"        context.load_verify_locations(cadata=roots + {FOREIGN.certificate.public_bytes(Encoding.PEM).decode()!r})\n",
    ),
)
PAST_ITS_END = Mutant(
    "d",
    "a tunnel ends with its certificate",
    ("l7proxy/inbound.py", "            if wall >= tunnel.peer.not_after:\n", "            if False:\n"),
)
LIFE_S = 2.0 * SLOW  # of a certificate; a second is lost to rounding


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "expired": ("cert_expired", {"starts_in_s": -2 * HOUR_S, "ends_in_s": -HOUR_S}),
    "not-yet": ("cert_not_yet_valid", {"starts_in_s": HOUR_S, "ends_in_s": 2 * HOUR_S}),
    "no-usage": ("cert_eku", {"usages": ()}),
    "server-only": ("cert_eku", {"usages": (x509.oid.ExtendedKeyUsageOID.SERVER_AUTH,)}),
    "client-only": ("cert_eku", {"usages": (x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH,)}),
    "foreign-domain": ("cert_trust_domain", {"uris": ["spiffe://other.local/ns/shop/sa/far-client"]}),
    "two-identities": ("cert_spiffe", {"uris": [FAR_CLIENT, f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/client"]}),
    "node": ("cert_spiffe", {"uris": [f"spiffe://{TRUST_DOMAIN}/node/n2"]}),
    "unheard-of": ("identity_unknown", {"uris": [f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/ghost"]}),
    "elsewhere": ("peer_address", {"uris": [f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/client"]}),
}


def knocked(mesh: Mesh, folder: Path) -> dict[str, str]:
    """By what is wrong with a certificate: the answer to who shows it."""
    issued = {name: authority_of(mesh).issue(**{"uris": [FAR_CLIENT], **how}) for name, (_, how) in BAD.items()}
    issued["another-authority"] = FOREIGN.issue([FAR_CLIENT])
    web, source = mesh.w["web"].addresses[0], mesh.w["far-client"].addresses[0]
    states = [str(loot(mesh, folder / name, *pair)) for name, pair in issued.items()]
    argv = [
        *(sys.executable, str(PROGRAM), "--state", *states, "--who", "shop/far-client", "--sni", "web.shop.mesh.local"),
        *("--dial", web, "--authority", f"{web}:{HTTP_PORT}", "--forwarded", f'for="{source}:4242"'),
    ]
    return dict(zip(issued, json.loads(mesh.unhooked("far-client", argv))["answers"], strict=True))


@pytest.mark.attack("a bad certificate")
@pytest.mark.usefixtures("far_client_allowed")
def test_bad_certificates_are_refused_each_for_its_own_reason(mesh: Mesh, counted: Counted, tmp_path: Path) -> None:
    reasons = Counter([*(reason for reason, _ in BAD.values()), "cert_untrusted"])
    before, since = {reason: mesh.denied("n1", reason) for reason in reasons}, time.time() - 1
    answers = knocked(mesh, tmp_path)
    assert not [name for name, answer in answers.items() if answer[:3].isdigit()], answers
    until(lambda: {each: mesh.denied("n1", each) - before[each] for each in reasons} == reasons, "each is counted once")
    for reason in reasons:
        told(mesh, "n1", reason, since)
    counted.reasons.update(reasons)


@pytest.mark.red("a bad certificate", ANY_TIME)
@pytest.mark.red("a bad certificate", ANY_USAGE)
@pytest.mark.red("a bad certificate", ANY_SUBJECT)
@pytest.mark.red("a bad certificate", ANY_MESH)
@pytest.mark.red("a bad certificate", ANY_ADDRESS)
def test_bad_certificates_open_a_tunnel_without(broken: Mesh, tmp_path: Path) -> None:
    """(One for servers alone, OpenSSL itself refuses.)"""
    with allowed(broken):
        answers = knocked(broken, tmp_path)
    assert not answers.pop("server-only")[:3].isdigit()
    assert set(answers.values()) == {"200"}, answers


def past_its_end(mesh: Mesh, folder: Path) -> str:
    """What becomes of a tunnel that was opened shortly before."""
    for life_s in (LIFE_S, 3 * LIFE_S, 9 * LIFE_S):  # on a busy machine it may be over before a tunnel is open
        state = loot(mesh, folder, *authority_of(mesh).issue([FAR_CLIENT], ends_in_s=1.0 + life_s))
        answer = ask(mesh, f"{mesh.w['web'].addresses[0]}:{HTTP_PORT}", state=state, stay_s=life_s + 2.5)
        if answer.startswith("200 "):
            break
    return answer


@pytest.mark.attack("a tunnel that outlives its certificate")
@pytest.mark.usefixtures("far_client_allowed")
def test_a_tunnel_ends_when_its_certificate_does(mesh: Mesh, counted: Counted, tmp_path: Path) -> None:
    with counted(mesh, "n1", "cert_expired"):
        assert past_its_end(mesh, tmp_path / "state") == "200 ended"


@pytest.mark.red("a tunnel that outlives its certificate", PAST_ITS_END)
def test_a_tunnel_outlives_its_certificate_without(broken: Mesh, tmp_path: Path) -> None:
    with allowed(broken):
        assert past_its_end(broken, tmp_path / "state") == "200 open"
