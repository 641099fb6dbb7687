"""A Reach that follows: what it touches, and what it leaves alone. (`tests/controller/test_following.py` compares the whole.)"""

import pytest

from mesh import reach as reaching
from mesh.compile import Reach
from mesh.model import Action, Item, Rule, Source, State, Workload, key_of
from mesh.snapshot import digest
from tests.mesh.build import identity, policy, service, state, workload

OPEN = policy("open", Action.ALLOW, Rule((Source(namespaces=("home",)),)))
CLIENT = workload("client", "home", node="n1", account="client", number=300, ports=())
WEBS = [workload(f"web-{number}", node="n2", account=account, number=number) for number, account in ((310, "a"), (311, "b"))]
ELSEWHERE = workload("batch-1", "jobs", node="n3", account="batch", number=320, ports=())
IDENTITIES = [
    identity("home", "client", 300),
    identity("shop", "a", 310),
    identity("shop", "b", 311),
    identity("jobs", "batch", 320),
]


def web(*endpoints: Workload):
    return service("web", endpoints=tuple(sorted(map(key_of, endpoints))))


def begin(*more: Item) -> tuple[State, Reach]:
    whole = state(OPEN, CLIENT, *WEBS, ELSEWHERE, *IDENTITIES, web(*WEBS), *more)
    return whole, Reach(whole)


def follow(whole: State, reach: Reach, put: list[Item], gone: list[str]) -> State:
    """Takes the change in, and compares with what begins anew."""
    items = {key_of(item): item for item in put}
    whole = {key: item for key, item in {**whole, **items}.items() if key not in gone}
    reach.change(items, set(gone))
    for node in ("n1", "n2", "n3", "n4", "n9"):
        seen, number = reach.part(node)
        assert seen == Reach(whole).of(node), node
        assert f"{number:064x}" == digest(seen), node
    return whole


def test_nobody_else_s_part_is_touched():
    whole, reach = begin()
    before = {node: reach.of(node) for node in ("n1", "n2", "n3", "n9")}
    kept = {node: dict(part) for node, part in before.items()}
    third = workload("web-3", node="n2", account="a", number=312)
    follow(whole, reach, [third, web(*WEBS, third)], [])
    assert all(reach.of(node) is before[node] for node in ("n3", "n9"))
    assert key_of(third) in reach.of("n1") and before == kept  # what was given away stays as it was


def test_an_identity_leaves_with_its_last_workload_that_is_told_of():
    idle = workload("idle", node="n3", account="a", number=330, labels={}, ports=())  # of the same account, and nobody asks it
    whole, reach = begin(idle)
    assert "Identity//spiffe://mesh.local/ns/shop/sa/a" in reach.of("n1")
    whole = follow(whole, reach, [web(WEBS[1])], [key_of(WEBS[0])])
    assert "Identity//spiffe://mesh.local/ns/shop/sa/a" in whole
    assert "Identity//spiffe://mesh.local/ns/shop/sa/a" not in reach.of("n1")


def test_a_service_whose_last_endpoint_leaves_is_seen_no_more():
    whole, reach = begin()
    whole = follow(whole, reach, [web(WEBS[1])], [key_of(WEBS[0])])
    assert "Service/shop/web" in reach.of("n1")
    follow(whole, reach, [web()], [key_of(WEBS[1])])
    assert "Service/shop/web" not in reach.of("n1")


def test_a_policy_that_comes_changes_what_is_seen():
    whole, reach = begin()
    reach.of("n1")
    closed = policy("closed", Action.DENY, Rule((Source(namespaces=("home",)),)))
    follow(whole, reach, [closed], [])
    assert "Policy/shop/closed" in reach.of("n1")


def test_who_answers_for_a_node_may_leave():
    """Callers are told of as long as one of the node's own can be asked, whichever that is."""
    twins = [workload(f"twin-{number}", node="n4", account="c", number=340 + number) for number in range(2)]
    whole, reach = begin(*twins, identity("shop", "c", 340))
    assert key_of(CLIENT) in reach.of("n4")
    for gone, kept in (twins, twins[::-1]):
        whole, reach = begin(*twins, identity("shop", "c", 340))
        reach.of("n4")
        whole = follow(whole, reach, [], [key_of(gone)])
        caller = workload("client-2", "home", node="n1", account="client", number=300, ports=())
        whole = follow(whole, reach, [caller], [])
        assert key_of(caller) in reach.of("n4"), kept.name


def test_a_node_sees_what_its_newest_account_sees():
    """In the namespace of another of its own, and as silent as that one."""
    only = policy("only", Action.ALLOW, Rule((Source(principals=("mesh.local/ns/home/sa/known",)),)), namespace="bank")
    vault = workload("vault", "bank", node="n2", account="vault", number=350)
    more = [only, vault, service("vault", "bank", number=501, endpoints=(key_of(vault),)), identity("bank", "vault", 350)]
    whole, reach = begin(*more)
    assert "Service/bank/vault" not in reach.of("n1")
    known = workload("known", "home", node="n1", account="known", number=360, ports=())
    whole = follow(whole, reach, [known, identity("home", "known", 360)], [])
    assert "Service/bank/vault" in reach.of("n1")
    follow(whole, reach, [], [key_of(known), "Identity//spiffe://mesh.local/ns/home/sa/known"])
    assert "Service/bank/vault" not in reach.of("n1")


def test_a_node_is_called_by_those_whom_its_newest_answer_lets_in():
    quiet = workload("quiet", node="n4", account="c", number=340, ports=())
    whole, reach = begin(quiet, identity("shop", "c", 340))
    assert key_of(CLIENT) not in reach.of("n4")
    loud = workload("loud", node="n4", account="c", number=341)
    whole = follow(whole, reach, [loud], [])
    assert key_of(CLIENT) in reach.of("n4")
    follow(whole, reach, [], [key_of(loud)])


def test_answers_that_are_kept_have_a_limit(monkeypatch: pytest.MonkeyPatch):
    """While parts are made, too: of many accounts and many policies each pair is an answer."""
    accounts = [workload(f"w{number}", node=f"n{number % 4}", account=f"a{number}", number=400 + number) for number in range(24)]
    only = [policy(f"only-{number}", Action.DENY, Rule(), selector={"app": f"a{number}"}) for number in range(24)]
    whole, reach = begin(*accounts, *only)
    wanted = {f"n{number}": Reach(whole).of(f"n{number}") for number in range(4)}
    monkeypatch.setattr(reaching, "KNOWN_MAX", 50)
    most = 0
    for node, part in wanted.items():
        assert reach.of(node) == part
        most = max(most, len(reach._known))
    assert 0 < most <= 50
