from __future__ import annotations

from time import process_time

import pytest

from mesh.express import automata
from mesh.express.destination import Facts, Refusal, Verdict
from mesh.express.program import Program, compile_program
from mesh.model import (
    Action,
    Backend,
    Config,
    HeaderMatch,
    Operation,
    PathMatch,
    Policy,
    Protocol,
    RouteMatch,
    RouteRule,
    Rule,
    Source,
)
from mesh.policy import Peer, Request
from tests.mesh.build import TD, policy, service, spiffe, workload
from tests.mesh.express.build import CART, KEY, PEER, WEB, allow, answer_of, compiled, deny, facts, local, of, program, route

NAMES = tuple(f"Workload/shop/w-{number}" for number in range(9))
MANY = tuple(workload(f"w-{number}", number=600 + number) for number in range(9))


def get(path: str = "/", method: str = "GET", host: str = "web.shop.mesh", **headers: str) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: {host}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


def config(**more: object) -> Config:
    return Config(trust_domain=TD, default_action=Action.ALLOW, **more)


def exact(path: str, *backends: Backend) -> RouteRule:
    return RouteRule((RouteMatch(PathMatch("Exact", path)),), backends or (Backend(KEY, 80),))


def headers(*names: str) -> RouteRule:
    return RouteRule((RouteMatch(headers=tuple(HeaderMatch(name, "x") for name in names)),), (Backend(KEY, 80),))


def regex(pattern: str) -> RouteRule:
    return RouteRule((RouteMatch(PathMatch("RegularExpression", pattern)),), (Backend(KEY, 80),))


def telling(number: int) -> Policy:
    """One of several policies that tell many values of many headers apart."""
    return deny(Operation(methods=("GET",), headers=tuple((name, f"{number}") for name in "abcdef")), name=f"d{number}")


REFUSED: list[tuple[str, Facts, str]] = [
    ("unknown_service", of({}), "no service shop/web"),
    ("off", facts(config(express="off")), "MeshConfig"),
    ("off", facts(express="off"), "service shop/web"),
    ("off", facts(workload(express="off")), "workload shop/web-1"),
    ("off", facts(workload("cart-1", number=400, account="cart", express="off")), "workload shop/cart-1"),
    ("access_log", facts(config(access_log=True)), "access log"),
    ("head_limit", facts(config(head_bytes_max=512)), "1024 bytes"),
    ("add_headers", facts(add_headers=("x-request-id",)), "x-request-id"),
    ("not_http", facts(protocol=Protocol.AUTO), "appProtocol"),
    ("not_http", facts(protocol=Protocol.TCP), "appProtocol"),
    ("too_many_endpoints", facts(*MANY, endpoints=NAMES), "9 endpoints"),
    ("remote_endpoint", facts(workload(node="n2")), "node n2"),
    ("no_endpoint", facts(endpoints=()), "no endpoint"),
    ("denied", facts(default=Action.DENY), "mesh-default"),
    ("audited", facts(policy("x", Action.AUDIT, Rule())), "shop/x#0"),
    ("no_route", facts(route(exact("/", Backend("Service/shop/gone", 80)))), "backend_missing"),
    ("no_route", facts(route(exact("/a;b"))), "no route takes it"),
    ("no_route", facts(route(RouteRule((), (Backend("Service/shop/gone", 80),)))), "backend_missing"),
    ("regex", facts(route(regex("/a^b"))), "regular expression"),
    ("regex_too_large", facts(route(regex("/.*a.{12}"))), "automaton"),
    ("too_many_headers", facts(route(headers(*"abcdefg"))), "7 headers"),
    ("framing_header", facts(deny(Operation(headers=(("host", "x"),)))), "header host"),
    (
        "too_many_conditions",
        facts(*(telling(number) for number in range(4))),
        "tell",
    ),
    (
        "too_large",
        facts(
            *(
                policy(f"a{number}", Action.ALLOW, Rule(operations=(Operation(paths=(f"/{chr(97 + number) * 900}",)),)))
                for number in range(2)
            )
        ),
        "larger table",
    ),
    (
        "answers_differ",
        facts(
            workload("w-0", number=600, account="web", labels={"app": "other"}),
            policy("x", Action.ALLOW, Rule(), selector={"app": "other"}),
            endpoints=(WEB, "Workload/shop/w-0"),
        ),
        "differ",
    ),
]


@pytest.mark.parametrize(("code", "known", "told"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refused(code, known, told):
    answer = compiled(known)
    assert isinstance(answer, Refusal)
    assert (answer.code, told in answer.reason) == (code, True), answer
    assert answer_of(known, Request(80, "GET", "/", "web")).startswith("no: ")


def test_conditions_on_addresses():
    blocks = Source(ip_blocks=("10.77.1.0/24",))
    known = facts(allow(sources=(blocks,)), default=Action.DENY)
    made = program(known)
    assert made.by_address
    assert made.read(get())
    elsewhere = compiled(known, Peer(PEER.spiffe, 400, "10.78.0.1"))
    assert isinstance(elsewhere, Refusal) and elsewhere.code == "denied"
    nowhere = compiled(known, Peer(PEER.spiffe, 400))
    assert isinstance(nowhere, Refusal) and nowhere.code == "ip_condition"
    assert not program(facts()).by_address


def direct(known, key=WEB, port=8080):
    return compile_program(
        known.state, known.routes, known.policies, peer=PEER, service_key=key, port=port, local=local(known), caller=CART
    )


def test_a_workload_by_its_own_address_is_judged_by_its_policies_alone():
    """No route has a say, and no other endpoint answers."""
    away = route(exact("/away", Backend("Service/shop/v2", 80)))
    second = "Workload/shop/w-0"
    known = facts(
        away,
        workload("w-0", number=600),
        service("v2", number=501, endpoints=(second,)),
        deny(Operation(paths=("/no",))),
        endpoints=(WEB, second),
    )
    made = direct(known)
    assert isinstance(made, Program) and made.endpoints == ((WEB, 8080),)
    for path in ("/", "/away"):
        found = made.read(get(path))
        assert found is not None and (found[1].groups, found[1].route) == (((1, 1),), "")
    assert made.read(get("/no")) is None


@pytest.mark.parametrize(
    ("code", "more", "ask"),
    [
        ("unknown_workload", {}, {"port": 8081}),
        ("unknown_workload", {}, {"key": "Workload/shop/none"}),
        ("off", {"express": "off"}, {}),
        ("add_headers", {"add_headers": ("client-identity",)}, {}),
        ("not_http", {"protocol": Protocol.AUTO}, {}),
    ],
)
def test_a_workload_by_its_own_address_is_refused_for_what_its_services_say(code, more, ask):
    answer = direct(facts(**more), **ask)
    assert isinstance(answer, Refusal) and answer.code == code, answer


def test_more_than_one_answer():
    """What a part of the requests may not have does not keep the others out of the kernel."""
    known = facts(
        service("v2", number=501, endpoints=("Workload/shop/v2-1",)),
        service("far", number=502, endpoints=("Workload/shop/far-1",)),
        workload("v2-1", number=302),
        workload("far-1", number=303, node="n2"),
        route(
            exact("/split", Backend(KEY, 80, 3), Backend("Service/shop/v2", 80, 1)),
            exact("/far", Backend(KEY, 80, 3), Backend("Service/shop/far", 80, 1)),
            exact("/far-weightless", Backend(KEY, 80, 3), Backend("Service/shop/far", 80, 0)),
            exact("/one"),
            exact("/audited"),
        ),
        deny(Operation(methods=("DELETE",))),
        policy("x", Action.AUDIT, Rule(operations=(Operation(paths=("/audited",)),))),
    )
    made = program(known)
    found = {path: made.read(get(path)) for path in ("/split", "/far", "/far-weightless", "/one", "/audited", "/none")}
    assert [path for path, one in found.items() if one] == ["/split", "/far-weightless", "/one"]
    assert made.endpoints == ((WEB, 8080), ("Workload/shop/v2-1", 8080))
    assert found["/split"][1] == Verdict("mesh-default", "shop/r#0", spiffe("shop", "web"), ((3, 1), (1, 2)))
    assert found["/one"][1].groups == ((1, 1),)
    assert made.read(get("/one", "DELETE")) is None
    assert made.read(get("/one", "HEAD"))[0].head
    told = {path: answer_of(known, Request(80, "GET", path, "web")) for path in ("/one", "/far", "/audited", "/none", "/one%41")}
    assert told["/one"].startswith("yes")
    assert "node n2" in told["/far"]
    assert "audited" in told["/audited"]
    assert "no route" in told["/none"]
    assert "no route" in told["/one%41"]


def test_a_form_left_to_user_space_is_told():
    assert "a form" in answer_of(facts(), Request(80, "GET", "/%41", "web"))
    assert "1024" in answer_of(facts(), Request(80, "GET", "/" + "x" * 1024, "web"))
    assert "written" in answer_of(facts(), Request(80, "GET", "/", "web", {"x": "\u20ac"}))
    audited = facts(policy("x", Action.AUDIT, Rule()), deny(Operation(methods=("POST",))))
    assert "denied by shop/d#0" in answer_of(audited, Request(80, "POST", "/", "web"))


def test_names_that_look_like_a_header_that_is_read():
    raw = b"GET / HTTP/1.1\r\nHost: web\r\nx_user: bob\r\n\r\n"
    assert program(facts()).read(raw)
    assert program(facts(deny(Operation(headers=(("x-user", "amy"),))))).read(raw) is None
    # A rule about others' requests is a rule about this port
    others = Source(principals=(f"{TD}/ns/shop/sa/other",))
    known = facts(policy("d", Action.DENY, Rule((others,), (Operation(headers=(("x-user", "amy"),)),))))
    assert program(known).read(raw) is None


def test_a_header_sent_twice_is_for_user_space_wherever_a_rule_reads_it():
    """The lines together could be what no line alone is."""
    known = facts(deny(Operation(headers=(("x-user", "a"), ("x-user", "b")))))
    made = program(known)
    assert made.read(get(x_user="a"))
    assert made.read(get(x_user="a").replace(b"x-user: a\r\n", b"x-user: a\r\nx-user: b\r\n")) is None


def test_headers_never_accepted_are_absent():
    made = program(facts(deny(Operation(headers=(("te", None),)), Operation(headers=(("x_y", None),)))))
    assert made.read(get())
    assert made.read(get(te="trailers")) is None
    assert made.read(b"GET / HTTP/1.1\r\nHost: web\r\nx_y: bob\r\n\r\n") is None


def test_headers_may_have_any_name():
    made = program(facts(deny(Operation(headers=(("path", "/x"), ("method", None), ("x", "y"))))))
    start = b"GET / HTTP/1.1\r\nHost: web\r\nPath: /x\r\n"
    assert made.read(start + b"X: y\r\n\r\n")
    assert made.read(start + b"Method: y\r\nX: z\r\n\r\n")
    assert made.read(start + b"Method: y\r\nX: y\r\n\r\n") is None


def test_equal_programs_have_one_digest():
    one, other = program(facts()), program(facts())
    assert one.digest == other.digest
    assert (
        len({one.digest, program(facts(deny(Operation(paths=("/x",))))).digest, program(facts(workload(account="w2"))).digest})
        == 3
    )


def test_requests_no_rule_tells_apart_share_a_verdict():
    rules = [Operation(methods=("GET", "POST"), paths=(f"/v{number}/*", f"/w{number}")) for number in range(20)]
    made = program(facts(allow(*rules)))
    assert len(made.verdicts) == 1
    assert len(made.table.rows) < 400


def test_endpoints_no_verdict_names_have_no_place():
    known = facts(
        *MANY,
        service("big", number=501, endpoints=NAMES[:8]),
        route(exact("/big", Backend("Service/shop/big", 80)), exact("/web")),
        policy("d", Action.DENY, Rule(operations=(Operation(paths=("/big",)),))),
    )
    assert program(known).endpoints == ((WEB, 8080),)


def test_more_endpoints_than_places_over_all_routes():
    known = facts(
        *MANY,
        service("big", number=501, endpoints=NAMES[:8]),
        route(exact("/big", Backend("Service/shop/big", 80)), exact("/web")),
    )
    answer = compiled(known)
    assert isinstance(answer, Refusal) and answer.code == "too_many_endpoints"


def test_time():
    """A policy change compiles every program of a node anew."""
    plain, rules = facts(), facts(allow(*(Operation(methods=("GET",), paths=(f"/api/v{number}/*",)) for number in range(20))))
    for known, limit_s in ((plain, 0.05), (rules, 0.1)):
        spent = []
        for _ in range(3):
            start = process_time()
            program(known)
            spent.append(process_time() - start)
        assert min(spent) < limit_s


def test_a_long_path_is_no_long_wait():
    start = process_time()
    made = program(facts(deny(Operation(paths=("/" + "x" * 800,)))))
    assert len(made.table.rows) > 800
    assert process_time() - start < 1


def test_an_automaton_is_held_to_its_matcher(monkeypatch):
    """A fault in the second compilation of a rule is found before it decides anything."""
    original = automata.Nfa.chain

    def chain(self, at, text, **more):
        return original(self, at, text.replace(b"c", b"z"), **more)

    monkeypatch.setattr(automata.Nfa, "chain", chain)
    answer = compiled(facts(deny(Operation(paths=("/abc",)))))
    assert isinstance(answer, Refusal) and answer.code == "disagreement"


def test_a_program_for_a_wrong_host_is_none():
    made = program(facts(allow(Operation(hosts=("web.*",)))))
    assert made.read(get(host="WEB.shop.mesh:80"))
    assert made.read(get(host="api")) is None
    assert made.read(b"GET / HTTP/1.1\r\nAccept: */*\r\n\r\n") is None
