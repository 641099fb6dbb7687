"""Flows, metrics and readiness: what the agent tells people."""

from __future__ import annotations

import asyncio
import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mesh.link import Flow
from nodeagent.exposition import merge
from nodeagent.flows import FOLLOWER_FLOWS_MAX, FOLLOWERS_MAX, TEXT_CHARS_MAX, FlowRing, TooManyFollowers, of_worker
from nodeagent.readiness import Facts, assess


def flow(number: int) -> Flow:
    return Flow(time=float(number), verdict="denied", reason="policy_denied")


async def test_the_ring_keeps_the_newest() -> None:
    ring = FlowRing(3)
    for number in range(5):
        ring.add(flow(number))
    assert [item.time for item in ring.last(2)] == [3.0, 4.0] and len(ring.last(99)) == 3 and ring.last(0) == []
    assert ring.seen == {"denied": 5}


async def test_a_follower_gets_the_past_then_the_present() -> None:
    ring = FlowRing()
    ring.add(flow(1))
    follower = ring.follow(10)
    assert (await anext(follower)).time == 1.0
    waiting = asyncio.ensure_future(anext(follower))
    await asyncio.sleep(0)
    ring.add(flow(2))
    assert (await waiting).time == 2.0
    await follower.aclose()  # type: ignore[attr-defined]  # an async generator
    assert not ring._followers


async def test_a_slow_follower_loses_and_is_counted() -> None:
    ring = FlowRing()
    follower = ring.follow(1)
    ring.add(flow(0))
    await anext(follower)
    for number in range(FOLLOWER_FLOWS_MAX + 7):
        ring.add(flow(number))
    assert ring.missed == 7


@pytest.mark.parametrize("when", [0.0, math.nan, math.inf, 1e300, 2e9])
def test_a_workers_flow_is_short_of_this_node_and_of_now(when: float) -> None:
    long = "x" * 100_000
    told = of_worker(Flow(time=when, verdict="denied", reason=long, source=long, path=long, rule=long, node="another"), "n1", 1e9)
    assert {len(told.reason), len(told.source), len(told.path), len(told.rule)} == {TEXT_CHARS_MAX}
    assert (told.node, told.verdict, told.time) == ("n1", "denied", 1e9)


def test_a_workers_flow_keeps_its_moment() -> None:
    assert of_worker(Flow(time=1e9 - 1, verdict="allowed", reason="shop/web#0"), "n1", 1e9).time == 1e9 - 1


async def test_followers_are_limited() -> None:
    ring = FlowRing()
    ring.add(flow(0))
    followers = [ring.follow(1) for _ in range(FOLLOWERS_MAX)]
    for follower in followers:
        await anext(follower)
    with pytest.raises(TooManyFollowers):
        await anext(ring.follow(1))


def test_texts_are_merged_by_family() -> None:
    worker = '# HELP a_total x\n# TYPE a_total counter\na_total{code="200"} 3\n'
    worker += '# TYPE b histogram\nb_bucket{le="1"} 1\nb_count 1\nb_sum 2\n'
    junk = 'junk {\njunk{a="} 1\njunk{a=1} 1\njunk x\n\x1b[2J 1\n'
    text = merge([({}, "# TYPE a_total counter\na_total 1\n"), ({"worker": "0"}, worker), ({"worker": "1"}, worker), ({}, junk)])
    assert "junk" not in text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE a_total counter") == 1
    assert {sample.labels.get("worker") for sample in families["a"].samples} == {None, "0", "1"}
    assert len(families["b"].samples) == 6


def test_no_label_is_there_twice() -> None:
    """One such line of one worker, and a reader has nothing of the whole node."""
    text = merge([({"worker": "0"}, 'a{worker="1"} 1\na{b="1",b="2"} 1\na{b="worker=\\"1\\""} 1\n')])
    assert text == 'a{b="worker=\\"1\\"",worker="0"} 1\n'


READY = Facts(programs={"connect4": True}, revision=3, applied=True, workers={"w0": True})


def test_ready() -> None:
    assert assess(READY).ready and not assess(READY).detail


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"programs": {}}, "not loaded"),
        ({"programs": {"connect4": False}}, "connect4"),
        ({"revision": 0}, "no state"),
        ({"applied": False}, "newest state"),
        ({"kernel_error": "map full"}, "map full"),
        ({"kernel_drift": True}, "differ"),
        ({"persist_error": "disk full"}, "disk full"),
        ({"cut": True}, "cut"),
        ({"specs_error": "not YAML"}, "not YAML"),
        ({"workers": {}}, "no proxy worker"),
        ({"workers": {"w0": False}}, "w0"),
        ({"lagging": ("w1",)}, "w1"),
        ({"waiting": {"Workload/shop/web": "no listeners yet"}}, "shop/web: no listeners"),
    ],
)
def test_what_is_missing_is_told(change: dict[str, object], told: str) -> None:
    facts = Facts(**{name: change.get(name, getattr(READY, name)) for name in Facts.__dataclass_fields__})  # type: ignore[arg-type]
    found = assess(facts)
    assert not found.ready and told in found.detail


def test_a_refused_workload_is_told_and_holds_up_nothing() -> None:
    refused = {"Workload/a/b": "identity_not_granted"}
    found = assess(Facts(programs={"c": True}, revision=3, applied=True, workers={"w": True}, refused=refused))
    assert found.ready and "a/b: identity_not_granted" in found.detail
