"""threats.md 16: take the proxy's port in one's own namespace, or join its listener."""

from __future__ import annotations

import sys

import pytest

from tests.e2e.mesh import Mesh

BIND = """
import socket, sys
address, port = sys.argv[1], int(sys.argv[2])
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    s.bind((address, port))
    s.listen()
    print("PASSED")
except OSError as e:
    print(type(e).__name__)
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
@pytest.mark.parametrize("port", [15001, 15008, 15053])
def test_our_ports_cannot_be_bound(mesh: Mesh, address: str, port: int) -> None:
    before = mesh.denied("n1", "bind_denied")
    out = mesh.w["intruder"].run([sys.executable, "-c", BIND, address, str(port)], timeout=15)
    assert out.stdout.strip() == "PermissionError", out.stdout
    assert mesh.denied("n1", "bind_denied") > before
