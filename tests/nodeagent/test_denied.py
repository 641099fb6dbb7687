"""Which open connections a plan denies: a table."""

from __future__ import annotations

import socket

import pytest

from mesh.dataplane import Egress, KernelVerdict, Member, NodePlan, PolicyEntry, PolicyKey
from nodeagent.datapath import Codec
from nodeagent.denied import EgressTable, denied, owners
from nodeagent.layouts import address
from nodeagent.sockdiag import Sock, State
from tests.nodeagent.compiled import compiled_layouts

CONNS = 9
CLIENT, SERVER, GONE, AGENT, CHILD = 70, 71, 72, 60, 701
PLAN = NodePlan(
    members={CLIENT: Member(501, 301, 1, False), SERVER: Member(502, 302, 2, True)},
    policy={
        PolicyKey(502, 301, 80, "tcp"): PolicyEntry(KernelVerdict.ALLOW, 1),
        PolicyKey(502, 301, 81, "tcp"): PolicyEntry(KernelVerdict.L7, 1),
        PolicyKey(502, 0, 80, "tcp"): PolicyEntry(KernelVerdict.ALLOW, 1),
    },
    egress={"192.0.2.0/24": Egress(True, (443,)), "192.0.2.128/25": Egress(False)},
)


@pytest.mark.parametrize(
    ("cgroup", "kind", "conn", "expected"),
    [
        (CLIENT, "PL_ARRIVAL_NATIVE", {"workload": 502, "identity": 301, "port": 80}, False),
        (CHILD, "PL_ARRIVAL_NATIVE", {"workload": 502, "identity": 301, "port": 80}, False),
        (CLIENT, "PL_ARRIVAL_NATIVE", {"workload": 502, "identity": 301, "port": 82}, True),
        (CLIENT, "PL_ARRIVAL_NATIVE", {"workload": 502, "identity": 301, "port": 81}, True),  # only the proxy could tell
        (CLIENT, "PL_ARRIVAL_NATIVE", {"workload": 502, "identity": 999, "port": 80}, True),  # it was somebody else
        (GONE, "PL_ARRIVAL_NATIVE", {"workload": 502, "identity": 301, "port": 80}, True),
        (AGENT, "PL_ARRIVAL_NATIVE", {"workload": 502, "identity": 301, "port": 82}, False),
        (SERVER, "PL_ARRIVAL_NATIVE", {"workload": 501, "identity": 301, "port": 80, "server": True}, False),
        (SERVER, "PL_ARRIVAL_NATIVE", {"workload": 501, "identity": 303, "port": 80, "server": True}, True),
        (SERVER, "PL_ARRIVAL_PROXY", {"identity": 301, "port": 81, "server": True}, False),
        (SERVER, "PL_ARRIVAL_PROXY", {"identity": 301, "port": 82, "server": True}, True),
        (CLIENT, "PL_ARRIVAL_CAPTURED", {"identity": 301, "port": 15001}, False),
        (CLIENT, "PL_ARRIVAL_LOCAL", {"identity": 301, "port": 9}, False),
        (SERVER, "PL_ARRIVAL_LOCAL", {"workload": 502, "identity": 302, "port": 9, "server": True}, False),
        (SERVER, "PL_CONN_OUTSIDE", {"identity": 0, "port": 80, "server": True}, False),
        (SERVER, "PL_CONN_OUTSIDE", {"identity": 0, "port": 82, "server": True}, True),
        (CLIENT, "PL_CONN_OUTBOUND", {"identity": 301, "peer": "192.0.2.1", "peer_port": 443}, False),
        (CLIENT, "PL_CONN_OUTBOUND", {"identity": 301, "peer": "192.0.2.1", "peer_port": 80}, True),
        (CLIENT, "PL_CONN_OUTBOUND", {"identity": 301, "peer": "192.0.2.200", "peer_port": 443}, True),
        (CLIENT, "PL_CONN_OUTBOUND", {"identity": 301, "peer": "198.51.100.1", "peer_port": 443}, True),
        (CLIENT, "PL_CONN_TRUSTED", {"identity": 0}, False),
    ],
)
def test_denied(cgroup: int, kind: str, conn: dict[str, object], expected: bool) -> None:
    layouts = compiled_layouts()
    fields = {name: value for name, value in conn.items() if name not in ("server", "peer")}
    flags = layouts.enums["PL_CONN_SERVER"] if conn.get("server") else 0
    peer = address(str(conn.get("peer", "0.0.0.0")))
    stored = layouts["pl_conn"].pack(kind=layouts.enums[kind], flags=flags, peer=peer, proto=6, generation=1, **fields)  # type: ignore[arg-type]
    sock = Sock(socket.AF_INET, 6, State.ESTABLISHED, "10.0.0.1", 1, "10.0.0.2", 2, 3, cgroup, b"", {CONNS: stored})
    doomed = denied(PLAN, layouts, CONNS, owners(PLAN, {CHILD: (CHILD, CLIENT)}), lambda group: group == AGENT)
    assert doomed(sock) is expected


def test_what_a_name_opens_goes_on() -> None:
    layouts = compiled_layouts()
    peer = {"peer": address("198.51.100.1"), "peer_port": 443}
    stored = layouts["pl_conn"].pack(kind=layouts.enums["PL_CONN_OUTBOUND"], identity=301, proto=6, generation=1, **peer)  # type: ignore[arg-type]
    sock = Sock(socket.AF_INET, 6, State.ESTABLISHED, "10.0.0.1", 1, "198.51.100.1", 443, 3, CLIENT, b"", {CONNS: stored})
    for whose, expected in ((501, False), (502, True)):
        granted = {(whose, "198.51.100.1", 443)}
        doomed = denied(PLAN, layouts, CONNS, owners(PLAN, {}), lambda _: False, lambda *asked: asked in granted)
        assert doomed(sock) is expected


def test_sockets_without_a_record_are_left_alone() -> None:
    sock = Sock(socket.AF_INET, 6, State.ESTABLISHED, "10.0.0.1", 1, "10.0.0.2", 2, 3, CLIENT, b"", {})
    assert not denied(PLAN, compiled_layouts(), CONNS, owners(PLAN, {}), lambda _: False)(sock)


def test_the_longest_range_decides() -> None:
    table = EgressTable(NodePlan(outbound_allow=True, egress={"10.0.0.0/8": Egress(False), "10.1.0.0/16": Egress(True, (1,))}))
    assert table.allows("10.1.2.3", 1) and not table.allows("10.1.2.3", 2)
    assert not table.allows("10.2.2.3", 1) and table.allows("11.0.0.1", 5) and table.allows("::1", 5)


def test_every_verdict_has_a_number() -> None:
    assert Codec(compiled_layouts()).openness("policy", None) == 0
