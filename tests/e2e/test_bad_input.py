"""Bad input gets a clear error and changes nothing."""

from __future__ import annotations

import json
import sys

import pytest

from lab.api import ApiError
from tests.e2e.mesh import Mesh, policy

RAW = """
import socket, sys
s = socket.create_connection((sys.argv[1], 8080), timeout=15)
s.sendall(sys.argv[2].encode().decode("unicode_escape").encode("latin1"))
out = b""
try:
    while data := s.recv(65536):
        out += data
        if sys.argv[3:] == ["one"] and b"\\r\\n\\r\\n" in out: break
except OSError as e:
    out += repr(e).encode()
sys.stdout.write(out.decode("latin1"))
"""


def raw(mesh: Mesh, text: str, *options: str) -> str:
    address = mesh.w["web"].addresses[0]
    return mesh.w["client"].run([sys.executable, "-c", RAW, address, text, *options], timeout=30).stdout


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ("kind: [", ""),
        ("apiVersion: v1\nkind: Elephant\nmetadata: {name: x}\n", "kind"),
        (policy("x", "web").replace("ALLOW", "MAYBE"), "spec.action"),
        (policy("x", "web", operation='{ports: ["70000"]}'), "ports"),
        (policy("UPPER", "web"), "metadata.name"),
        (policy("x", "web").replace("spec:", "spec:\n  unknown: 1"), "unknown"),
    ],
    ids=["malformed", "wrong-kind", "wrong-value", "out-of-range", "bad-name", "unknown-field"],
)
def test_bad_resources_name_the_place_and_the_remedy(mesh: Mesh, document: str, field: str) -> None:
    before = mesh.lab.controller_api("GET", "/v1/status")["revision"]
    good = policy("must-not-appear", "web")
    with pytest.raises(ApiError) as caught:
        mesh.lab.apply(good + "---\n" + document.removeprefix("---\n"))
    assert caught.value.status == 400
    error = json.loads(caught.value.body)["errors"][0]
    assert field in error["field"] or field in error["message"]
    assert error["line"] > 0
    assert error["remedy"]
    assert mesh.lab.controller_api("GET", "/v1/status")["revision"] == before


HEAD = "GET / HTTP/1.1\\r\\nHost: web.shop.mesh\\r\\n"


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("POST / HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 3\\r\\nContent-Length: 4\\r\\n\\r\\nabcd", 400),
        ("POST / HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 3\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n0\\r\\n\\r\\n", 400),
        (HEAD + "X: a\\r\\n b\\r\\n\\r\\n", 400),
        ("GET / HTTP/1.1\\nHost: a\\n\\n", 400),
        (HEAD + "X: a\\x00b\\r\\n\\r\\n", 400),
        ("GET / HTTP/1.1\\r\\n\\r\\n", 400),
        ("PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n", 505),
        (HEAD + "Upgrade: h2c\\r\\nConnection: upgrade\\r\\n\\r\\n", 400),
        ("POST / HTTP/1.1\\r\\nHost: a\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\nzz\\r\\n", 400),
        (HEAD + "X: " + "a" * 40000 + "\\r\\n\\r\\n", 431),
    ],
    ids=["two-lengths", "length-and-chunked", "fold", "bare-lf", "nul", "no-host", "pri", "h2c", "bad-chunk", "oversized"],
)
def test_bad_requests_are_answered_and_closed(mesh: Mesh, request_text: str, status: int) -> None:
    answer = raw(mesh, request_text)
    assert answer.startswith(f"HTTP/1.1 {status} "), answer[:300]
    assert answer.count("x-pillion-reason:") == 1
    assert "connection: close" in answer.lower()


@pytest.mark.timeout(60)
def test_a_slow_head_gets_a_408(mesh: Mesh) -> None:
    answer = raw(mesh, HEAD)  # and nothing more
    assert answer.startswith("HTTP/1.1 408 "), answer[:300]


JUNK = """
import socket, sys
s = socket.create_connection((sys.argv[1], 15008), timeout=5)
s.sendall(bytes.fromhex(sys.argv[2]))
s.shutdown(socket.SHUT_WR)
try:
    while s.recv(65536): pass
except ConnectionError: pass
print("closed")
"""


def test_junk_at_the_tunnel_port_harms_nobody(mesh: Mesh) -> None:
    """From a node that was taken over, at a workload that its workload may talk to: nobody else gets so far."""
    junks = (b"\x16\x03\x01" + b"A" * 300, b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\x16\x03\x01\x40\x00" + b"A" * 16384, b"")
    mesh.apply(policy("junk", "web", who="far-client"))
    try:
        before = mesh.denied("n1", "tls_handshake") + mesh.denied("n1", "tls_version")
        for junk in junks:
            argv = [sys.executable, "-c", JUNK, mesh.w["web"].addresses[0], junk.hex()]
            assert mesh.unhooked("far-client", argv) == "closed\n"
        assert mesh.denied("n1", "tls_handshake") + mesh.denied("n1", "tls_version") == before + len(junks)
        status, body = mesh.curl("far-client", "http://web.shop.mesh:8080/")
        assert status == 200, body
    finally:
        mesh.delete("AuthorizationPolicy", "junk")
