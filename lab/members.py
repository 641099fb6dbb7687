"""What a lab consists of for its user: nodes and workloads, and running programs in them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import api, cgroups, process
from lab.capture import Capture
from lab.process import Place, Process
from lab.state import WorkloadState
from lab.topology import NETNS_ROOT, NodePlan, PodPlan

if TYPE_CHECKING:
    from lab.lab import Lab


class Runner:
    """What can run programs: a workload (in the mesh) or a node (beside it, as a host's own programs are)."""

    name: str
    place: Place
    files: Path

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str | bytes | None = None,
        timeout: float | None = 30.0,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; output as text. Raises subprocess.TimeoutExpired, CalledProcessError with `check`."""
        return process.run(self.place, argv, input=input, timeout=timeout, user=user, env=env, check=check)

    def start(
        self, argv: Sequence[str], name: str | None = None, *, user: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start in the background; its output goes to `files/<name>.log`."""
        name = name or Path(argv[0]).name
        return process.start(self.place, argv, name=name, log=self.files / f"{name}.log", user=user, env=env)

    def pids(self) -> list[int]:
        return cgroups.pids(self.place.cgroup)

    def kill(self) -> None:
        """SIGKILL everything that runs here."""
        cgroups.kill(self.place.cgroup)


class Workload(Runner):
    """One workload: a namespace, a cgroup, an identity."""

    def __init__(self, lab: Lab, record: WorkloadState) -> None:
        self.lab = lab
        self.record = record
        self.name, self.namespace, self.service_account = record.name, record.namespace, record.service_account
        self.labels, self.node = record.labels, record.node
        self.pod = PodPlan(NodePlan(lab.name, record.node), record.name, record.index)
        self.netns = self.pod.netns_path
        self.addresses = self.pod.addresses
        self.cgroup = lab.cgroup / record.node / "workloads" / record.name
        self.files = lab.paths.workload(record.name)
        self.place = Place(self.cgroup, self.netns, self.files / "resolv.conf")

    @property
    def address(self) -> str:
        """The IPv4 one."""
        return self.addresses[0]

    def remove(self) -> None:
        """Take it out of the mesh, then away."""
        self.lab.remove_workload(self.name)

    def capture(self) -> Capture:
        return Capture(self.netns)

    def entry(self) -> dict[str, Any]:
        """Its entry in the agent's workload file."""
        return {
            "name": self.name,
            "namespace": self.namespace,
            "serviceAccount": self.service_account,
            "labels": dict(self.labels),
            "addresses": list(self.addresses),
            "netns": str(self.netns),
            "cgroup": str(self.cgroup),
            "veth": self.pod.veth,
        }


class Node(Runner):
    """One node. What it runs is outside the mesh: in the node's network namespace, not below its mesh cgroup."""

    def __init__(self, lab: Lab, plan: NodePlan) -> None:
        self.lab, self.plan, self.name = lab, plan, plan.name
        self.addresses = plan.addresses
        self.netns = NETNS_ROOT / plan.netns
        self.cgroup = lab.cgroup / plan.name
        self.files = lab.paths.base / "host" / plan.name
        self.place = Place(lab.cgroup / "host" / plan.name, self.netns)
        self.agent_socket = lab.paths.agent_socket(plan.name)

    def agent_api(self, method: str, path: str, body: Any = None) -> Any:
        return api.call(self.agent_socket, method, path, body)

    def status(self) -> Any:
        return self.agent_api("GET", "/v1/status")

    def capture(self) -> Capture:
        """Frames on the node's link to the other nodes."""
        return Capture(self.netns)
