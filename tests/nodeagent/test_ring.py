"""Events as flows: pure, and the fake that stands in for a kernel."""

from __future__ import annotations

import asyncio

import pytest

from mesh.dataplane import KernelVerdict, NodePlan, PolicyEntry, PolicyKey
from mesh.link import Flow
from nodeagent.datapath_api import DatapathApi, MapFull
from nodeagent.datapath_fake import FakeDatapath
from nodeagent.layouts import address
from nodeagent.ring import Names, boot_offset_s, flow_of
from tests.nodeagent.compiled import compiled_layouts


def event(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "time_ns": 2_000_000_000, "src": address("10.0.0.1"), "dst": address("fd77::2"),
        "verdict": 0, "reason": 0, "src_identity": 301,
        "src_workload": 501, "dst_workload": 502, "sport": 1000, "dport": 80, "proto": 6,
    }  # fmt: skip
    return compiled_layouts()["pl_event"].pack(**(fields | changes))  # type: ignore[arg-type]


NAMES = Names(
    ("first", "second"), {301: "spiffe://m/ns/n/sa/a"}, {501: "Workload/n/a", 502: "Workload/n/b"}, {}, {77: "n/let#0"}, "n1", 7
)


def test_numbers_become_names() -> None:
    assert flow_of(event(), compiled_layouts()["pl_event"], NAMES, 10.0) == Flow(
        time=12.0, verdict="denied", reason="first", source="spiffe://m/ns/n/sa/a", destination="Workload/n/b",
        source_address="10.0.0.1:1000", destination_address="[fd77::2]:80", protocol="tcp", revision=7, node="n1",
    )  # fmt: skip


def test_who_loses_the_cpu_between_two_clocks_reads_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lost = 100.0, iter([0.5, 0.0, 0.3, *[0.001] * 100])

    def booted(_: int) -> float:
        nonlocal clock
        clock += next(lost)
        return clock

    monkeypatch.setattr("nodeagent.ring.time.clock_gettime", booted)
    monkeypatch.setattr("nodeagent.ring.time.time", lambda: 1_000_000 + clock)
    assert boot_offset_s() == pytest.approx(1_000_000, abs=0.001)


def told(names: Names = NAMES, **changes: object) -> Flow:
    flow = flow_of(event(**changes), compiled_layouts()["pl_event"], names, 0.0)
    assert flow is not None
    return flow


def test_an_admission_is_told_by_its_rule_and_a_denial_by_its_reason() -> None:
    assert (told(verdict=1, rule=77).reason, told(verdict=1, rule=77).rule) == ("n/let#0", "n/let#0")
    assert (told(verdict=0, rule=77).reason, told(verdict=0, rule=77).rule) == ("first", "n/let#0")
    assert (told(verdict=1).reason, told(verdict=1).rule) == ("first", "")


def test_a_denial_by_policy_is_traced_to_its_rule() -> None:
    asked: list[object] = []
    names = Names(("policy_denied", "outbound_denied"), denied_by=lambda *about: asked.append(about) or "n/not#0")
    flow = told(names)
    assert (flow.reason, flow.rule) == ("policy_denied", "n/not#0")
    assert asked == [(301, 502, "fd77::2", 80, "tcp")]
    assert told(names, reason=1).rule == told(names, verdict=1).rule == told(names, dst_workload=0).rule == ""
    assert len(asked) == 1


@pytest.mark.parametrize("unknown", ["::", "0.0.0.0"])
def test_an_unknown_source_is_left_empty(unknown: str) -> None:
    assert told(src=address(unknown), sport=0).source_address == ""


def test_what_the_proxy_dials_is_not_for_people() -> None:
    names = Names(("proxy_dial",))
    assert flow_of(event(verdict=1), compiled_layouts()["pl_event"], names, 0.0) is None


def test_numbers_nobody_knows_stay_numbers() -> None:
    flow = told(reason=99, src_identity=999, dst_workload=999, verdict=1, proto=132)
    assert (flow.reason, flow.source, flow.destination, flow.verdict, flow.protocol) == (
        "id:99",
        "id:999",
        "id:999",
        "allowed",
        "132",
    )
    assert told(src_identity=0, src_workload=0).source == "unknown"


async def test_the_fake_keeps_what_it_is_told() -> None:
    fake = FakeDatapath(entries_max=1)
    api: DatapathApi = fake
    cookie = api.adopt(None)
    assert api.adopt(None) == cookie and all(api.load().values())
    listeners = api.open_listeners(cookie, ("10.0.0.1",))
    assert {frame.kind for frame, _ in listeners} == {"outbound", "dns-udp", "dns-tcp", "hbone"}
    digest = api.apply(NodePlan(), 1)
    more = {PolicyKey(1, n, 1, "tcp"): PolicyEntry(KernelVerdict.ALLOW, 1) for n in range(2)}
    with pytest.raises(MapFull):
        api.apply(NodePlan(policy=more), 2)
    assert api.observed_digest() == digest and fake.generation == 1
    flow = Flow(time=1.0, verdict="denied", reason="x")
    fake.tell(flow)
    stream = api.flows()
    assert await asyncio.wait_for(anext(stream), 1) == flow
    api.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(stream), 1)
