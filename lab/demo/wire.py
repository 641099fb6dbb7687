"""What an observer between the nodes can see: frames by port, markers in them, certificates that are shown."""

from __future__ import annotations

import ssl
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from subprocess import CompletedProcess
from typing import Any

from cryptography import x509

from lab import Lab
from lab.capture import Capture
from lab.demo.shop import SERVICES, NotSeen
from lab.pace import SLOW
from mesh.ports import HBONE_PORT

SERVING_S_MAX = 20.0 * SLOW  # from a server's start to its first word

_SHOW = textwrap.dedent("""
    import socket, ssl, sys
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as sock:
        with context.wrap_socket(sock, server_hostname=sys.argv[3]) as tls:
            print(ssl.DER_cert_to_PEM_cert(tls.getpeercert(True)))
""")


def certificate(run: Callable[[Sequence[str]], CompletedProcess[str]], address: str) -> tuple[str, str]:
    """(serial, URI) of what the catalog at `address` shows on :15008 to anyone who asks. `run`: outside the mesh."""
    done = run([sys.executable, "-c", _SHOW, address, str(HBONE_PORT), "catalog.shop.mesh.local"])
    if done.returncode != 0:
        raise NotSeen(f"no TLS handshake with {address}:{HBONE_PORT}: {done.stderr.strip()[-300:]}")
    shown = x509.load_der_x509_certificate(ssl.PEM_cert_to_DER_cert(done.stdout.strip()))
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return f"{shown.serial_number:x}", str(names.get_values_for_type(x509.UniformResourceIdentifier)[0])


def tcp_on(seen: Capture, port: int) -> list[Any]:
    """The captured packets of TCP connections with a port, by scapy."""
    from scapy.layers.inet import TCP

    return [packet for packet in seen.packets() if packet.haslayer(TCP) and port in (packet[TCP].sport, packet[TCP].dport)]


def marker_without_mesh(name: str, marker: str, requests: int) -> int:
    """The same exchange in a lab `name` without a mesh: in how many frames between the nodes the marker is to be read."""
    lab = Lab(name)
    lab.down()
    try:
        lab.up(2, mesh=False)
        server, client = lab.add_workload("n2", "catalog"), lab.add_workload("n1", "client")
        serving = server.start([sys.executable, str(SERVICES / "catalog.py"), "catalog", "v1", "8000"], "server")
        deadline = time.monotonic() + SERVING_S_MAX
        while "catalog v1" not in serving.output():
            if not serving.alive or time.monotonic() > deadline:
                raise NotSeen(f"the server without mesh does not serve: {serving.output()[-300:] or 'it says nothing'}")
            time.sleep(0.02)
        load = [sys.executable, str(SERVICES / "load.py"), f"{server.address}:8000", "/echo", str(requests), "1", marker]
        with lab.capture("n2") as seen:
            client.run(load, timeout=30, check=True)
        return seen.contains(marker.encode())
    finally:
        lab.down()
