import pytest
from msgspec.structs import replace

from mesh.explain import ExplainError, why
from mesh.model import Service, Workload
from tests.mesh.build import compiled, spiffe
from tests.mesh.shop import SHOP

STATE = compiled(SHOP)


@pytest.mark.parametrize(
    ("question", "outcome", "rule", "kind"),
    [
        (("jobs/batch-1", "shop/web", "GET", "/api/x"), "allowed", "shop/web#0", "proxy"),
        (("jobs/batch-1", "web.shop.mesh", "GET", "/api/x", 80), "allowed", "shop/web#0", "proxy"),
        (("jobs/batch-1", "shop/web", "POST", "/api/x"), "denied", "no-allow-rule", "proxy"),
        (("jobs/batch-1", "shop/web", "GET", "/other"), "no_route", "", "proxy"),
        (("jobs/batch-1", "shop/web"), "needs_l7", "shop/web#0", "proxy"),
        (("shop/web-1", "shop/redis"), "allowed", "shop/redis#0", "native"),
        ((spiffe("shop", "web"), "shop/redis"), "allowed", "shop/redis#0", "native"),
        (("mesh.local/ns/shop/sa/web", "Workload/shop/redis-1", None, "", 6379), "allowed", "shop/redis#0", "proxy"),
        (("evil/intruder", "jobs/batch"), "denied", "pillion-system/no-evil#0", "native"),
        (("jobs/batch-1", "jobs/batch"), "denied", "mesh-default", "native"),
        (("unknown", "shop/web", "GET", "/api/x"), "denied", "", "proxy"),
        (("unknown", "shop/redis"), "denied", "no-allow-rule", "native"),
    ],
)
def test_answers(question, outcome, rule, kind):
    answer = why(STATE, *question, revision=7)
    assert (answer.outcome, answer.rule, answer.path_kind, answer.revision) == (outcome, rule, kind, 7)
    assert answer.detail
    assert answer.source.proof


def test_the_evidence_is_told():
    answer = why(STATE, "jobs/batch-1", "shop/web", "GET", "/api/x")
    assert answer.source.spiffe == spiffe("jobs", "batch")
    assert "node n3" in answer.source.proof[0]
    assert [endpoint.workload for endpoint in answer.endpoints] == ["Workload/shop/web-1", "Workload/shop/web-2"]
    assert answer.endpoints[0].policies == ("shop/web ALLOW",)
    assert answer.route == "shop/web#0"


@pytest.mark.parametrize(
    ("question", "told"),
    [
        (("shop/wep-1", "shop/redis"), "did you mean shop/web-1"),
        (("shop/web-1", "shop/redi"), "did you mean shop/redis"),
        (("jobs/web-1", "shop/redis"), "did you mean shop/web-1"),
        (("shop/nothing-of-the-kind", "shop/redis"), r"no workload 'shop/nothing-of-the-kind'; none of the \d+ that are there"),
        (("shop/web-1", "shop/q"), r"no service or workload 'shop/q'; none of the \d+ that are there"),
        (("shop/web-1", "shop/redis", None, "", 80), "it has 6379, 8125"),
        (("shop/web-1", "Workload/shop/redis-1", None, "", 80), "it has 6379, 8125"),
        (("spiffe://other.local/ns/shop/sa/web", "shop/redis"), "of the trust domain mesh.local, and no other enters"),
        (("other.local/ns/shop/sa/web", "shop/redis"), "of the trust domain mesh.local, and no other enters"),
    ],
)
def test_a_wrong_name_is_answered_with_near_ones(question, told):
    with pytest.raises(ExplainError, match=told):
        why(STATE, *question)


@pytest.mark.parametrize(
    ("question", "told"),
    [
        (("shop/web-1", "shop/web", "GET", "/api/x"), "no: "),
        (("shop/web-1", "shop/web"), ""),
        (("shop/web-1", "shop/redis", "GET", "/"), ""),
        ((spiffe("shop", "web"), "shop/web", "GET", "/api/x"), ""),
    ],
)
def test_whether_the_kernel_carries_it_is_told(question, told):
    answer = why(STATE, *question).express
    assert answer.startswith(told)
    assert bool(answer) is bool(told)


CHANGE = {Workload: {"node": "n1"}, Service: {"add_headers": ()}}
NEAR = {key: replace(item, **CHANGE.get(type(item), {})) for key, item in STATE.items()}


@pytest.mark.parametrize("destination", ["shop/web", "Workload/shop/web-1"])
def test_a_request_the_kernel_carries(destination):
    answer = why(NEAR, "jobs/batch-1", destination, "GET", "/api/x")
    assert answer.outcome == "allowed"
    assert answer.express.startswith("yes")
    assert "denied" in why(NEAR, "jobs/batch-1", destination, "POST", "/api/x").express
    assert why(NEAR, "jobs/batch-1", destination).express == ""


def without(state, *keys):
    return {key: item for key, item in state.items() if key not in keys}


# The callers of web and of redis are gone, and with web's its endpoints' identity
ASIDE = without(STATE, "Workload/jobs/batch-1", f"Identity//{spiffe('jobs', 'batch')}")


@pytest.mark.parametrize(
    ("question", "outcome", "rule"),
    [
        ((spiffe("jobs", "batch"), "shop/web", "GET", "/api/x"), "allowed", "shop/web#0"),
        (("mesh.local/ns/jobs/sa/batch", "shop/web", "POST", "/api/x"), "denied", "no-allow-rule"),
        ((spiffe("jobs", "batch"), "Workload/shop/web-1", "GET", "/api/x"), "allowed", "shop/web#0"),
        ((spiffe("jobs", "batch"), "shop/web"), "needs_l7", "shop/web#0"),
        ((spiffe("shop", "nobody"), "shop/redis"), "denied", "no-allow-rule"),
        ((spiffe("evil", "nobody"), "jobs/batch"), "no_endpoint", ""),
    ],
)
def test_an_identity_that_nobody_runs_as_is_decided(question, outcome, rule):
    answer = why(ASIDE, *question)
    assert (answer.outcome, answer.rule) == (outcome, rule)
    (told,) = answer.source.proof
    assert told.startswith(f"asked as {answer.source.spiffe}: no workload runs as it now")
    assert (answer.source.workload, answer.source.identity, answer.source.address) == ("", 0, "")


def test_it_is_decided_as_if_somebody_ran_as_it():
    """Whatever is asked: the answer is the one its workload gets, from whatever address."""
    for destination in ("shop/web", "shop/redis", "Workload/shop/web-2"):
        for request in ((None, ""), ("GET", "/api/x"), ("POST", "/api/x"), ("GET", "/")):
            there, gone = (why(state, spiffe("jobs", "batch"), destination, *request) for state in (STATE, ASIDE))
            same = ("outcome", "rule", "reason", "endpoints", "route", "path_kind")
            assert [getattr(there, name) for name in same] == [getattr(gone, name) for name in same]


def test_a_slip_in_an_identity_is_told():
    (told,) = why(STATE, spiffe("shop", "webb"), "shop/redis").source.proof
    assert f"did you mean {spiffe('shop', 'web')}" in told
