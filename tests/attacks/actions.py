"""What several rows do: run a program of ours in a workload, spell an address in each family."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import Workload, cgroups
from lab.members import Runner
from lab.process import Place
from tests.e2e.mesh import Mesh

PROGRAMS = Path(__file__).with_name("programs")
FAMILIES = ("v4", "v6", "mapped")
UNANSWERED_S = 1.2  # long enough for what is answered; what is dropped would wait for ever
PASSED = "PASSED"


def address(workload: Workload, family: str) -> str:
    """As an application of this family writes it."""
    v4, v6 = workload.addresses[:2]
    return {"v4": v4, "v6": v6, "mapped": f"::ffff:{v4}"}[family]


def loopback(family: str) -> str:
    return {"v4": "127.0.0.1", "v6": "::1", "mapped": "::ffff:127.0.0.1"}[family]


def host(text: str) -> str:
    """As it stands in a URL."""
    return f"[{text}]" if ":" in text else text


def run(where: Runner, program: str, *arguments: object, timeout_s: float = 30.0) -> Any:
    """The JSON that a program prints in its last line."""
    argv = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
    done = where.run(argv, timeout=timeout_s)
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Dialled:
    answer: str
    error: str

    @property
    def opened(self) -> bool:
        """connect() was not refused, whatever came afterwards."""
        return self.error != "PermissionError"


def dial(where: Runner, to: str, port: int, way: str = "connect", source_port: int = 0, timeout_s: float = 5.0) -> Dialled:
    return Dialled(**run(where, "dial.py", way, to, port, source_port, timeout_s))


class OnHost(Runner):
    """A process group of an identity in the node's own namespace, as `pillion run` makes them."""

    def __init__(self, mesh: Mesh, node: str, name: str) -> None:
        self.name = name
        self.place = Place(mesh.lab.cgroup / node / "workloads" / name, mesh.lab.nodes[node].netns)
        self.files = mesh.scratch


@contextmanager
def on_host(
    mesh: Mesh, node: str, name: str, account: str, ports: tuple[int, ...] = (), namespace: str = "shop"
) -> Iterator[OnHost]:
    """Enrolled while the block lasts."""
    runner = OnHost(mesh, node, name)
    runner.place.cgroup.mkdir()
    try:
        body = {"name": name, "namespace": namespace, "service_account": account, "labels": {"app": name}, "ports": list(ports)}
        mesh.lab.agent_api(node, "POST", "/v1/workloads", {**body, "cgroup": str(runner.place.cgroup)})
        runner.start(["sleep", "infinity"], name=f"{name}-lives")  # who has no process for some seconds is forgotten
        yield runner
        mesh.lab.agent_api(node, "DELETE", f"/v1/workloads/{namespace}/{name}")
    finally:
        cgroups.remove(runner.place.cgroup)
