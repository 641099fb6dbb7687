"""threats.md 4: make the proxy read a wrong original destination."""

from __future__ import annotations

import sys

import pytest

from tests.e2e.mesh import Mesh

DIAL = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
s = socket.socket(family)
s.settimeout(5)
try:
    s.connect((sys.argv[1], 15001))
    print("PASSED")
except OSError as e:
    print(type(e).__name__)
"""

REUSE = """
import socket, sys
# A captured connection, disconnected (AF_UNSPEC) and used again for another destination.
import ctypes
s = socket.socket()
s.settimeout(5)
s.connect((sys.argv[1], 8080))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.connect(s.fileno(), bytes(16), 16) == 0, ctypes.get_errno()
s.connect((sys.argv[2], 8080))
s.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
out = b""
while data := s.recv(65536): out += data
print(out.decode())
"""

FLOOD = """
import socket, sys
good = 0
for i in range(2000):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex((sys.argv[1], 8080))
    s.close()
print("done")
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_workload_cannot_dial_the_proxys_listener(mesh: Mesh, address: str) -> None:
    before = mesh.denied("n1", "reserved_port")
    assert mesh.w["intruder"].run([sys.executable, "-c", DIAL, address], timeout=15).stdout.strip() == "PermissionError"
    assert mesh.denied("n1", "reserved_port") > before


def test_a_reused_socket_means_its_newest_destination(mesh: Mesh) -> None:
    web, far = (mesh.w[name].addresses[0] for name in ("web", "far"))
    out = mesh.w["client"].run([sys.executable, "-c", REUSE, web, far], timeout=20)
    assert "far for" in out.stdout, out.stdout + out.stderr


def test_a_flood_of_connects_evicts_nobodys_origin(mesh: Mesh) -> None:
    address = mesh.w["web"].addresses[0]
    flood = mesh.w["intruder"].start([sys.executable, "-c", FLOOD, address], name="flood")
    for _ in range(20):
        status, body = mesh.curl("client", f"http://{address}:8080/")
        assert status == 200, body
        assert "web for" in body
    assert flood is not None
