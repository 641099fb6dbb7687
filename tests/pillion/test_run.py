"""`pillion run` on a node of the lab: in the mesh while it runs, and gone without a trace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from lab import Lab
from lab.pace import PATIENCE
from mesh.resources import NodeGrant, load
from pillion import awaiting
from pillion.client import Client
from pillion.context import chosen
from pillion.run import cgroup2_mount, grant_line, is_internet_socket, missing_service
from tests.pillion.conftest import Cli, Fake

ROOT = Path(__file__).parents[2]
RESOURCES = """
apiVersion: v1
kind: Service
metadata: {name: runner, namespace: shop}
spec:
  selector: {app: runner}
  ports: [{port: 80, targetPort: 8123, appProtocol: http}]
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: runner, namespace: shop}
spec:
  selector: {matchLabels: {app: runner}}
  rules:
  - from: [{source: {principals: [mesh.local/ns/shop/sa/walker]}}]
"""


def until(condition: Callable[[], object], seconds: float = 20.0 * PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within time"
        time.sleep(0.02)


@pytest.fixture
def shop(lab: Lab) -> Iterator[Lab]:
    lab.wait(lab.apply(RESOURCES))
    yield lab
    for kind in ("Service", "AuthorizationPolicy"):
        lab.delete(kind, "shop", "runner")


def argv(lab: Lab, node: str, service: str, *command: str, options: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, "-m", "pillion", "--lab", lab.name, "run", "--service", service, "-n", "shop", "--node", node]
    return [*start, *options, "--", *command]


def run(lab: Lab, node: str, service: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv(lab, node, service, *command), capture_output=True, text=True, timeout=60, cwd=ROOT)


def workloads(lab: Lab, node: str) -> list[str]:
    return [each["name"] for each in lab.nodes[node].status()["workloads"]]


def groups(lab: Lab, node: str) -> list[str]:
    return [path.name for path in (lab.cgroup / node / "workloads").glob("run-*")]


def test_a_server_and_its_callers(shop: Lab) -> None:
    server = subprocess.Popen(
        argv(shop, "n1", "runner", sys.executable, "-m", "http.server", "8123", options=("--port", "8123", "--name", "served")),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None and "shop/served runs as service account runner" in server.stderr.readline()
        assert "served" in workloads(shop, "n1") and groups(shop, "n1") == ["run-shop.served"]
        ask = ("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "5", "--retry", "5", "--retry-all-errors")
        for node in ("n1", "n2"):
            allowed = run(shop, node, "walker", *ask, "http://runner.shop.mesh/")
            assert allowed.stdout.endswith("200"), (node, allowed)
            assert run(shop, node, "stranger", *ask[:-3], "http://runner.shop.mesh/").stdout == "403"
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(20)
        server.stderr.close() if server.stderr else None
    assert code == 128 + signal.SIGTERM
    assert workloads(shop, "n1") == [] and groups(shop, "n1") == []


OPAQUE = """
apiVersion: v1
kind: Service
metadata: {name: %(name)s, namespace: shop}
spec:
  selector: {app: %(name)s}
  ports: [{port: 80, targetPort: 8124, appProtocol: tcp}]
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: %(name)s, namespace: shop}
spec:
  selector: {matchLabels: {app: %(name)s}}
  rules:
  - from: [{source: {principals: [mesh.local/ns/shop/sa/%(caller)s]}}]
"""
SERVE = (sys.executable, "-m", "http.server", "8124", "--bind", "::")  # of both families
FETCH = ("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "5", "--retry", "5", "--retry-all-errors")


def test_opaque_tcp_between_a_pod_and_the_nodes_own_namespace(lab: Lab) -> None:
    """Natively, so through the filter of the pod's cable: to a server the node's own address belongs to, and back."""
    for name, caller in (("ridden", "podded"), ("podded", "rider")):
        revision = lab.apply(OPAQUE % {"name": name, "caller": caller})
    pod = lab.add_workload(node="n1", name="podded", namespace="shop", service_account="podded", labels={"app": "podded"})
    server = subprocess.Popen(
        argv(lab, "n1", "ridden", *SERVE, options=("--port", "8124", "--name", "ridden")),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None and "ridden" in server.stderr.readline()
        lab.wait(revision)
        pod.start(list(SERVE), name="server")
        for family in ("-4", "-6"):
            to_node = pod.run([*FETCH, family, "http://ridden.shop.mesh/"], timeout=60)
            assert to_node.stdout.endswith("200"), (family, to_node)
            to_pod = run(lab, "n1", "rider", *FETCH, family, "http://podded.shop.mesh/")
            assert to_pod.stdout.endswith("200"), (family, to_pod)
    finally:
        server.terminate()
        server.wait(20)
        server.stderr.close() if server.stderr else None
        lab.remove_workload("podded")
        for name in ("ridden", "podded"):
            for kind in ("Service", "AuthorizationPolicy"):
                lab.delete(kind, "shop", name)


def test_exit_codes_and_missing_programs(lab: Lab) -> None:
    assert run(lab, "n1", "walker", "sh", "-c", "exit 7").returncode == 7
    done = run(lab, "n1", "walker", "no-such-program")
    assert done.returncode == 1 and "error: no-such-program: No such file" in done.stderr
    assert groups(lab, "n1") == []


def test_what_another_workload_lacks_holds_up_nothing(lab: Lab) -> None:
    file = lab.paths.workloads_file("n1")
    before = file.read_text()
    nowhere = {
        "name": "nowhere",
        "namespace": "shop",
        "serviceAccount": "nowhere",
        "cgroup": str(lab.cgroup / "n1/workloads/none"),
    }
    try:
        file.write_text(yaml.safe_dump({"workloads": [*(yaml.safe_load(before)["workloads"] or ()), nowhere]}))
        until(lambda: "nowhere" in workloads(lab, "n1"))
        assert not lab.answers("n1", "/v1/ready")
        began = time.monotonic()
        done = run(lab, "n1", "walker", "true")
        assert done.returncode == 0, done
        assert time.monotonic() - began < 15
    finally:
        file.write_text(before)
        until(lambda: lab.answers("n1", "/v1/ready"))


def test_outside_the_grant_nothing_runs(lab: Lab) -> None:
    start = [
        sys.executable,
        "-m",
        "pillion",
        "--lab",
        lab.name,
        "run",
        "--service",
        "x",
        "-n",
        "elsewhere",
        "--node",
        "n1",
        "--",
        "id",
    ]
    done = subprocess.run(start, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1 and "not granted" in done.stderr and "uid=" not in done.stdout
    (grant,) = load(done.stderr.split("echo '")[1].split("'")[0])  # what an operator would apply
    assert isinstance(grant, NodeGrant)
    assert (grant.spec.node, grant.spec.service_accounts) == ("n1", ["elsewhere/x"])
    assert groups(lab, "n1") == []


def test_an_enrolled_workload_without_a_grant_is_told_of_at_once(lab: Lab) -> None:
    """And when the grant comes the agent has asked again before its old answer is taken for a new one."""
    file, cgroup, client = (
        lab.paths.workloads_file("n1"),
        lab.cgroup / "n1/workloads/later",
        Client(f"unix://{lab.paths.agent_socket('n1')}"),
    )
    before, began = file.read_text(), time.monotonic()
    entry = {"name": "later", "namespace": "elsewhere", "serviceAccount": "later", "cgroup": str(cgroup)}
    cgroup.mkdir(parents=True)
    try:
        file.write_text(yaml.safe_dump({"workloads": [*(yaml.safe_load(before)["workloads"] or ()), entry]}))
        said = awaiting.await_workload(client, "elsewhere", "later", awaiting.WAIT_S, 0.0)
        assert said.startswith(awaiting.UNGRANTED) and "n1 is not granted elsewhere/later" in said
        assert time.monotonic() - began < awaiting.WAIT_S / 3
        lab.apply(grant_line("n1", "elsewhere", "later").split("echo '")[1].split("'")[0])
        assert awaiting.await_workload(client, "elsewhere", "later", awaiting.WAIT_S, awaiting.ASKED_AGAIN_S * PATIENCE) == ""
    finally:
        file.write_text(before)
        until(lambda: "later" not in workloads(lab, "n1"))
        lab.delete("NodeGrant", "", "n1-elsewhere-later")
        cgroup.rmdir()


def test_no_descriptor_is_inherited(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as stdin:
        listener.set_inheritable(True)
        code = "import os; print(sorted(os.listdir('/proc/self/fd')), os.path.realpath('/proc/self/fd/0'))"
        done = subprocess.run(
            argv(lab, "n1", "walker", sys.executable, "-c", code),
            stdin=stdin,
            capture_output=True,
            text=True,
            pass_fds=(listener.fileno(),),
            timeout=60,
            cwd=ROOT,
        )
    assert done.stdout.split("]")[0] == "['0', '1', '2', '3'", done  # 3: the folder being listed
    assert done.stdout.strip().endswith("/dev/null")


def test_what_a_killed_run_leaves_dies_with_it(lab: Lab) -> None:
    process = subprocess.Popen(
        argv(lab, "n1", "walker", "sleep", "1000", options=("--name", "orphan")), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None and "orphan" in process.stderr.readline()
    cgroup = lab.cgroup / "n1" / "workloads" / "run-shop.orphan"
    until(lambda: "populated 1" in (cgroup / "cgroup.events").read_text())
    process.kill()
    process.wait()
    process.stderr.close()
    until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text())
    long_ago = time.time() - 3600
    os.utime(cgroup, (long_ago, long_ago))
    assert run(lab, "n1", "walker", "true").returncode == 0  # the next run sweeps
    assert "orphan" not in workloads(lab, "n1") and not cgroup.exists()


def test_an_agent_without_a_cgroup_is_not_believed(cli: Cli, agent: Fake) -> None:
    done = cli("--agent", agent.url, "run", "--service", "web", "--", "true")
    assert done.code == 1 and "has no cgroup of its own" in done.err


def test_labels_must_be_labels(cli: Cli, agent: Fake) -> None:
    assert cli("--agent", agent.url, "run", "--service", "web", "--label", "nonsense", "--", "true").code == 2


def test_which_sockets_are_not_inherited(tmp_path: Path) -> None:
    with socket.socket() as inet, socket.socket(socket.AF_UNIX) as unix, (tmp_path / "f").open("w") as file:
        assert [is_internet_socket(each.fileno()) for each in (inet, unix, file)] == [True, False, False]


def test_cgroup2_is_found() -> None:
    assert cgroup2_mount("30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 none rw\n") == Path("/sys/fs/cgroup")


def test_a_server_nobody_can_find_is_told_how_to_be_found(cli: Cli, controller: Fake) -> None:
    controller.on("GET /v1/resources", {"revision": 1, "items": [{"spec": {"selector": {"app": "other"}}}]})
    chosen.controller = controller.url
    hint = missing_service("shop", {"app": "web"}, "web", 8080)
    (resource,) = load(hint.split("echo '")[1].split("'")[0])
    assert resource.key == ("Service", "shop", "web")
    controller.on("GET /v1/resources", {"revision": 1, "items": [{"spec": {"selector": {"app": "web"}}}]})
    assert missing_service("shop", {"app": "web", "version": "v1"}, "web", 8080) == ""
