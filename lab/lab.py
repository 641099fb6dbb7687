"""The lab as one object: bring it up, put workloads in, talk to its mesh, take it down without a trace."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import yaml

from lab import api, cgroups, cleanup, netns, services, state
from lab.capture import Capture
from lab.members import Node, Workload
from lab.pace import PATIENCE
from lab.state import LabError, LabState, NodeState, WorkloadState
from lab.topology import (
    SYSCTLS_ROUTER,
    LabPlan,
    NodePlan,
    Paths,
    check_lab_name,
    check_workload_name,
    free_index,
    node_names,
)

Progress = Callable[[str], None]
ENROL_TIMEOUT_S = 30.0 * PATIENCE
FIRST_NAMESPACES = ("default", "shop")  # granted to every node from the start; others with their first workload


class WorkloadSpec(TypedDict, total=False):
    """The arguments of `add_workload`, for `add_workloads`."""

    node: str
    name: str
    namespace: str
    service_account: str
    labels: dict[str, str]


class Lab:
    """A lab by name. The object holds no resources: any number of them, in any process, may name the same lab.

    `code`: a source tree whose mesh it runs instead of this one (tests take a defence out of a copy).
    """

    def __init__(self, name: str = "demo", progress: Progress | None = None, code: Path | None = None) -> None:
        self.name = check_lab_name(name)
        self.start = partial(services.start, paths=Paths(name), root=cgroups.lab_root(name), code=code)
        self.paths = Paths(name)
        self.progress: Progress = progress or (lambda _text: None)

    @property
    def cgroup(self) -> Path:
        return cgroups.lab_root(self.name)

    def state(self) -> LabState:
        """Raises LabError if the lab is not up."""
        current = state.load(self.name)
        if current is None or not current.built:
            raise LabError(f"the lab {self.name!r} is not up", f"run: pillion lab up --name {self.name}")
        return current

    @property
    def is_up(self) -> bool:
        return bool((current := state.load(self.name)) and current.built)

    @property
    def nodes(self) -> dict[str, Node]:
        return {node.name: Node(self, NodePlan(self.name, node.name)) for node in self.state().nodes}

    @property
    def workloads(self) -> dict[str, Workload]:
        return {name: Workload(self, record) for name, record in self.state().workloads.items()}

    # ---- up and down

    def up(self, nodes: int = 2, *, mesh: bool = True, workers: int = 1, timeout_s: float = services.READY_TIMEOUT_S) -> Lab:
        """Bring it up, or bring back what died. `mesh=False`: the network alone, no controller, agent or proxy."""
        if os.geteuid() != 0:
            raise LabError("the lab makes network namespaces and loads eBPF", "run it as root")
        plan = LabPlan.of(self.name, node_names(nodes))
        with state.locked(self.name, self.progress):
            current = state.load(self.name)
            if current is not None and current.built:
                if (len(current.nodes), current.mesh, current.workers) != (nodes, mesh, workers):
                    what = f"{len(current.nodes)} nodes, {current.workers} workers, {'a' if current.mesh else 'no'} mesh"
                    raise LabError(f"the lab {self.name!r} is up with {what}", f"run: pillion lab down --name {self.name}")
            else:
                cleanup.remove(self.name)
                self._build(plan, mesh, workers)
            if mesh:
                self._start_mesh(plan, workers, timeout_s)
        return self

    def _build(self, plan: LabPlan, mesh: bool, workers: int) -> None:
        began = time.monotonic()
        for folder in (self.paths.logs, self.paths.pids):
            folder.mkdir(parents=True)
        node_states = tuple(
            NodeState(node.name, f"unix://{self.paths.agent_socket(node.name)}", node.netns, str(self.cgroup / node.name))
            for node in plan.nodes
        )
        socket = f"unix://{self.paths.controller_socket}"
        unbuilt = LabState(self.name, mesh, workers, socket, node_states, checkout=state.CHECKOUT)
        state.save(unbuilt)
        for part in ("controller", "supervise", *(f"host/{node.name}" for node in plan.nodes)):
            (self.cgroup / part).mkdir(parents=True)
        for node in plan.nodes:
            for part in ("agent", "proxy", "workloads"):
                (self.cgroup / node.name / part).mkdir(parents=True)
            self.paths.node(node.name).mkdir(mode=0o755)
            self._write_workloads(node.name, ())
        netns.add(plan.netns, SYSCTLS_ROUTER)
        for node in plan.nodes:
            netns.add(node.netns, SYSCTLS_ROUTER)
        netns.batch(plan.netns, plan.bridge())
        for node in plan.nodes:
            netns.batch(node.netns, node.uplink(plan.nodes))
        netns.batch(plan.netns, plan.bridge_routes())
        state.save(msgspec.structs.replace(unbuilt, built=True))
        self.progress(f"network of {len(plan.nodes)} nodes: {time.monotonic() - began:.1f} s")

    def _start_mesh(self, plan: LabPlan, workers: int, timeout_s: float) -> None:
        began = time.monotonic()
        tick = services.Ticker(self.progress, "waiting for the controller")
        for folder in (self.paths.controller_state, self.paths.controller_run):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.start(services.controller(plan, self.paths, self.cgroup))
        for node in plan.nodes:
            (self.paths.agent_run(node.name) / "proxy").mkdir(parents=True, exist_ok=True)
            self.start(services.proxy(node, self.paths, self.cgroup, workers))
        services.wait_until(
            partial(services.answers, self.paths.controller_socket, "/v1/status"),
            "the controller is not ready",
            self.paths,
            "controller",
            timeout_s,
            tick,
        )
        self.progress(f"controller ready: {time.monotonic() - began:.1f} s")
        self._grant((node.name, namespace) for node in plan.nodes for namespace in FIRST_NAMESPACES)
        for node in plan.nodes:
            if not services.answers(self.paths.agent_socket(node.name), "/v1/ready"):
                token = self.controller_api("POST", f"/v1/nodes/{node.name}/token", {"ttl_s": 600})["token"]
                state.write_atomic(self.paths.join_token(node.name), token.encode(), 0o600)
            self.start(services.agent(node, self.paths, self.cgroup))
        for node in plan.nodes:
            services.wait_until(
                partial(services.answers, self.paths.agent_socket(node.name), "/v1/ready"),
                f"the agent of {node.name} is not ready",
                self.paths,
                f"{node.name}-agent",
                timeout_s,
                services.Ticker(self.progress, f"waiting for node {node.name}, whose agent compiles and loads its programs"),
            )
            self.progress(f"node {node.name} ready: {time.monotonic() - began:.1f} s")

    def down(self) -> None:
        """Remove everything of this lab, whatever state it is in. Safe to repeat."""
        if os.geteuid() != 0:
            raise LabError("only root can take a lab down", "run it as root")
        with state.locked(self.name, self.progress):
            cleanup.remove(self.name)
            state.forget(self.name)

    # ---- workloads

    def add_workload(
        self,
        node: str,
        name: str,
        namespace: str = "default",
        service_account: str | None = None,
        labels: Mapping[str, str] | None = None,
        wait: bool = True,
        grant: bool = True,
    ) -> Workload:
        """A new workload, enrolled in the mesh when this returns (unless not `wait`). The same again returns the one there.

        The node is granted every service account of its namespace, unless not `grant`.
        """
        spec = WorkloadSpec(
            node=node,
            name=name,
            namespace=namespace,
            service_account=service_account or name,
            labels=dict(labels or {"app": name}),
        )
        return self.add_workloads([spec], wait, grant)[0]

    def add_workloads(self, specs: Iterable[WorkloadSpec], wait: bool = True, grant: bool = True) -> list[Workload]:
        """Several at once: the agents are told once and waited for once."""
        with state.locked(self.name, self.progress):
            current = self.state()
            known = dict(current.workloads)
            added: list[Workload] = []
            fresh: list[Workload] = []
            for spec in specs:
                record = self._record(spec, current, known)
                workload = Workload(self, record)
                if record.name not in known:
                    known[record.name] = record
                    state.save(msgspec.structs.replace(current, workloads=known))
                    try:
                        workload.plug()
                    except BaseException:
                        workload.unplug()
                        state.save(current)
                        raise
                    fresh.append(workload)
                    current = self.state()
                added.append(workload)
            if grant and current.mesh:
                self._grant((workload.node, workload.namespace) for workload in fresh)
            for node in {workload.node for workload in fresh}:
                self._write_workloads(node, [Workload(self, record) for record in known.values() if record.node == node])
        if wait and current.mesh:
            self.wait_enrolled(added)
        return added

    def _record(self, spec: WorkloadSpec, current: LabState, known: Mapping[str, WorkloadState]) -> WorkloadState:
        name, node = check_workload_name(spec["name"]), spec["node"]
        if node not in {each.name for each in current.nodes}:
            there = ", ".join(each.name for each in current.nodes)
            raise LabError(f"the lab {self.name!r} has no node {node!r}", f"its nodes: {there}")
        record = WorkloadState(
            name=name,
            namespace=spec.get("namespace", "default"),
            service_account=spec.get("service_account", name),
            node=node,
            index=free_index(each.index for each in known.values() if each.node == node),
            labels=spec.get("labels", {"app": name}),
        )
        if (old := known.get(name)) is not None:
            if msgspec.structs.replace(record, index=old.index) != old:
                raise LabError(f"another workload is called {name!r}: {old}", "remove it or choose another name")
            return old
        return record

    def _grant(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Grants not given yet. With the lab's lock held."""
        current = self.state()
        new = sorted({f"{node}/{namespace}" for node, namespace in pairs} - set(current.granted))
        if new:
            self.apply(grants(text.split("/") for text in new))
            state.save(msgspec.structs.replace(current, granted=(*current.granted, *new)))

    def _write_workloads(self, node: str, workloads: Iterable[Workload]) -> None:
        text = yaml.safe_dump({"workloads": [workload.entry() for workload in workloads]}, sort_keys=False)
        state.write_atomic(self.paths.workloads_file(node), text.encode())

    def wait_enrolled(self, workloads: Iterable[Workload], timeout_s: float = ENROL_TIMEOUT_S) -> None:
        """Until each workload's agent knows it, has its certificate and is ready as a whole."""
        waiting: dict[str, set[tuple[str, str]]] = {}
        for workload in workloads:
            waiting.setdefault(workload.node, set()).add((workload.namespace, workload.name))
        for node, names in waiting.items():
            services.wait_until(
                partial(self.nodes[node].enrolled, names),
                f"{', '.join('/'.join(name) for name in sorted(names))} not enrolled on {node}",
                self.paths,
                f"{node}-agent",
                timeout_s,
                services.Ticker(self.progress, f"waiting for node {node} to enrol its workloads"),
            )

    def remove_workload(self, name: str) -> None:
        """Out of the mesh first, then its processes, its cgroup and its namespace. Safe to repeat."""
        with state.locked(self.name, self.progress):
            current = self.state()
            if name not in current.workloads:
                return
            workload = Workload(self, current.workloads[name])
            rest = {key: record for key, record in current.workloads.items() if key != name}
            left = [Workload(self, record) for record in rest.values() if record.node == workload.node]
            self._write_workloads(workload.node, left)
            if current.mesh:
                try:
                    gone = partial(self.nodes[workload.node].gone, (workload.namespace, name))
                    services.wait_until(gone, f"{name} still enrolled", self.paths, f"{workload.node}-agent", 5.0)
                except LabError as error:  # a dead agent must not keep a workload alive
                    self.progress(str(error))
            workload.unplug()
            state.save(msgspec.structs.replace(current, workloads=rest))

    # ---- the mesh

    def controller_api(self, method: str, path: str, body: Any = None, timeout_s: float = 60.0) -> Any:
        return api.call(self.paths.controller_socket, method, path, body, timeout_s)

    def agent_api(self, node: str, method: str, path: str, body: Any = None) -> Any:
        return api.call(self.paths.agent_socket(node), method, path, body)

    def answers(self, node: str, path: str) -> bool:
        """Whether the node's agent answers a GET with 200; False as well when nobody does."""
        return services.answers(self.paths.agent_socket(node), path)

    def apply(self, text: str) -> int:
        """Apply resources (YAML, several documents). Returns the revision to `wait` for."""
        return int(self.controller_api("POST", "/v1/apply", text)["revision"])

    def wait(self, revision: int, timeout_s: float = 30.0 * PATIENCE) -> None:
        """Until every connected node has the revision in force, ten minutes at most. Raises LabError naming the laggards."""
        timeout_s = min(timeout_s, 600.0)  # what the controller lets anybody wait for
        self.controller_api("GET", f"/v1/wait?revision={revision}&timeout={timeout_s:g}", timeout_s=timeout_s + 10.0)

    def delete(self, kind: str, namespace: str, name: str) -> int:
        return int(self.controller_api("DELETE", f"/v1/resources/{kind}/{namespace or '-'}/{name}")["revision"])

    def pids(self, node: str | None, what: str) -> list[int]:
        """Living pids of ``controller`` (node ignored), a node's ``agent``, ``proxy`` (the main process) or ``proxy-worker``s."""
        if what == "controller":
            name, cgroup = "controller", self.cgroup / "controller"
        else:
            name, cgroup = f"{node}-{what.removesuffix('-worker')}", self.cgroup / str(node) / what.removesuffix("-worker")
        alive, main = cgroups.pids(cgroup), services.pid_of(name, self.paths)
        if what == "proxy-worker":
            return [pid for pid in alive if pid != main]
        return [pid for pid in alive if pid == main]

    def capture(self, node: str) -> Capture:
        """Frames between this node and the others."""
        return self.nodes[node].capture()

    @contextmanager
    def stopped(self, *names: str) -> Iterator[None]:
        """kill -9 of these (`controller`, `n1-agent`, `n1-proxy`), their supervisors first; brought back at the end."""
        try:
            for name in names:
                supervisor = int((self.paths.pids / f"{name}.supervisor").read_text())
                for pid in (supervisor, services.pid_of(name, self.paths)):
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
            yield
        finally:
            current = self.state()
            self.up(len(current.nodes), mesh=current.mesh, workers=current.workers)

    def log(self, service: str) -> Path:
        """`controller`, `n1-agent`, `n1-proxy`."""
        return self.paths.logs / f"{service}.log"


def grants(pairs: Iterable[Sequence[str]]) -> str:
    """Resources that let nodes run every service account of a namespace, for (node, namespace) pairs."""
    resources = [
        {
            "apiVersion": "mesh.pillion.dev/v1alpha1",
            "kind": "NodeGrant",
            "metadata": {"name": f"lab-{node}-{namespace}"},
            "spec": {"node": node, "serviceAccounts": [f"{namespace}/*"]},
        }
        for node, namespace in pairs
    ]
    return str(yaml.safe_dump_all(resources, sort_keys=False))
