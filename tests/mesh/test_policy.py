"""The evaluator against a naive one, and the properties everyone relies on."""

import time
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.matching import has_l7
from mesh.model import Action, Operation, Rule, Source
from mesh.policy import DEFAULT_RULE, Peer, PolicySet, Request, authorize, l7_fields, port_needs_l7, port_needs_proxy
from tests.mesh.build import WEB, policy, principal, service, spiffe, state, workload

CLIENT = Peer(spiffe("shop", "client"), 301, "10.77.2.2")
EVIL = Peer(spiffe("evil", "evil"), 302, "10.77.3.2")
NOBODY = Peer(None, 0, "192.0.2.1")
GET = Request(8080, "GET", "/api/x?q=1", "Web.Shop.mesh:80", {"x-user": "kim"})
L4 = Request(8080)

from_client = Rule((Source(principals=(principal("shop", "client"),)),))
get_api = Rule((), (Operation(methods=("GET",), paths=("/api/*",)),))


def ask(peer, request, *policies, default=Action.DENY, http=True):
    return authorize(PolicySet(state(workload(), *policies, default=default)), peer, WEB, request, http=http)


def test_nothing_is_allowed_by_default():
    verdict = ask(CLIENT, GET)
    assert (verdict.action, verdict.rule, verdict.reason) == (Action.DENY, DEFAULT_RULE, "default_deny")


def test_the_default_is_the_configs_until_an_allow_policy_selects():
    assert ask(CLIENT, GET, default=Action.ALLOW).reason == "default_allow"
    verdict = ask(CLIENT, GET, policy("none", Action.ALLOW), default=Action.ALLOW)
    assert (verdict.allowed, verdict.reason) == (False, "no_allow_matched")


def test_without_a_config_or_a_workload_nothing_is_allowed():
    policies = PolicySet({"Workload/shop/web-1": workload()})
    assert authorize(policies, CLIENT, WEB, GET).reason == "default_deny"
    assert authorize(policies, CLIENT, "Workload/shop/gone", GET).reason == "unknown_workload"


def test_the_rule_is_named():
    verdict = ask(
        CLIENT,
        GET,
        policy("a", Action.ALLOW, get_api),
        policy("b", Action.ALLOW, Rule((Source(namespaces=("x",)),)), from_client),
    )
    assert (verdict.allowed, verdict.rule, verdict.reason) == (True, "shop/a#0", "allow_rule")
    verdict = ask(CLIENT, Request(8080, "POST", "/"), policy("b", Action.ALLOW, Rule((Source(namespaces=("x",)),)), from_client))
    assert verdict.rule == "shop/b#1"


def test_deny_comes_before_allow():
    verdict = ask(CLIENT, GET, policy("a", Action.ALLOW, from_client), policy("z", Action.DENY, get_api))
    assert (verdict.allowed, verdict.rule, verdict.reason) == (False, "shop/z#0", "deny_rule")


class TestWhereOnlyLayerFourIsKnown:
    def test_an_allow_that_needs_http_is_a_denial_to_ask_again(self):
        verdict = ask(CLIENT, L4, policy("a", Action.ALLOW, get_api))
        assert (verdict.action, verdict.needs_l7) == (Action.DENY, True)

    def test_an_l4_allow_decides_alone(self):
        verdict = ask(CLIENT, L4, policy("a", Action.ALLOW, get_api), policy("b", Action.ALLOW, from_client))
        assert (verdict.allowed, verdict.needs_l7) == (True, False)

    def test_a_deny_that_needs_http_holds_back_an_allow(self):
        verdict = ask(CLIENT, L4, policy("a", Action.ALLOW, from_client), policy("d", Action.DENY, get_api))
        assert (verdict.allowed, verdict.needs_l7, verdict.rule) == (False, True, "shop/d#0")

    def test_who_could_not_be_allowed_anyway_is_denied_at_once(self):
        verdict = ask(EVIL, L4, policy("a", Action.ALLOW, from_client), policy("d", Action.DENY, get_api))
        assert (verdict.allowed, verdict.needs_l7) == (False, False)

    def test_on_tcp_an_l7_allow_allows_nothing_and_an_l7_deny_denies(self):
        assert ask(CLIENT, L4, policy("a", Action.ALLOW, get_api), http=False).reason == "no_allow_matched"
        verdict = ask(CLIENT, L4, policy("a", Action.ALLOW, from_client), policy("d", Action.DENY, get_api), http=False)
        assert (verdict.allowed, verdict.needs_l7, verdict.reason) == (False, False, "l7_rule_on_tcp")

    def test_an_unknown_address_is_a_missing_fact_as_well(self):
        rule = Rule((Source(ip_blocks=("10.77.2.0/24",)),))
        assert ask(Peer(CLIENT.spiffe, 301), L4, policy("a", Action.ALLOW, rule)).needs_l7
        assert ask(CLIENT, L4, policy("a", Action.ALLOW, rule)).allowed
        assert not ask(EVIL, L4, policy("a", Action.ALLOW, rule)).allowed
        assert ask(Peer(CLIENT.spiffe, 301, "::ffff:10.77.2.9"), L4, policy("a", Action.ALLOW, rule)).allowed


class TestFields:
    def allowed(self, peer, request, source=None, operation=None):
        rule = Rule((source,) if source else (), (operation,) if operation else ())
        return ask(peer, request, policy("p", Action.ALLOW, rule)).allowed

    @pytest.mark.parametrize(
        ("source", "who"),
        [
            (Source(principals=("*",)), {CLIENT, EVIL}),
            (Source(principals=("mesh.local/ns/shop/*",)), {CLIENT}),
            (Source(principals=("*/sa/evil",)), {EVIL}),
            (Source(not_principals=(principal("shop", "client"),)), {EVIL, NOBODY}),
            (Source(namespaces=("shop",)), {CLIENT}),
            (Source(namespaces=("ev*",)), {EVIL}),
            (Source(not_namespaces=("shop",)), {EVIL, NOBODY}),
            (Source(principals=("*",), not_namespaces=("evil",)), {CLIENT}),
            (Source(not_ip_blocks=("10.0.0.0/8",)), {NOBODY}),
            (Source(), {CLIENT, EVIL, NOBODY}),
        ],
    )
    def test_sources(self, source, who):
        assert {peer for peer in (CLIENT, EVIL, NOBODY) if self.allowed(peer, GET, source)} == who

    @pytest.mark.parametrize(
        ("operation", "matches"),
        [
            (Operation(paths=("/api/x",)), True),
            (Operation(paths=("/api",)), False),
            (Operation(paths=("/api/*",)), True),
            (Operation(paths=("*/x",)), True),
            (Operation(paths=("*",)), True),
            (Operation(not_paths=("/api/*",)), False),
            (Operation(methods=("POST",)), False),
            (Operation(not_methods=("POST",)), True),
            (Operation(hosts=("web.shop.mesh",)), True),
            (Operation(hosts=("*.mesh",)), True),
            (Operation(not_hosts=("web.shop.mesh",)), False),
            (Operation(ports=(8080,)), True),
            (Operation(ports=(80,)), False),
            (Operation(not_ports=(8080,)), False),
            (Operation(headers=(("x-user", "kim"),)), True),
            (Operation(headers=(("x-user", None),)), True),
            (Operation(headers=(("x-user", "lee"),)), False),
            (Operation(headers=(("x-none", None),)), False),
        ],
    )
    def test_operations(self, operation, matches):
        assert self.allowed(CLIENT, GET, None, operation) is matches

    def test_a_header_sent_twice_never_helps_the_sender(self):
        twice = Request(8080, "GET", "/", "", {"x-user": ("kim", "evil")})
        evil, kim = (Rule((), (Operation(headers=(("x-user", name),)),)) for name in ("evil", "kim"))
        assert not ask(CLIENT, twice, policy("a", Action.ALLOW, from_client), policy("d", Action.DENY, evil)).allowed
        assert not ask(CLIENT, twice, policy("a", Action.ALLOW, kim)).allowed


class TestSelection:
    def selected(self, item, *more):
        return [found.name for found in PolicySet(state(workload(), item, *more)).selecting(WEB)]

    def test_by_label_and_namespace(self):
        assert self.selected(policy("p", Action.ALLOW, selector={"app": "web"})) == ["p"]
        assert self.selected(policy("p", Action.ALLOW, selector={"app": "db"})) == []
        assert self.selected(policy("p", Action.ALLOW)) == ["p"]
        assert self.selected(policy("p", Action.ALLOW, namespace="other")) == []
        assert self.selected(policy("p", Action.ALLOW, namespace="root", every_namespace=True)) == ["p"]

    def test_by_service(self):
        item = policy("p", Action.ALLOW, services=("Service/shop/web",))
        assert self.selected(item) == []
        assert self.selected(item, service("web", endpoints=(WEB,))) == ["p"]


class TestAudit:
    def test_an_audit_policy_decides_nothing_and_is_told(self):
        verdict = ask(CLIENT, GET, policy("a", Action.ALLOW, from_client), policy("u", Action.AUDIT, get_api))
        assert (verdict.allowed, verdict.audits) == (True, ("shop/u#0",))
        assert ask(EVIL, GET, policy("u", Action.AUDIT, get_api)).reason == "default_deny"
        assert ask(CLIENT, GET, policy("u", Action.AUDIT, get_api), default=Action.ALLOW).allowed

    def test_audit_mode_tells_what_would_change(self):
        deny = policy("d", Action.AUDIT, get_api, dry_run=Action.DENY)
        assert ask(CLIENT, GET, deny, default=Action.ALLOW).audits == ("shop/d#0 would DENY",)
        allow = policy("d", Action.AUDIT, from_client, dry_run=Action.ALLOW)
        assert ask(EVIL, GET, allow, default=Action.ALLOW).audits == ("shop/d would DENY",)
        assert ask(CLIENT, GET, allow, default=Action.ALLOW).audits == ()
        assert ask(CLIENT, GET, allow).audits == ("shop/d#0 would ALLOW",)

    def test_an_audited_port_is_not_the_kernels_but_may_carry_anything(self):
        policies = PolicySet(state(workload(), policy("u", Action.AUDIT, get_api)))
        assert port_needs_proxy(policies, WEB, 8080)
        assert not port_needs_l7(policies, WEB, 8080)


def test_what_a_port_is_asked():
    rule = Rule((), (Operation(ports=(8080,), paths=("/x",), headers=(("x-user", None),)),))
    policies = PolicySet(state(workload(), policy("p", Action.DENY, rule), policy("q", Action.ALLOW, from_client)))
    fields = l7_fields(policies, WEB, 8080)
    assert (fields.paths, fields.headers, fields.hosts, fields.methods) == (True, frozenset({"x-user"}), False, False)
    assert port_needs_l7(policies, WEB, 8080)
    assert not port_needs_l7(policies, WEB, 6379)
    assert not port_needs_proxy(policies, WEB, 6379)


# ---- a second evaluator, slow and plain, that the fast one must agree with


def _match(pattern, value):
    if pattern == "*":
        return bool(value)
    if pattern.endswith("*"):
        return value.startswith(pattern[:-1])
    return value.endswith(pattern[1:]) if pattern.startswith("*") else value == pattern


def naive(policies, peer, request, default, http):
    """Three-valued: a rule is True, False or None (a fact is missing)."""
    name = peer.spiffe.removeprefix("spiffe://") if peer.spiffe else None
    namespace = name.split("/")[2] if name else None

    def source(item):
        known = [
            not item.principals or (name is not None and any(_match(p, name) for p in item.principals)),
            not item.not_principals or name is None or not any(_match(p, name) for p in item.not_principals),
            not item.namespaces or (namespace is not None and any(_match(p, namespace) for p in item.namespaces)),
            not item.not_namespaces or namespace is None or not any(_match(p, namespace) for p in item.not_namespaces),
        ]
        if not all(known):
            return False
        if not (item.ip_blocks or item.not_ip_blocks):
            return True
        if not peer.address:
            return None
        ip = ip_address(peer.address)
        within = not item.ip_blocks or any(ip in ip_network(block) for block in item.ip_blocks)
        return within and not any(ip in ip_network(block) for block in item.not_ip_blocks)

    def operation(item, action):
        if (item.ports and request.port not in item.ports) or request.port in item.not_ports:
            return False
        if not has_l7(item):
            return True
        if request.method is None:
            return None if http else action is Action.DENY
        path, host = request.path.split("?")[0], request.host.split(":")[0].lower()
        return (
            (not item.methods or request.method in item.methods)
            and request.method not in item.not_methods
            and (not item.paths or any(_match(p, path) for p in item.paths))
            and not any(_match(p, path) for p in item.not_paths)
            and (not item.hosts or any(_match(p, host) for p in item.hosts))
            and not any(_match(p, host) for p in item.not_hosts)
            and all(key in request.headers and value in (None, request.headers[key]) for key, value in item.headers)
        )

    def rules(action):
        for item in sorted((item for item in policies if item.action is action), key=lambda item: (item.namespace, item.name)):
            for number, rule in enumerate(item.rules):
                for one in rule.sources or (Source(),):
                    for other in rule.operations or (Operation(),):
                        both = (source(one), operation(other, action))
                        result = False if False in both else None if None in both else True
                        yield f"{item.namespace}/{item.name}#{number}", result

    denies, allows = list(rules(Action.DENY)), list(rules(Action.ALLOW))
    for rule, result in denies:
        if result:
            return False, False, rule
    if any(item.action is Action.ALLOW for item in policies):
        found = next(((True, False, rule) for rule, result in allows if result), None)
        found = found or next(((False, True, rule) for rule, result in allows if result is None), (False, False, "no-allow-rule"))
    else:
        found = (default is Action.ALLOW, False, DEFAULT_RULE)
    maybe = next((rule for rule, result in denies if result is None), None)
    return (False, True, maybe) if found[0] and maybe else found


names = st.sampled_from([principal(ns, sa) for ns in ("shop", "evil") for sa in ("a", "b")])
patterns = st.one_of(names, st.sampled_from(["*", "mesh.local/ns/shop/*", "*/sa/a"]))


def some(values, most=2):
    return st.lists(values, max_size=most, unique=True).map(tuple)


sources = st.builds(
    Source,
    principals=some(patterns),
    not_principals=some(patterns, 1),
    namespaces=some(st.sampled_from(["shop", "evil", "s*"])),
    not_namespaces=some(st.sampled_from(["shop", "evil"]), 1),
    ip_blocks=some(st.sampled_from(["10.0.0.0/8", "10.1.0.0/16"]), 1),
    not_ip_blocks=some(st.sampled_from(["10.1.0.0/16"]), 1),
)
paths = st.sampled_from(["/a", "/a/*", "*/b", "*"])
operations = st.builds(
    Operation,
    ports=some(st.sampled_from([8080, 9090]), 1),
    not_ports=some(st.sampled_from([8080, 9090]), 1),
    methods=some(st.sampled_from(["GET", "POST"]), 1),
    not_methods=some(st.sampled_from(["GET", "POST"]), 1),
    paths=some(paths),
    not_paths=some(paths, 1),
    hosts=some(st.sampled_from(["web.mesh", "*.mesh"]), 1),
    headers=some(st.sampled_from([("x", None), ("x", "1")]), 1),
)
plain = st.builds(Operation, ports=some(st.sampled_from([8080, 9090]), 1))
rules = st.builds(Rule, some(sources), some(st.one_of(plain, operations)))
policies_of = st.lists(st.tuples(st.sampled_from([Action.ALLOW, Action.DENY]), st.lists(rules, max_size=2)), max_size=4).map(
    lambda found: [policy(f"p{index}", action, *rules) for index, (action, rules) in enumerate(found)]
)
peers = st.builds(
    Peer,
    st.one_of(st.none(), names.map(lambda name: f"spiffe://{name}")),
    st.just(300),
    st.sampled_from(["", "10.0.0.1", "10.1.0.1", "11.0.0.1"]),
)
requests = st.one_of(
    st.builds(Request, st.sampled_from([8080, 9090])),
    st.builds(
        Request,
        st.sampled_from([8080, 9090]),
        st.sampled_from(["GET", "POST"]),
        st.sampled_from(["/a", "/a/b", "/b", "/a?/b"]),
        st.sampled_from(["web.mesh", "WEB.mesh:80", "other"]),
        st.sampled_from([{}, {"x": "1"}, {"x": "2"}]),
    ),
)
defaults = st.sampled_from([Action.ALLOW, Action.DENY])


@settings(max_examples=400, deadline=None)
@given(policies_of, peers, requests, defaults, st.booleans())
def test_the_index_agrees_with_the_naive_evaluator(found, peer, request, default, http):
    verdict = ask(peer, request, *found, default=default, http=http)
    assert (verdict.allowed, verdict.needs_l7, verdict.rule) == naive(found, peer, request, default, http)


@settings(deadline=None)
@given(policies_of, peers, requests, defaults)
def test_a_deny_of_everyone_denies_everyone(found, peer, request, default):
    verdict = ask(peer, request, *found, policy("zz", Action.DENY, Rule()), default=default)
    assert not verdict.allowed
    assert not verdict.needs_l7


@settings(deadline=None)
@given(policies_of, peers, requests, defaults)
def test_an_allow_for_someone_else_never_allows_this_one(found, peer, request, default):
    other = policy("other", Action.ALLOW, Rule((Source(principals=(principal("third", "party"),)),)))
    before, after = ask(peer, request, *found, default=default), ask(peer, request, *found, other, default=default)
    assert before.allowed or not after.allowed


@settings(deadline=None)
@given(policies_of, peers, requests, defaults)
def test_what_layer_four_decides_no_request_changes(found, peer, request, default):
    early = ask(peer, Request(request.port), *found, default=default)
    if not early.needs_l7:
        assert ask(peer, request, *found, default=default).allowed is early.allowed


@settings(deadline=None)
@given(policies_of, peers, requests, defaults, st.randoms(use_true_random=False))
def test_the_order_of_items_does_not_matter(found, peer, request, default, random):
    expected = ask(peer, request, *found, default=default)
    random.shuffle(found)
    assert ask(peer, request, *found, default=default) == expected


def test_ten_thousand_policies_cost_a_request_what_ten_do():
    def asked(count):
        many = [
            policy(f"p{index:05}", Action.ALLOW, Rule((Source(principals=(principal("shop", f"c{index}"),)),)))
            for index in range(count)
        ]
        policies = PolicySet(state(workload(), *many))
        peer = Peer(spiffe("shop", f"c{count - 1}"), 999, "10.0.0.1")
        assert authorize(policies, peer, WEB, GET).rule == f"shop/p{count - 1:05}#0"
        return policies, peer

    def timed(policies, peer):
        start = time.thread_time()
        for _ in range(200):
            authorize(policies, peer, WEB, GET)
        return time.thread_time() - start

    many, few = asked(10_000), asked(10)
    best = [min(turn) for turn in zip(*[(timed(*many), timed(*few)) for _ in range(40)], strict=True)]  # by turns
    assert best[0] < 3 * best[1]
