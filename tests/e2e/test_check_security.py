"""`pillion check --security` on a live node: it sees what is kept and what is not, and what was broken on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pillion import node_facts
from tests.e2e.mesh import Mesh, until

PERMISSIVE = """apiVersion: mesh.pillion.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: plain, namespace: shop}
spec: {selector: {matchLabels: {app: dark}}, mtls: {mode: PERMISSIVE}}
"""
# The lab's programs run as root with every capability, and its MeshConfig sets no lease
LAB = {"workloads confined", "policy lease"}
if any(Path(path).exists() for path in node_facts.MANAGERS):  # of the machine the lab is on
    LAB |= {"service managers"}


def check(mesh: Mesh, node: str = "n1") -> tuple[int, dict[str, dict[str, Any]]]:
    argv = [sys.executable, "-m", "pillion", "--lab", mesh.lab.name, "check", "--security", "--node", node, "-o", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"COLUMNS": "200"})
    assert done.stdout, done.stderr
    return done.returncode, {row["check"]: row for row in json.loads(done.stdout)}


def wrong(report: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, row in report.items() if row["verdict"] != "enforced"}


def test_a_live_node(mesh: Mesh) -> None:
    code, report = check(mesh)
    assert code == 1
    assert wrong(report) == LAB, report
    assert all(report[name]["remedy"] for name in LAB)
    assert "shop/echo" in report["workloads confined"]["seen"]
    assert "links on the node's cgroup" in report["programs"]["seen"]


def test_what_was_loosened_is_seen(mesh: Mesh) -> None:
    socket = mesh.lab.paths.agent_run("n1") / "proxy/worker-0.sock"
    mesh.apply(PERMISSIVE)
    socket.chmod(0o666)
    try:
        code, report = check(mesh)
    finally:
        socket.chmod(0o600)
        mesh.delete("PeerAuthentication", "plain")
    assert code == 1
    assert wrong(report) == LAB | {"mutual TLS", "sockets and state"}
    assert report["mutual TLS"]["seen"] == "shop/dark"
    assert "0666" in report["sockets and state"]["seen"]
    assert wrong(check(mesh)[1]) == LAB


def test_a_cable_without_its_filter_is_seen(mesh: Mesh) -> None:
    (agent,), veth = mesh.lab.pids("n1", "agent"), mesh.w["web"].pod.veth
    assert node_facts.filtered([veth], agent) == {veth: True}
    mesh.lab.nodes["n1"].run(["tc", "qdisc", "del", "dev", veth, "clsact"], check=True)
    assert node_facts.filtered([veth], agent) == {veth: False}
    until(lambda: node_facts.filtered([veth], agent) == {veth: True}, "the agent does not put it back", 15.0)
