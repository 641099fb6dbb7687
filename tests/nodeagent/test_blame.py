"""Denials that the kernel tells without a rule get one, by the evaluator that made the plan."""

from __future__ import annotations

import pytest

from mesh.dataplane import BackendKey, DestKey, DestKind, NodePlan, plan_node
from mesh.link import LocalWorkload
from mesh.model import Identity, Workload
from mesh.policy import NO_ALLOW_RULE, Peer, PolicySet, Request, authorize
from nodeagent.blame import Blame
from tests.mesh.build import compiled
from tests.mesh.shop import SHOP

STATE = compiled(SHOP)
LOCAL = [
    LocalWorkload(key, number, 2000 + number)
    for number, (key, item) in enumerate(sorted(STATE.items()))
    if isinstance(item, Workload) and item.node in ("n1", "n3")
]
IDS = {key: item.id for key, item in STATE.items() if isinstance(item, Workload | Identity)}


def identity(name: str) -> int:
    return next(number for key, number in IDS.items() if key.startswith("Identity/") and key.endswith(f"/sa/{name}"))


def blame(node: str) -> tuple[Blame, NodePlan]:
    plan = plan_node(STATE, node, LOCAL)
    return Blame(STATE, plan), plan


def test_a_deny_rule_and_its_absence_are_told_apart() -> None:
    who, _ = blame("n3")
    batch = IDS["Workload/jobs/batch-1"]
    assert who(identity("intruder"), batch, "10.77.3.2", 7000, "tcp") == "pillion-system/no-evil#0"
    who, _ = blame("n1")
    assert who(identity("intruder"), IDS["Workload/shop/redis-1"], "10.77.1.3", 6379, "tcp") == NO_ALLOW_RULE


def test_the_port_behind_a_virtual_address_is_the_one_asked_about() -> None:
    who, plan = blame("n3")
    native = [key for key, dest in plan.dests.items() if dest.kind is DestKind.NATIVE and key.port == 7000]
    assert native
    for key in native:
        dest = plan.dests[key]
        backend = plan.backends[BackendKey(dest.service, key.port, 0)]
        moved = NodePlan(dests={DestKey("240.9.9.9", 1, "tcp"): dest}, backends={BackendKey(dest.service, 1, 0): backend})
        found = Blame(STATE, moved)(identity("intruder"), backend.workload, "240.9.9.9", 1, "tcp")
        assert found == who(identity("intruder"), backend.workload, key.address, key.port, "tcp") != ""


@pytest.mark.parametrize("source", sorted(key for key in IDS if key.startswith("Identity/")))
def test_it_names_what_the_evaluator_names(source: str) -> None:
    who, _ = blame("n1")
    item = STATE[source]
    assert isinstance(item, Identity)
    redis = "Workload/shop/redis-1"
    verdict = authorize(PolicySet(STATE), Peer(item.spiffe, item.id), redis, Request(6379))
    assert who(item.id, IDS[redis], "10.77.1.3", 6379, "tcp") == ("" if verdict.allowed else verdict.rule)


def test_what_is_unknown_has_no_rule() -> None:
    who, _ = blame("n1")
    assert who(identity("web"), 999_999, "10.77.1.3", 6379, "tcp") == ""
