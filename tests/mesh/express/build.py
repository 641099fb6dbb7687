"""Destinations of every shape, and how a request to them is decided without a table."""

from __future__ import annotations

from random import Random

from l7proxy.http1.head import RequestHead
from mesh.express.destination import Facts, Refusal
from mesh.express.program import Program, compile_program
from mesh.express.why import why
from mesh.model import (
    Action,
    Backend,
    HeaderMatch,
    Item,
    Operation,
    PathMatch,
    Policy,
    Route,
    RouteMatch,
    RouteRule,
    Rule,
    Source,
    State,
    Workload,
)
from mesh.policy import Peer, PolicySet, Request, authorize, l7_fields
from mesh.routing import Choice, Decision, RouteTable
from tests.mesh.build import identity, policy, principal, service, spiffe, state, workload

WEB, KEY, CART = "Workload/shop/web-1", "Service/shop/web", "Workload/shop/cart-1"
PEER = Peer(spiffe("shop", "cart"), 400, "10.77.1.9")
CALLER = workload("cart-1", number=400, account="cart")


def facts(*items: Item, default: Action = Action.ALLOW, endpoints: tuple[str, ...] = (WEB,), **more: object) -> Facts:
    """A service "web" with one endpoint on node n1, unless ``items`` say otherwise."""
    base: tuple[Item, ...] = (workload(), service("web", endpoints=endpoints, **more), identity("shop", "cart", 400), CALLER)
    return of(state(*base, *items, default=default))


def of(known: State) -> Facts:
    return Facts(known, RouteTable(known), PolicySet(known))


def local(known: Facts) -> set[str]:
    return {key for key, item in known.state.items() if isinstance(item, Workload) and item.node == "n1"}


def compiled(known: Facts, peer: Peer = PEER) -> Program | Refusal:
    return compile_program(
        known.state, known.routes, known.policies, peer=peer, service_key=KEY, port=80, local=local(known), caller=CART
    )


def answer_of(known: Facts, request: Request) -> str:
    return why(known.state, known.routes, known.policies, PEER, KEY, request, caller=CART)


def program(known: Facts, peer: Peer = PEER) -> Program:
    found = compiled(known, peer)
    assert isinstance(found, Program), found
    return found


def route(*rules: RouteRule, hostnames: tuple[str, ...] = (), name: str = "r") -> Route:
    return Route(name, "shop", ((KEY, 0),), rules, hostnames)


def allow(*operations: Operation, name: str = "a", sources: tuple[Source, ...] = ()) -> Policy:
    return policy(name, Action.ALLOW, Rule(sources, operations))


def deny(*operations: Operation, name: str = "d") -> Policy:
    return policy(name, Action.DENY, Rule(operations=operations))


def reference(known: Facts, head: RequestHead, peer: Peer = PEER) -> tuple[str, str, dict[tuple[str, int], int]] | None:
    """What user space makes of it, as far as it is the kernel's business: the allowing rule, the route and each endpoint's
    weight, of the backends it is behind together; None: user space's business."""
    port = known.routes.port(KEY, 80)
    assert port is not None
    if port.fields.headers & head.underscores:
        return None
    request = Request(80, head.method, head.path, head.host, head.header)
    choice = port.fixed or port.match(request)
    if not isinstance(choice, Choice):
        return None
    rules, identities, shares = set(), set(), {}
    before, rule = 0, ""
    for outcome, upto in zip(choice.outcomes, choice.cumulative, strict=True):
        weight, before = upto - before, upto
        if not isinstance(outcome, Decision):
            return None
        rule = outcome.rule
        backend = known.service(outcome.service)
        assert backend is not None
        target = next(spec.target_port for spec in backend.ports if spec.port == outcome.port)
        if not backend.endpoints:
            return None
        for key in backend.endpoints:
            item = known.state[key]
            assert isinstance(item, Workload)
            verdict = authorize(known.policies, peer, key, Request(target, head.method, head.path, head.host, head.header))
            if not verdict.allowed or verdict.audits or item.node != "n1":
                return None
            if head.underscores & l7_fields(known.policies, key, target).headers:
                return None
            rules.add(verdict.rule)
            identities.add(item.spiffe)
            shares[key, target] = shares.get((key, target), 0) + weight
    if len(rules) > 1 or len(identities) > 1:
        return None
    return rules.pop(), rule, shares


def carried(made: Program, raw: bytes) -> tuple[str, str, dict[tuple[str, int], int]] | None:
    """What the table makes of it, in the form of `reference`."""
    found = made.read(raw)
    if found is None:
        return None
    shares: dict[tuple[str, int], int] = {}
    for weight, bits in found[1].groups:
        for place, endpoint in enumerate(made.endpoints):
            if bits >> place & 1:
                shares[endpoint] = shares.get(endpoint, 0) + weight
    return found[1].rule, found[1].route, shares


PATHS = ("/", "/a", "/a/b", "/api", "/api/v1", "/apix", "/a/b.txt", "/img/x.png", "/health")
_PATTERNS = ("*", "/a", "/a/*", "/api*", "*.txt", "*/b", "/health", "/a%41", "/api/v1/*", "*")
_REGEXES = ("/a/[0-9]+", "/(?:api|img)/.*", "/[^/]*", r"/\w+(?:\.txt)?", "/a?.b{1,2}.*", "^/api/v[12]$", "/.*[0-9]{2,}")
_HOSTS = ("web.shop.mesh", "*.shop.mesh", "h", "[::1]", "*", "api.*")
HEADERS = (
    b"X-User: bob",
    b"x-user:  amy",
    b"X-User:",
    b"X-User: bob ",
    b"x-env: canary",
    b"x-env: a\t b",
    b"X_User: bob",
    b"X-Env:\xff",
)
_METHODS = ("GET", "HEAD", "POST", "TRACE", "OPTIONS")


def _some(random: Random, values: tuple[str, ...], chance: float) -> tuple[str, ...]:
    return tuple(sorted(set(random.choices(values, k=random.choice((1, 1, 2)))))) if random.random() < chance else ()


def operation(random: Random) -> Operation:
    headers = [
        (name, random.choice(("bob", "amy", "", "canary", "a\t b", "\xff", "\u20ac", None)))
        for name in ("x-user", "x-env")
        if random.random() < 0.2
    ]
    return Operation(
        ports=random.choice(((), (), (8080,), (8081,))),
        methods=_some(random, _METHODS, 0.4),
        not_methods=_some(random, _METHODS, 0.1),
        paths=_some(random, _PATTERNS, 0.5),
        not_paths=_some(random, _PATTERNS, 0.1),
        hosts=_some(random, _HOSTS, 0.2),
        not_hosts=_some(random, _HOSTS, 0.1),
        headers=tuple(headers),
    )


def _policy(random: Random, number: int) -> Policy:
    rules = []
    for _ in range(random.choice((1, 1, 2))):
        who = (principal("shop", "cart"), principal("shop", "other"), "*", f"{principal('shop', 'c')}*")
        source = Source(
            principals=(random.choice(who),) if random.random() < 0.4 else (),
            ip_blocks=("10.77.1.0/28",) if random.random() < 0.1 else (),
        )
        operations = tuple(operation(random) for _ in range(random.choice((0, 1, 1, 2))))
        rules.append(Rule((source,) if random.random() < 0.6 else (), operations))
    action = random.choice((Action.ALLOW, Action.ALLOW, Action.DENY, Action.DENY, Action.AUDIT))
    dry = random.choice((None, Action.ALLOW, Action.DENY)) if action is Action.AUDIT else None
    more = {"services": (random.choice((KEY, "Service/shop/v2")),)} if random.random() < 0.2 else {}
    return policy(f"p{number}", action, *rules, dry_run=dry, **more)


def _match(random: Random) -> RouteMatch:
    kind = random.choice(("Exact", "PathPrefix", "PathPrefix", "RegularExpression"))
    value = random.choice(_REGEXES if kind == "RegularExpression" else (*PATHS, "/a/", "/a;b"))
    headers = [
        HeaderMatch(name, value, kind)
        for name, value, kind in (
            ("x-env", "canary", "Exact"),
            ("x-user", "[a-c].*", "RegularExpression"),
            ("x-user", "bob", "Exact"),
        )
        if random.random() < 0.15
    ]
    method = random.choice(_METHODS) if random.random() < 0.3 else None
    return RouteMatch(PathMatch(kind, value) if random.random() < 0.8 else None, method, tuple(headers))


def _route(random: Random, number: int) -> Route:
    backends = (
        Backend(KEY, 80, 2),
        Backend("Service/shop/v2", 80, 1),
        Backend("Service/shop/far", 80),
        Backend("Service/shop/none", 80),
    )
    rules = [
        RouteRule(
            tuple(_match(random) for _ in range(random.choice((0, 1, 1, 2)))),
            tuple(random.choices(backends, (6, 4, 1, 1), k=random.choice((1, 1, 2)))),
        )
        for _ in range(random.choice((1, 2, 3)))
    ]
    return route(*rules, hostnames=_some(random, _HOSTS[:3], 0.3), name=f"r{number}")


def anything(random: Random) -> Facts:
    """A destination with random routes and policies: two local endpoints, a second service, one on another node."""
    items: list[Item] = [
        workload("web-2", number=301),
        workload("v2-1", number=302, account=random.choice(("web", "web", "v2"))),
        workload("far-1", number=303, node="n2"),
        service("v2", number=501, endpoints=("Workload/shop/v2-1", "Workload/shop/web-2")),
        service("far", number=502, endpoints=("Workload/shop/far-1",)),
        service("none", number=503),
        *(_policy(random, number) for number in range(random.choice((0, 1, 2, 3)))),
        *(_route(random, number) for number in range(random.choice((0, 0, 1, 2)))),
    ]
    default = random.choice((Action.ALLOW, Action.DENY))
    return facts(*items, default=default, endpoints=(WEB, "Workload/shop/web-2"))
