"""What a kernel may lack (nodeagent/optional.py), forced to be lacking on a running mesh: that part alone is off, it is told,
and HTTP and native connections are served and policed as before.

The product has no switch for it. The mesh runs from a copy of the source in which a probe answers "no" when the test says so.
One lab and three restarts of agents: some 20 s.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from tests.attacks.actions import on_host
from tests.attacks.mutants import Mutant, mutated
from tests.conftest import SESSION, opened
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, Mesh, Refused, policy, populated, until
from tests.e2e.test_kill import kill
from tests.trees import PROJECT

pytestmark = pytest.mark.timeout(400)  # under load of others
PATCHED = Mutant(
    "forced",
    "what this kernel can",
    (
        "nodeagent/express_probes.py",
        "    try:\n        four = make()\n",
        "    from nodeagent.forced import forced\n\n    if forced(probe.__name__):\n        return 'forced'\n"
        "    try:\n        four = make()\n",
    ),
    (
        "nodeagent/sockdiag.py",
        "        self._send(SOCK_DESTROY, ",
        "        from nodeagent.forced import forced\n\n        if forced('ending'):\n            raise OSError(95, 'forced')\n"
        "        self._send(SOCK_DESTROY, ",
    ),
    (
        "nodeagent/tc_load.py",
        "    with child.compiled(",
        "    from nodeagent.forced import forced\n\n    if forced('pods'):\n        raise OSError('forced')\n"
        "    with child.compiled(",
    ),
    (
        "nodeagent/btf.py",
        "    btf = Btf()\n    try:\n        return {name: btf.offset(*where) for name, where in wanted.items()}\n",
        "    from nodeagent.forced import forced\n\n    if forced('types'):\n        raise NoTypes('forced')\n"
        "    btf = Btf()\n    try:\n        return {name: btf.offset(*where) for name, where in wanted.items()}\n",
    ),
)
FORCED = """
import sys
from pathlib import Path

def forced(part):
    said = " ".join(sys.argv)
    wanted = Path(__file__).with_suffix(".txt").read_text().split()
    return any(f"{node}:{part}" in wanted and (f"/{node}/" in said or f"--node {node} " in said) for node in ("n1", "n2"))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = mutated(opened(tmp_path_factory.mktemp("forced")) / "code", [PATCHED])
    (place / "nodeagent/forced.py").write_text(FORCED)
    (place / "nodeagent/forced.txt").write_text("")
    return place


@pytest.fixture(scope="module")
def world(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with populated(Lab(f"{SESSION}o", code=tree), opened(tmp_path_factory.mktemp("optional"))) as mesh:
        yield mesh


def status_of(mesh: Mesh, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pillion", "--lab", mesh.lab.name, "status", *options]
    return subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)


def restarted(mesh: Mesh, tree: Path, lacking: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """New agents on both nodes, whose kernels lack this (node -> probe or part): what `pillion status` says of their parts."""
    (tree / "nodeagent/forced.txt").write_text(" ".join(f"{node}:{part}" for node, part in lacking.items()))
    for node in ("n1", "n2"):
        kill(mesh, node, "agent")
    for node in ("n1", "n2"):
        try:
            until(lambda node=node: mesh.lab.answers(node, "/v1/ready"), f"{node} is not ready again", 120)
        except AssertionError:
            print(mesh.lab.agent_api(node, "GET", "/v1/status"))
            raise
    report = json.loads(status_of(mesh, "-o", "json").stdout)
    assert report["ready"]
    return {node: agent["optional"] for node, agent in report["agents"].items()}


def off(parts: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {part for part, state in parts.items() if not state["on"]}


def told(mesh: Mesh, node: str, part: str, why: str) -> None:
    """In the table, and as a metric; the other parts are on."""
    lines = [line for line in status_of(mesh).stdout.splitlines() if line.startswith(node) and part in line and why in line]
    assert lines
    assert mesh.metric(node, "pillion_agent_optional_on", part=part) == 0
    assert mesh.metric(node, "pillion_agent_optional_on") == 2


def served_and_policed(mesh: Mesh) -> None:
    for server in ("web", "far"):
        assert mesh.curl("client", f"http://{server}.shop.mesh:{HTTP_PORT}/")[0] == 200
        assert mesh.curl("intruder", f"http://{server}.shop.mesh:{HTTP_PORT}/")[0] == 403
    for server in ("echo", "echo-far"):
        assert mesh.echo("client", f"{server}.shop.mesh")
        with pytest.raises(Refused):
            mesh.echo("intruder", f"{server}.shop.mesh")


def test_without_express_everything_goes_through_the_proxy(world: Mesh, tree: Path) -> None:
    """One node fails a probe, the other can not even compile it. Who is connected goes on."""
    kept = world.program("client", "load.py", "http", "web.shop.mesh", HTTP_PORT, 2, 120)
    assert kept.first_line() == "started\n"
    parts = restarted(world, tree, {"n1": "fin_order", "n2": "types"})
    assert off(parts["n1"]) == off(parts["n2"]) == {"express"}
    told(world, "n1", "express", "fin_order: forced")
    told(world, "n2", "express", "forced")
    assert world.metric("n1", "pillion_express_probe", probe="fin_order") == 0
    assert world.metric("n1", "pillion_express_probe", probe="epoll") == 1
    served_and_policed(world)
    carried = world.metric("n1", "pillion_express_total", event="carried")
    assert world.curl("client", f"http://web.shop.mesh:{HTTP_PORT}/")[0] == 200
    assert world.metric("n1", "pillion_express_total", event="carried") == carried == 0
    assert kept.popen.poll() is None
    kept.popen.terminate()
    kept.popen.wait()


def test_without_ending_a_denied_connection_falls_silent(world: Mesh, tree: Path) -> None:
    parts = restarted(world, tree, {"n1": "ending"})
    assert off(parts["n1"]) == {"ending"} and not off(parts["n2"])
    told(world, "n1", "ending", "forced")
    served_and_policed(world)
    native = world.program("client", "load.py", "stream", "echo.shop.mesh", ECHO_PORT, 1, 120)
    assert native.first_line() == "started\n"
    before = world.denied("n1", "generation_denied")
    world.apply(policy("no-echo", "echo", action="DENY"))
    try:
        until(lambda: world.denied("n1", "generation_denied") > before, "its packets are not dropped")
        with pytest.raises(Refused):
            world.echo("client", "echo.shop.mesh")
    finally:
        world.delete("AuthorizationPolicy", "no-echo")
        native.popen.terminate()
        native.popen.wait()


def test_without_their_filter_pods_are_closed_and_hosts_go_on(world: Mesh, tree: Path) -> None:
    parts = restarted(world, tree, {"n1": "pods"})
    assert off(parts["n1"]) == {"pods"} and not off(parts["n2"])
    told(world, "n1", "pods", "forced")
    assert world.curl("client", f"http://far.shop.mesh:{HTTP_PORT}/")[0] == 0
    with pytest.raises(Refused):
        world.echo("client", "echo.shop.mesh")
    for account, status in (("client", 200), ("intruder", 403)):
        with on_host(world, "n1", f"host-{account}", account) as runner:
            url = f"http://{world.w['far'].addresses[0]}:{HTTP_PORT}/"
            out = runner.run(["curl", "-sS", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}", url], timeout=20)
            assert out.stdout == str(status), out.stderr
    assert not off(restarted(world, tree, {})["n1"])
    served_and_policed(world)
