"""What a program needs that speaks HBONE to a proxy by hand, as a node that was taken over would: the certificate of one of
the node's workloads, and HTTP/2 to the letter. For the attacks and floods of tests/ and bench/; h2 is of the extra `dev`."""

from __future__ import annotations

import json
import ssl
import struct
import tempfile
from pathlib import Path

import h2.config
import h2.connection

SETTINGS, HEADERS, CONTINUATION = 4, 1, 9  # RFC 9113


def certified(state: Path, who: str) -> ssl.SSLContext:
    """A client with the chain and key of `namespace/account` as an agent stores them below its --state-dir: a JSON file for
    each identity. SystemExit where there is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(state / "bundle.pem")
    context.set_alpn_protocols(["h2"])
    namespace, account = who.split("/")
    for path in state.rglob("*"):
        if not path.is_file() or b'"chain"' not in (text := path.read_bytes()):
            continue
        stored = json.loads(text)
        if stored["spiffe"].endswith(f"/ns/{namespace}/sa/{account}"):
            with tempfile.NamedTemporaryFile("w") as pem:
                pem.write(stored["chain"] + stored["key"])
                pem.flush()
                context.load_cert_chain(pem.name)
            return context
    raise SystemExit(f"{state} holds no certificate of {who}")


def http2() -> h2.connection.H2Connection:
    """A client's end that sends what it is told to, well formed or not; its preface is to be sent."""
    config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
    peer = h2.connection.H2Connection(config)
    peer.initiate_connection()
    return peer


def tunnel(authority: str, forwarded: str = "") -> list[tuple[str, str]]:
    """The head that asks for a stream to `authority`."""
    head = [(":method", "CONNECT"), (":authority", authority)]
    return [*head, ("forwarded", forwarded)] if forwarded else head


def frame(type_: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return struct.pack("!I", len(body))[1:] + struct.pack("!BBI", type_, flags, stream) + body


def endless_head() -> tuple[bytes, bytes]:
    """A preface and the beginning of a head; and a frame that goes on with it, as often as it is sent."""
    begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0) + frame(HEADERS, 0, 1, b"\x00\x01a\x01b")
    return begin, frame(CONTINUATION, 0, 1, (b"\x00\x01a\x7f\x81\x07" + b"b" * 262) * 50)
