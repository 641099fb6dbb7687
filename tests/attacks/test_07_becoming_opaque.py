"""security.md 7: make a connection "opaque", so that nobody reads what is in it: h2c, refused WebSockets, PRI, junk, silence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.actions import run
from tests.attacks.guarded import OPEN, PORT, SECRET, SERVERS, ask, guarded
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import Mesh

UPGRADE_ASSUMED = Mutant(
    "d",
    "raw only after a matching 101",
    (
        "l7proxy/http1/response_side.py",
        "            if head.status >= 200:\n                break\n            if head.status == 101:\n",
        "            if head.status >= 200 and not request.websocket:\n                break\n"
        "            if head.status == 101 or request.websocket:\n",
    ),
    (
        "l7proxy/http1/response_side.py",
        "        if request is None or not (request.websocket and head.websocket):\n",
        "        if request is None:\n",
    ),
)
ANY_UPGRADE = Mutant(
    "d",
    "Upgrade: websocket only",
    (
        "l7proxy/http1/head.py",
        '        elif name == b"http2-settings":\n            raise _bad("upgrade to HTTP/2 is not offered")\n',
        "",
    ),
    (
        "l7proxy/http1/head.py",
        '        upgrade != [b"websocket"] or b"upgrade" not in connection',
        '        b"upgrade" not in connection',
    ),
)
RULES_UNREAD = Mutant(
    "d",
    "a port with an HTTP rule carries HTTP or nothing",
    ("l7proxy/config.py", "        if port_needs_l7(self.policies, key, port):\n            mode = Protocol.HTTP\n", ""),
    (
        "l7proxy/config.py",
        "        if any(port_needs_l7(self.policies, key, port.target_port) for key in self.services[service].endpoints):\n"
        "            return Protocol.HTTP\n",
        "",
    ),
    (
        "l7proxy/scope.py",
        "Request(endpoint.port), http=False)",
        "Request(endpoint.port, \"GET\", \"/\", \"\", {}))",
    ),
)  # fmt: skip

NEXT = "GET /admin/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
SETTINGS = "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"
PREFACE = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\0" * 9
WEBSOCKET = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Version: 777",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


def request(*headers: str, path: str = "/") -> str:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]) + NEXT


H2C = (
    request("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", SETTINGS),
    request("Upgrade: h2c", "Connection: Upgrade"),
    request("Upgrade: h2c, websocket", "Connection: Upgrade"),
    request("Upgrade: websocket, h2c", "Connection: Upgrade"),
    request("Upgrade: websocket", "Upgrade: h2c", "Connection: Upgrade"),
    request("upgrade:h2c", "connection:upgrade,http2-settings", SETTINGS.lower()),
    request("Connection: HTTP2-Settings", SETTINGS),
    request("Upgrade: HTTP/2.0", "Connection: Upgrade"),
    request("Upgrade: TLS/1.0", "Connection: Upgrade"),
)
NOT_HTTP = (
    PREFACE,
    PREFACE + NEXT,
    "PRI * HTTP/1.1\r\n\r\n" + NEXT,
    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + NEXT,
    "\r\n\r\n" + NEXT,
    "\0" * 64 + NEXT,
    "SSH-2.0-x\r\n" + NEXT,
    "*1\r\n$4\r\nPING\r\n" + NEXT,
    "PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + NEXT,
    "CONNECT x:8081 HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT,
)


def refused_websocket(mesh: Mesh, server: str) -> str:
    """A handshake that the server answers as a plain request, and a request behind it."""
    return ask(mesh, server, [request(*WEBSOCKET)], wait_s=2.0)[0].body


@pytest.fixture(scope="module", params=["http", ""], ids=["declared", "undeclared"])
def sites(mesh: Mesh, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with guarded(mesh, request.param):
        yield mesh


@pytest.mark.attack("h2c upgrade")
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_no_upgrade_to_http2(sites: Mesh, counted: Counted, server: str, family: int) -> None:
    with counted(sites, "n1", "bad_request", times=len(H2C)):
        answers = ask(sites, server, H2C, family=family)
    assert [answer.status for answer in answers] == [400] * len(H2C)
    assert not any(SECRET in answer.body for answer in answers)


@pytest.mark.red("h2c upgrade", ANY_UPGRADE)
def test_an_upgrade_to_http2_reaches_the_server_without(broken: Mesh) -> None:
    with guarded(broken):
        assert OPEN in ask(broken, "web", H2C[:1])[0].body


@pytest.mark.attack("a WebSocket that the server refuses")
@pytest.mark.parametrize("server", SERVERS)
def test_after_a_refused_websocket_nothing_is_raw(sites: Mesh, counted: Counted, server: str) -> None:
    with counted(sites, "n1", "behind_upgrade"):
        body = refused_websocket(sites, server)
    assert OPEN in body
    assert SECRET not in body


@pytest.mark.red("a WebSocket that the server refuses", UPGRADE_ASSUMED)
def test_after_a_refused_websocket_all_is_raw_without(broken: Mesh) -> None:
    with guarded(broken):
        assert SECRET in refused_websocket(broken, "web")


@pytest.mark.attack("prior knowledge and junk")
@pytest.mark.parametrize("server", SERVERS)
def test_what_is_no_http_is_refused(sites: Mesh, counted: Counted, server: str) -> None:
    with counted(sites, "n1", "bad_request", "http_version", "connect_method", times=len(NOT_HTTP)):
        answers = ask(sites, server, NOT_HTTP)
    assert {answer.status for answer in answers} <= {400, 501, 505}
    assert not any(SECRET in answer.body for answer in answers)


@pytest.mark.attack("1,000 silent clients, then a request")
@pytest.mark.parametrize("server", SERVERS)
def test_silence_teaches_nothing(sites: Mesh, counted: Counted, server: str) -> None:
    assert run(sites.w["client"], "silent.py", sites.w[server].addresses[0], PORT, 1000, timeout_s=60)["opened"] > 900
    with counted(sites, "n1", "policy_denied"):
        assert ask(sites, server, [NEXT])[0].status == 403
    with counted(sites, "n1", "http_version"):
        assert ask(sites, server, [PREFACE])[0].status == 505
    assert OPEN in ask(sites, server, [NEXT.replace("/admin/", "/")])[0].body


@pytest.mark.red("prior knowledge and junk", RULES_UNREAD)
@pytest.mark.red("1,000 silent clients, then a request", RULES_UNREAD)
def test_the_port_is_relayed_unread_without(broken: Mesh) -> None:
    with guarded(broken, ""):
        run(broken.w["client"], "silent.py", broken.w["web"].addresses[0], PORT, 10)
        assert SECRET in ask(broken, "web", [NEXT])[0].body
        assert ask(broken, "web", [PREFACE])[0].reason == ""  # whatever came back, the server said it
