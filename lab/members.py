"""What a lab consists of for its user: nodes and workloads, and running programs in them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import api, cgroups, netns, process
from lab.capture import Capture
from lab.process import Place, Process
from lab.state import LabError, WorkloadState
from lab.topology import NETNS_ROOT, SYSCTLS_COMMON, NodePlan, PodPlan, resolv_conf

if TYPE_CHECKING:
    from lab.lab import Lab


Name = tuple[str, str]  # namespace, name


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
        timeout: float | None = 90.0,
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

    def plug(self) -> None:
        """Make its cgroup, its files and its namespace, on the node's network."""
        self.cgroup.mkdir(parents=True, exist_ok=True)
        self.files.mkdir(parents=True, exist_ok=True)
        (self.files / "resolv.conf").write_text(resolv_conf(self.namespace))
        netns.add(self.pod.netns, SYSCTLS_COMMON)
        netns.batch(self.pod.node.netns, self.pod.on_node())
        netns.batch(self.pod.netns, self.pod.inside())

    def unplug(self) -> None:
        """Whatever there is of it."""
        cgroups.remove(self.cgroup)
        if self.netns.exists():
            try:
                netns.batch(self.pod.node.netns, [f"link delete {self.pod.veth}"])
            except LabError:  # never plugged in
                pass
            netns.delete(self.pod.netns)
        shutil.rmtree(self.files, ignore_errors=True)

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

    def enrolled(self, names: Collection[Name]) -> bool:
        """Whether the agent answers, is ready as a whole, and these workloads have their certificates and are served."""
        try:
            status = self.status()
        except LabError:
            return False
        return bool(status["ready"]) and {*names} <= {
            _name(each) for each in status["workloads"] if each.get("svid") and each["ready"]
        }

    def gone(self, name: Name) -> bool:
        """Whether the agent does not answer or knows no such workload."""
        try:
            return name not in {_name(each) for each in self.status()["workloads"]}
        except LabError:
            return True

    def capture(self) -> Capture:
        """Frames on the node's link to the other nodes."""
        return Capture(self.netns)


def _name(told: Mapping[str, Any]) -> Name:
    return told["namespace"], told["name"]
