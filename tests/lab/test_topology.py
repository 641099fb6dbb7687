"""The plan alone: no namespace is made here."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.topology import (
    NODES_MAX,
    WORKLOADS_PER_NODE_MAX,
    LabPlan,
    NodePlan,
    PlanError,
    PodPlan,
    check_lab_name,
    check_workload_name,
    free_index,
    node_index,
    node_names,
    resolv_conf,
)

INTERFACE_CHARS_MAX = 15


@pytest.mark.parametrize("name", ["demo", "a", "t12345two", "x0"])
def test_lab_names(name: str) -> None:
    assert check_lab_name(name) == name


@pytest.mark.parametrize("name", ["", "Demo", "9x", "a-b", "a" * 13, "a/b", "a\n"])
def test_lab_names_refused(name: str) -> None:
    with pytest.raises(PlanError):
        check_lab_name(name)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a" * 41, "../x"])
def test_workload_names_refused(name: str) -> None:
    with pytest.raises(PlanError):
        check_workload_name(name)


@pytest.mark.parametrize("name", ["n0", "n100", "1", "node1", "n01", "n1\n"])
def test_node_names_refused(name: str) -> None:
    with pytest.raises(PlanError):
        node_index(name)


@pytest.mark.parametrize("count", [0, -1, NODES_MAX + 1])
def test_node_count_refused(count: int) -> None:
    with pytest.raises(PlanError):
        node_names(count)


def test_the_documented_addresses() -> None:
    node = NodePlan("demo", "n2")
    pod = PodPlan(node, "web-1", 10)
    assert (node.netns, node.addresses) == ("pl-demo-n2", ("10.77.0.12", "fd77::12"))
    assert (pod.netns, pod.addresses, pod.veth) == ("pl-demo-n2-web-1", ("10.77.2.10", "fd77:2::10"), "pod10")


def test_every_address_is_one_of_a_kind_and_in_its_network() -> None:
    plan = LabPlan.of("demo", node_names(NODES_MAX))
    seen: set[str] = set()
    for node in plan.nodes:
        networks = [ipaddress.ip_network(text) for text in node.pod_networks]
        pods = [PodPlan(node, f"w{index}", index) for index in (10, 11, 249)]
        for address in (*node.addresses, *node.gateways, *(address for pod in pods for address in pod.addresses)):
            assert address not in seen
            seen.add(address)
        for pod in pods:
            assert all(ipaddress.ip_address(each) in network for each, network in zip(pod.addresses, networks, strict=True))


def test_interface_names_fit_the_kernel() -> None:
    plan = LabPlan.of("a" * 12, node_names(NODES_MAX))
    names = [node.name for node in plan.nodes] + [PodPlan(plan.nodes[-1], "w" * 40, 249).veth, "eth0", "br0"]
    assert all(len(name) <= INTERFACE_CHARS_MAX for name in names)


def test_no_lab_is_another_labs_prefix() -> None:
    assert not LabPlan.of("demo2", node_names(1)).netns.startswith(LabPlan.of("demo", node_names(1)).prefix)


def test_every_node_has_a_way_to_every_other() -> None:
    plan = LabPlan.of("demo", node_names(3))
    lines = plan.nodes[0].uplink(plan.nodes)
    assert "route add 10.77.2.0/24 via 10.77.0.12" in lines
    assert "route add fd77:3::/64 via fd77::13" in lines
    assert not any("10.77.1.0/24 via" in line for line in lines)


@given(st.sets(st.integers(10, 249)))
def test_free_index_is_free(taken: set[int]) -> None:
    if len(taken) < WORKLOADS_PER_NODE_MAX:
        assert free_index(taken) not in taken
    else:
        with pytest.raises(PlanError):
            free_index(taken)


def test_resolv_conf_searches_the_namespace_first() -> None:
    assert "search shop.mesh mesh\n" in resolv_conf("shop")
