"""Routing against a naive reading of the Gateway API's precedence, and weights."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.model import Backend, HeaderMatch, PathMatch, Route, RouteMatch, RouteRule, ServicePort
from mesh.policy import Request
from mesh.routing import CACHE_ENTRIES_MAX, Decision, NoRoute, RouteTable, route
from tests.mesh.build import service, state

WEB = "Service/shop/web"
BACKENDS = [service(name, number=500 + index) for index, name in enumerate(("web", "v1", "v2", "v3"))]
RNG = random.Random(7)


def get(path="/", method="GET", host="web.shop.mesh", headers=None):
    return Request(8080, method, path, host, headers or {})


def rule(backend, *matches):
    return RouteRule(matches, (Backend(f"Service/shop/{backend}", 80),))


def match(value=None, kind="PathPrefix", method=None, **headers):
    found = tuple(HeaderMatch(name.replace("_", "-"), text) for name, text in headers.items())
    return RouteMatch(PathMatch(kind, value) if value else None, method, found)


def table(*rules, hostnames=(), created=0, name="r", more=()):
    return RouteTable(state(*BACKENDS, Route(name, "shop", ((WEB, 0),), rules, hostnames, created), *more))


def target(found, request, port=80):
    outcome = route(found, WEB, port, request, RNG)
    return outcome.service.rpartition("/")[2] if isinstance(outcome, Decision) else outcome.reason


def test_a_service_without_routes_is_its_own_backend():
    plain = RouteTable(state(*BACKENDS))
    assert route(plain, WEB, 80, get(), RNG) == Decision("", WEB, 80)
    assert not plain.routed(WEB, 80)
    assert route(plain, WEB, 81, get(), RNG) == NoRoute("", "unknown_service")
    assert route(plain, "Service/shop/none", 80, get(), RNG) == NoRoute("", "unknown_service")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/api", "v1"),
        ("/api/", "v1"),
        ("/api/x", "v1"),
        ("/api?x", "v1"),
        ("/apix", "no_match"),
        ("/", "no_match"),
        ("/API", "no_match"),
    ],
)
def test_a_prefix_matches_whole_elements(path, expected):
    assert target(table(rule("v1", match("/api"))), get(path)) == expected
    assert target(table(rule("v1", match("/api/"))), get(path)) == expected


def test_precedence():
    found = table(
        rule("web", match("/")),
        rule("v1", match("/a")),
        rule("v2", match("/a/b")),
        rule("v3", match("/a/b", "Exact")),
    )
    assert [target(found, get(path)) for path in ("/", "/a/x", "/a/b/c", "/a/b")] == ["web", "v1", "v2", "v3"]
    found = table(rule("v1", match("/a")), rule("v2", match("/a", method="POST")), rule("v3", match("/a", x_a="1", x_b="2")))
    assert target(found, get("/a", "POST", headers={"x-a": "1", "x-b": "2"})) == "v2"
    assert target(found, get("/a", headers={"x-a": "1", "x-b": "2"})) == "v3"
    assert target(found, get("/a", headers={"x-a": "1"})) == "v1"


def test_a_regular_expression_matches_the_whole_path_and_comes_last():
    found = table(rule("v1", match("/v[0-9]+/.*", "RegularExpression")), rule("v2", match("/v1")))
    assert [target(found, get(path)) for path in ("/v1/x", "/v22/x", "/x/v22/x")] == ["v2", "v1", "no_match"]


def test_the_older_route_wins_a_tie():
    newer = table(
        rule("v1", match("/a")), name="a", created=9, more=(Route("b", "shop", ((WEB, 80),), (rule("v2", match("/a")),), (), 3),)
    )
    assert target(newer, get("/a")) == "v2"


def test_host_names():
    found = table(
        rule("v1"),
        hostnames=("*.example.com",),
        more=(
            Route("s", "shop", ((WEB, 80),), (rule("v2"),), ("a.example.com",)),
            Route("t", "shop", ((WEB, 80),), (rule("v3"),)),
        ),
    )
    hosts = ("x.example.com:80", "A.example.com", "example.org")
    assert [target(found, get(host=host)) for host in hosts] == ["v1", "v2", "v3"]


def test_a_route_of_one_port_leaves_the_others_alone():
    many = service("web", number=500)
    many = type(many)(500, "web", "shop", ports=(ServicePort(80, 8080), ServicePort(81, 8081)))
    found = RouteTable(state(many, *BACKENDS[1:], Route("r", "shop", ((WEB, 81),), (rule("v1"),))))
    assert [target(found, get(), port) for port in (80, 81)] == ["web", "v1"]
    assert (found.routed(WEB, 80), found.routed(WEB, 81)) == (False, True)


def test_no_backend_is_an_error_of_its_own():
    assert target(table(RouteRule()), get()) == "no_backend"
    assert target(table(RouteRule((), (Backend("Service/shop/v1", 80, 0),))), get()) == "no_backend"
    assert target(table(rule("gone")), get()) == "backend_missing"
    assert target(table(RouteRule((), (Backend("Service/shop/v1", 99),))), get()) == "backend_missing"
    assert target(table(), get()) == "no_match"


def test_weights_divide_requests():
    backends = (Backend("Service/shop/v1", 80, 90), Backend("Service/shop/v2", 80, 10), Backend("Service/shop/v3", 80, 0))
    found = table(RouteRule((match("/"),), backends))
    seen = Counter(target(found, get()) for _ in range(20_000))
    assert set(seen) == {"v1", "v2"}
    assert 0.085 < seen["v2"] / 20_000 < 0.115


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.floats(0, 1, exclude_max=True))
def test_a_weight_of_zero_is_never_drawn(weights, draw):
    class Fixed:
        def random(self):
            return draw

    found = table(
        RouteRule((), tuple(Backend(f"Service/shop/{BACKENDS[index].name}", 80, weight) for index, weight in enumerate(weights)))
    )
    outcome = route(found, WEB, 80, get(), Fixed())
    if sum(weights) == 0:
        assert outcome.reason == "no_backend"
    else:
        total = 0
        for index, weight in enumerate(weights):  # pragma: no branch
            total += weight
            if int(draw * sum(weights)) < total:
                assert outcome.service == f"Service/shop/{BACKENDS[index].name}"
                break


def test_the_cache_is_bounded():
    found = table(rule("v1", match("/a")))
    for index in range(CACHE_ENTRIES_MAX + 10):
        target(found, get(f"/{index}"))
    assert len(found.port(WEB, 80).cache) <= CACHE_ENTRIES_MAX
    target(found, get("/" + "x" * 10_000))
    assert all(len(path) < 1000 for _, path, _ in found.port(WEB, 80).cache)


# ---- a plain reading of the specification


def naive(rules, request):
    best = None
    path = request.path.split("?")[0]
    for number, item in enumerate(rules):
        for one in item.matches or (RouteMatch(),):
            kind, value = (one.path.type, one.path.value) if one.path else ("PathPrefix", "/")
            elements, wanted = path.strip("/").split("/"), value.strip("/").split("/")
            if kind == "Exact":
                fits, rank = path == value, (0, -len(value))
            else:
                fits, rank = value == "/" or elements[: len(wanted)] == wanted, (1, -len(value.rstrip("/") or "/"))
            fits = fits and one.method in (None, request.method)
            fits = fits and all(request.headers.get(header.name) == header.value for header in one.headers)
            key = (*rank, one.method is None, -len(one.headers), number)
            if fits and (best is None or key < best[0]):
                best = (key, number)
    return None if best is None else best[1]


matches = st.builds(
    RouteMatch,
    st.one_of(
        st.none(),
        st.builds(PathMatch, st.sampled_from(["Exact", "PathPrefix"]), st.sampled_from(["/", "/a", "/a/b", "/ab"])),
    ),
    st.sampled_from([None, "GET", "POST"]),
    st.lists(st.sampled_from(["x", "y"]), max_size=2, unique=True).map(
        lambda found: tuple(HeaderMatch(name, "1") for name in found)
    ),
)
rules_of = st.lists(st.lists(matches, max_size=3), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    rules_of,
    st.sampled_from(["/", "/a", "/a/b", "/a/b/c", "/ab", "/c", "/a?/b"]),
    st.sampled_from(["GET", "POST", "PUT"]),
    st.sampled_from([{}, {"x": "1"}, {"x": "1", "y": "1"}, {"x": "2"}]),
)
def test_the_table_agrees_with_a_naive_reading(found, path, method, headers):
    rules = [RouteRule(tuple(items), (Backend(WEB, 80),)) for items in found]
    compiled, request = table(*rules), get(path, method, headers=headers)
    expected = naive(rules, request)
    for _ in range(2):  # the second time from the cache
        outcome = route(compiled, WEB, 80, request, RNG)
        assert outcome == (NoRoute("", "no_match") if expected is None else Decision(f"shop/r#{expected}", WEB, 80))
