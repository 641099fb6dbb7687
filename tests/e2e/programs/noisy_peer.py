"""A peer of the mesh with a certificate that makes noise on HBONE. argv: kind state who host sni authority forwarded count
seconds (how long it waits to be hung up on). handshakes: so many TCP connections that never speak; resets: so many streams,
each reset at once; continuations: a head that never ends. Prints JSON {"made": n, "ended": bool}: how many of them were
made, and whether the proxy hung up."""

import json
import socket
import ssl
import struct
import sys
import tempfile
from pathlib import Path

import h2.config
import h2.connection

kind, state, who, host, sni, authority, forwarded, number, seconds = sys.argv[1:10]
count = int(number)


def frame(type_: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return struct.pack("!I", len(body))[1:] + struct.pack("!BBI", type_, flags, stream) + body


def tls() -> ssl.SSLSocket:
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
    sock = context.wrap_socket(socket.create_connection((host, 15008), 5), server_hostname=sni)
    sock.settimeout(5)
    return sock


def gone(sock: socket.socket) -> bool:
    sock.settimeout(float(seconds))
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def handshakes() -> tuple[int, bool]:
    held = [socket.create_connection((host, 15008), 5) for _ in range(count)]
    ended = 0
    for sock in held:
        sock.settimeout(0.5)
        try:
            ended += not sock.recv(1)
        except TimeoutError:
            break  # the first that is kept is followed by the ended ones, but those were reset at once
        except OSError:
            ended += 1
    for sock in held:
        sock.close()
    return count, bool(ended)


def resets() -> tuple[int, bool]:
    sock = tls()
    peer = h2.connection.H2Connection(
        h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
    )
    peer.initiate_connection()
    made = 0
    try:
        for index in range(count):
            headers = [(":method", "CONNECT"), (":authority", authority), ("forwarded", forwarded)]
            peer.send_headers(2 * index + 1, headers)
            peer.reset_stream(2 * index + 1, 8)
            sock.sendall(peer.data_to_send())
            made += 1
    except OSError:
        return made, True
    return made, gone(sock)


def continuations() -> tuple[int, bool]:
    sock = tls()
    sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 0, 1, b"\x00\x01a\x01b"))
    made = 0
    try:
        for _ in range(count):
            sock.sendall(frame(9, 0, 1, (b"\x00\x01a\x7f\x81\x07" + b"b" * 262) * 50))
            made += 1
    except OSError:
        return made, True
    return made, gone(sock)


made, ended = {"handshakes": handshakes, "resets": resets, "continuations": continuations}[kind]()
print(json.dumps({"made": made, "ended": ended}))
