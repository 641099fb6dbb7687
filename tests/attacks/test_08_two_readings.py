"""security.md 8: a path, a host or a header that policy reads one way and the server another.

One DENY on /admin before nginx and Python's own server, and the corpus of spellings: not one may fetch what is behind it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.guarded import HEADER, OPEN, SECRET, SERVERS, ask, guarded
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import Mesh

NORMALISED_BY_NOBODY = Mutant(
    "b",
    "a path that is not canonical is refused",
    ("l7proxy/scope.py", "    if fields.paths and head.path_fault:\n", "    if False:\n"),
)
ABSOLUTE_UNCHECKED = Mutant(
    "b",
    "an absolute target must equal Host",
    ("l7proxy/http1/head.py", "    if host is None or absolute[1].lower() != host.lower():\n", "    if host is None:\n"),
)
UNDERSCORES = Mutant(
    "b",
    "a header of a rule has one spelling",
    ("l7proxy/scope.py", "    if fields.headers and not head.underscores.isdisjoint(fields.headers):\n", "    if False:\n"),
)

PATHS = (
    "/%61dmin/", "/%61dmin", "/a%64min/index.html", "/%41dmin/", "/admin%2f", "/admin%2F", "/admin%2findex.html", "/%2fadmin/",
    "/x/..%2fadmin/", "/x/..%2Fadmin/", "/x/%2e%2e/admin/", "/x/.%2e/admin/", "/%2e/admin/", "/./admin/", "/x/../admin/",
    "/x/y/../../admin/", "//admin/", "///admin//", "/admin//index.html", "/admin/./", "/admin/x/..", "/admin;x", "/admin;x/",
    "/admin;x/index.html", "/;x/admin/", "/x/..;/admin/", "/.;/admin/", "/\\admin/", "/x\\..\\admin/", "/x/..\\admin/",
    "/x%5c..%5cadmin/", "/admin%00", "/admin%00/", "/%00/../admin/", "/admin%20/", "/admin%09", "/admin%0d%0a/", "/admin%3b/",
    "/admin%3fx", "/%2561dmin/", "/%u0061dmin/", "/%%61dmin/", "/%6/admin/", "/%c0%ae%c0%ae/admin/", "/x/%c0%ae./admin/",
    "/%ef%bc%8fadmin/", "/admin#", "/#/../admin/", "/admin/#x", "/x?/../admin/", "?/admin/", "admin/", "*", "/~/../admin/",
    "/index.html/../admin/", "/admin/index.html/../index.html", "/.//admin/", "/x/.../../admin/", "/admin\t", "/admin\x0b/",
    "/admin/%2e/index.html", "/admin/index%2ehtml", "/admin/index.htm%6c", "/admin%2e%2fadmin/", "/%5cadmin/", "/admin%E2%80%8B/",
)  # fmt: skip
PLAIN = ("/admin", "/admin/", "/admin/index.html", "/admin/?x=1", "/admin/index.html?../x")


def request(target: str, *headers: str, host: str = "site.shop.mesh") -> str:
    return "\r\n".join([f"GET {target} HTTP/1.1", f"Host: {host}", "Connection: close", *headers, "", ""])


ABSOLUTE = (
    request("http://site.shop.mesh/admin/"),
    request("http://other.shop.mesh/admin/"),
    request("http://other.shop.mesh/", host="site.shop.mesh"),
    request("HTTP://site.shop.mesh/admin/index.html"),
    request("https://site.shop.mesh/admin/"),
    request("http://site.shop.mesh@other/admin/"),
    request("http:///admin/"),
    request("//site.shop.mesh/admin/"),
    request("/", "Host: other.shop.mesh"),
    request("/admin/", host="site.shop.mesh/../"),
)
SPELLINGS = (f"{HEADER}: root", "X-Role: root", "X_Role: root", "x_role: root", "X-Role: user\r\nX-Role: root", "X-Role:\troot ")
OTHER_BYTES = ("X-Role : root", "X-Role\t: root", "X-Role:\r\n root", "\tX-Role: root", "X-R\xf6le: root", "X-Role: ro\x00ot")


@pytest.fixture(scope="module")
def sites(mesh: Mesh) -> Iterator[Mesh]:
    with guarded(mesh):
        yield mesh


@pytest.mark.attack("another spelling of the path")
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_no_spelling_of_a_path_gets_past_a_rule(sites: Mesh, counted: Counted, server: str, family: int) -> None:
    with counted(sites, "n1", "path_not_canonical", times=40), counted(sites, "n1", "bad_request", times=5):
        answers = ask(sites, server, [request(path) for path in PATHS], family=family)
    for path, answer in zip(PATHS, answers, strict=True):
        assert SECRET not in answer.body, path
        assert answer.status in (400, 403, 404) or OPEN in answer.body, (path, answer)


@pytest.mark.attack("another spelling of the path")
@pytest.mark.parametrize("server", SERVERS)
def test_the_plain_path_is_denied_and_the_rest_is_open(sites: Mesh, counted: Counted, server: str) -> None:
    with counted(sites, "n1", "policy_denied", times=len(PLAIN)):
        answers = ask(sites, server, [request(path) for path in PLAIN])
    assert [answer.status for answer in answers] == [403] * len(PLAIN)
    assert [OPEN in answer.body for answer in ask(sites, server, [request("/"), request("/index.html?admin")])] == [True, True]


@pytest.mark.attack("absolute form and two hosts")
@pytest.mark.parametrize("server", SERVERS)
def test_target_and_host_must_say_the_same(sites: Mesh, counted: Counted, server: str) -> None:
    with counted(sites, "n1", "bad_request", times=5):
        answers = ask(sites, server, ABSOLUTE)
    assert {answer.status for answer in answers} <= {400, 403}
    assert ask(sites, server, [request("http://site.shop.mesh/index.html")])[0].status in (200, 404)  # Python reads no URL


@pytest.mark.attack("another spelling of a header")
@pytest.mark.parametrize("server", SERVERS)
def test_a_header_of_a_rule_has_one_spelling(sites: Mesh, counted: Counted, server: str) -> None:
    with counted(sites, "n1", "underscore_header", times=2), counted(sites, "n1", "policy_denied", times=3):
        answers = ask(sites, server, [request("/", spelling) for spelling in SPELLINGS])
    assert {answer.status for answer in answers} == {400, 403}
    with counted(sites, "n1", "bad_request", times=4):
        odd = ask(sites, server, [request("/", text) for text in OTHER_BYTES])
    assert {answer.status for answer in odd} == {400}
    assert OPEN in ask(sites, server, [request("/", f"{HEADER}: user")])[0].body


@pytest.mark.red("another spelling of the path", NORMALISED_BY_NOBODY)
def test_spellings_get_past_without(broken: Mesh) -> None:
    with guarded(broken):
        for server in SERVERS:
            answers = ask(broken, server, [request(path) for path in PATHS])
            assert sum(SECRET in answer.body for answer in answers) >= 5, server


@pytest.mark.red("absolute form and two hosts", ABSOLUTE_UNCHECKED)
def test_two_hosts_pass_without(broken: Mesh) -> None:
    with guarded(broken):
        assert OPEN in ask(broken, "web", [request("http://other.shop.mesh/")])[0].body


@pytest.mark.red("another spelling of a header", UNDERSCORES)
def test_underscores_pass_without(broken: Mesh) -> None:
    with guarded(broken):
        assert OPEN in ask(broken, "web", [request("/", "X_Role: root")])[0].body
