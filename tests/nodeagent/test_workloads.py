"""The node's workloads as an operator writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.workloads import Spec, WorkloadFile, WorkloadsError, parse

ENTRY: dict[str, Any] = {
    "name": "web-1",
    "namespace": "shop",
    "serviceAccount": "web",
    "labels": {"app": "web"},
    "addresses": ["10.77.1.2", "fd77:1::0002"],
    "netns": "/run/netns/web-1",
    "cgroup": "/cg/workloads/web-1",
    "veth": "plweb1",
}


def load(*entries: dict[str, Any]) -> dict[str, Spec]:
    return parse(yaml.safe_dump({"workloads": list(entries)}), node_addresses=("10.77.0.11",), ancestor="/cg")


def test_an_entry() -> None:
    assert load(ENTRY) == {
        "Workload/shop/web-1": Spec(
            name="web-1",
            namespace="shop",
            service_account="web",
            cgroup="/cg/workloads/web-1",
            addresses=("10.77.1.2", "fd77:1::2"),
            labels={"app": "web"},
            netns="/run/netns/web-1",
            veth="plweb1",
        )
    }


def test_a_workload_of_the_node_has_its_addresses() -> None:
    plain = {key: ENTRY[key] for key in ("name", "namespace", "serviceAccount", "cgroup")}
    assert load(plain)["Workload/shop/web-1"].addresses == ("10.77.0.11",)


@pytest.mark.parametrize("text", ["", "workloads:", "workloads: []"])
def test_no_workloads(text: str) -> None:
    assert parse(text, node_addresses=(), ancestor="/cg") == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "Web"}, "name"),
        ({"name": "../x"}, "name"),
        ({"namespace": None}, "namespace"),
        ({"serviceAccount": ""}, "serviceAccount"),
        ({"addresses": []}, "addresses"),
        ({"addresses": ["10.0.0.1", "10.0.0.2"]}, "one per family"),
        ({"addresses": ["127.0.0.1"]}, "127.0.0.1"),
        ({"addresses": ["::ffff:10.0.0.1"]}, "IPv4"),
        ({"addresses": ["0.0.0.0"]}, "0.0.0.0"),
        ({"addresses": [7]}, "7"),
        ({"cgroup": "relative"}, "cgroup"),
        ({"cgroup": "/cg"}, "below"),
        ({"cgroup": "/elsewhere/web"}, "below"),
        ({"cgroup": "/cg/../etc"}, "cgroup"),
        ({"netns": "web"}, "netns"),
        ({"veth": "a/b"}, "veth"),
        ({"labels": {"app": 1}}, "label"),
        ({"labels": ["app"]}, "labels"),
        ({"ports": [70000]}, "ports"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_entry_is_told_by_its_field(change: dict[str, Any], told: str) -> None:
    with pytest.raises(WorkloadsError, match="workloads\\[0\\]") as caught:
        load({**ENTRY, **change})
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({}, "twice"),
        ({"name": "b"}, "same cgroup"),
        ({"name": "b", "cgroup": "/cg/workloads/web-1/inner"}, "inside"),
        ({"name": "b", "cgroup": "/cg/workloads/b", "netns": "/run/netns/b"}, "another netns"),
    ],
)
def test_entries_that_contradict_each_other(other: dict[str, Any], told: str) -> None:
    with pytest.raises(WorkloadsError, match=told):
        load(ENTRY, {**ENTRY, **other})


@given(
    st.one_of(
        st.text(max_size=200), st.recursive(st.none() | st.integers() | st.text(max_size=8), st.lists, max_leaves=8).map(str)
    )
)
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        parse(text, node_addresses=("10.0.0.1",), ancestor="/cg")
    except WorkloadsError:
        pass


def test_the_file_is_watched_and_a_bad_one_keeps_the_old(tmp_path: Path) -> None:
    path = tmp_path / "workloads.yaml"
    watched = WorkloadFile(path, node_addresses=("10.0.0.1",), ancestor="/cg")
    assert not watched.poll() and not watched.loaded, "absent is no error at first"
    path.write_text(yaml.safe_dump({"workloads": [ENTRY]}))
    assert watched.poll() and len(watched.specs) == 1 and watched.loaded
    assert not watched.poll()
    path.write_text("workloads: [")
    assert watched.poll() and len(watched.specs) == 1 and str(path) in watched.error and watched.refused == 1
    path.write_bytes(b"\xff\xfe")
    assert watched.poll() and len(watched.specs) == 1 and watched.refused == 2
    path.unlink()
    assert watched.poll() and len(watched.specs) == 1 and "absent" in watched.error
    path.write_text("workloads: []")
    assert watched.poll() and not watched.specs and not watched.error
