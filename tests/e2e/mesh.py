"""The mesh the end-to-end tests share: two nodes, HTTP and echo servers on both, a client, an intruder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from lab import Lab, Workload
from lab.pace import PATIENCE, SLOW

PROGRAMS = Path(__file__).with_name("programs")
NS = "shop"
HTTP_PORT, ECHO_PORT = 8080, 7000
TRUST_DOMAIN = "mesh.local"
FORGET_PEAK = "5"  # to /proc/<pid>/clear_refs


def nginx(folder: Path, says: str) -> str:
    """A configuration: that on every path, on HTTP_PORT, and its files in `folder`."""
    return f"""daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 1024; }}
http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
 uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; keepalive_requests 10000000; keepalive_timeout 600;
 server {{ listen [::]:{HTTP_PORT} ipv6only=off; location / {{ return 200 "{says}\\n"; }} }} }}
"""


def service(name: str, app: str, port: int, protocol: str, target: int = 0) -> str:
    """`target`: the workloads' port, if it is another."""
    return f"""---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {NS}}}
spec:
  selector: {{app: {app}}}
  ports: [{{name: main, port: {port}, targetPort: {target or port}, appProtocol: {protocol}}}]
"""


def policy(name: str, app: str, *, action: str = "ALLOW", who: str = "client", operation: str = "") -> str:
    """`app`: whose policy it is; empty: of all in the namespace."""
    selector = f"\n  selector: {{matchLabels: {{app: {app}}}}}" if app else ""
    to = f"\n    to: [{{operation: {operation}}}]" if operation else ""
    return f"""---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: {NS}}}
spec:{selector}
  action: {action}
  rules:
  - from: [{{source: {{principals: ["{TRUST_DOMAIN}/ns/{NS}/sa/{who}"]}}}}]{to}
"""


SERVICES = (
    service("web", "web", HTTP_PORT, "http")
    + service("far", "far", HTTP_PORT, "http")
    + service("echo", "echo", ECHO_PORT, "tcp")
    + service("echo-far", "echo-far", ECHO_PORT, "tcp")
    + service("dark", "dark", ECHO_PORT, "tcp")
)
POLICIES = "".join(policy(app, app) for app in ("web", "far", "echo", "echo-far"))

SERVERS = (("web", "n1"), ("far", "n2"), ("echo", "n1"), ("echo-far", "n2"), ("dark", "n1"))


class Mesh:
    """A lab with servers in it, and the questions tests ask of it."""

    def __init__(self, lab: Lab, scratch: Path) -> None:
        self.lab = lab
        self.scratch = scratch
        self.w: dict[str, Workload] = {}

    def populate(self, resources: str = SERVICES + POLICIES) -> None:
        self.lab.up(nodes=2)
        specs = [("client", "n1"), ("intruder", "n1"), ("far-client", "n2"), *SERVERS]
        workloads = self.lab.add_workloads(
            {"node": node, "name": name, "namespace": NS, "service_account": name, "labels": {"app": name}}
            for name, node in specs
        )
        self.w = {workload.name: workload for workload in workloads}
        for name, _node in SERVERS:
            self.serve(name)
        if resources:
            self.apply(resources)

    def serve(self, name: str) -> None:
        workload = self.w[name]
        if name in ("web", "far"):
            directory = self.scratch / name
            directory.mkdir(exist_ok=True)
            config = directory / "nginx.conf"
            config.write_text(nginx(directory, f"{name} for $remote_addr"))
            workload.start(["nginx", "-c", str(config), "-e", "stderr"], name="server")
            self.listening(name, HTTP_PORT)
        else:
            workload.start([sys.executable, str(PROGRAMS / "echo.py"), str(ECHO_PORT)], name="server")
            self.listening(name, ECHO_PORT)

    def listening(self, name: str, port: int) -> None:
        argv = ["ip", "netns", "exec", self.w[name].pod.netns, "ss", "-Htnl", f"sport = :{port}"]
        until(lambda: subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip(), f"{name} does not listen")

    def established(self, name: str, port: int, to: str = "") -> None:
        """Until a connection to this port (of this address, as `ss` writes it) stands in the workload's namespace."""
        where = f"dst {to}:{port}" if to else f"dport = :{port}"
        argv = ["ip", "netns", "exec", self.w[name].pod.netns, "ss", "-Htn", "state", "established", where]
        until(lambda: subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip(), f"none from {name}")

    def apply(self, text: str) -> int:
        revision = self.lab.apply(text)
        self.lab.wait(revision)
        return revision

    def delete(self, kind: str, name: str) -> None:
        self.lab.wait(self.lab.delete(kind, NS, name))

    def curl(self, source: str, url: str, *options: str) -> tuple[int, str]:
        """Status (0: no answer) and body."""
        argv = ["curl", "-sS", "--max-time", "5", "-o", "-", "-w", "\n%{http_code}", *options, url]
        out = self.w[source].run(argv, timeout=15 * PATIENCE)
        body, _, code = out.stdout.rpartition("\n")
        return int(code or 0), body or out.stderr

    def program(self, source: str, program: str, *arguments: object) -> Background:
        argv = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
        return Background(self.w[source], argv)

    def echo(self, source: str, host: str, timeout_s: float = 5.0) -> str:
        """The address the echo server saw; raises AssertionError with the client's error if refused."""
        done = self.w[source].run(
            [sys.executable, str(PROGRAMS / "hold.py"), host, str(ECHO_PORT), "0.1"], timeout=timeout_s + 10
        )
        report = json.loads(done.stdout.splitlines()[-1])
        if report["error"]:
            raise Refused(report["error"])
        return done.stdout.split()[1]

    def unhooked(self, name: str, argv: Sequence[str]) -> str:
        """What a program prints in a workload's netns when its node was taken over: no hook sees its sockets, and the filter
        on the cable is taken off as often as the agent puts it back."""
        workload = self.w[name]
        node = self.lab.nodes[workload.node]
        bare = f"while :; do tc qdisc del dev {workload.pod.veth} clsact 2>/dev/null; sleep 0.1; done"
        remover = node.start(["sh", "-c", bare], name=f"unhook-{name}")
        try:
            out = node.run(["nsenter", f"--net={workload.netns}", *argv], timeout=30 * PATIENCE)
        finally:
            remover.kill()
        assert out.stdout, out.stderr
        return out.stdout

    def metric(self, node: str, name: str, **labels: str) -> float:
        """Sum over the samples of a node's metrics that carry these labels."""
        return total(self.lab.agent_api(node, "GET", "/metrics"), name, labels)

    def refused_by_controller(self, reason: str) -> float:
        text = self.lab.controller_api("GET", "/metrics")
        return total(text, "pillion_controller_refusals_total", {"reason": reason})

    def denied(self, node: str, reason: str) -> float:
        """How often a reason was counted, in the kernel or the proxy."""
        return self.metric(node, "pillion_datapath_total", reason=reason) + self.metric(
            node, "pillion_denied_total", reason=reason
        )

    def reasons(self, node: str) -> Counter[str]:
        """All that was counted as `denied` tells of one."""
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(self.lab.agent_api(node, "GET", "/metrics")):
            for sample in family.samples:
                if sample.name in ("pillion_datapath_total", "pillion_denied_total"):
                    found[sample.labels["reason"]] += int(sample.value)
        return found

    def flows(self, node: str) -> list[dict[str, Any]]:
        text = self.lab.agent_api(node, "GET", "/v1/flows?limit=1000")
        if not isinstance(text, str):
            return [text]
        return [json.loads(line) for line in text.splitlines()]


def total(text: str, name: str, labels: Mapping[str, str]) -> float:
    """Sum over the samples of a Prometheus text that carry these labels."""
    return sum(
        float(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and all(sample.labels.get(k) == v for k, v in labels.items())
    )


def memory(pid: int, field: str) -> int:
    """Bytes; VmRSS (now) or VmHWM (the peak)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


@contextmanager
def populated(lab: Lab, scratch: Path) -> Iterator[Mesh]:
    """A populated mesh; of another of the lab's name nothing is left before, and of this one afterwards."""
    lab.down()
    try:
        mesh = Mesh(lab, scratch)
        mesh.populate()
        yield mesh
    finally:
        lab.down()


class Refused(AssertionError):
    """The connection was refused or ended."""


class Background:
    """A program of ours running in a workload, and what it reported."""

    def __init__(self, workload: Workload, argv: list[str]) -> None:
        self.popen = subprocess.Popen(
            workload.place.argv(argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def first_line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline()

    def stopped(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Its report, of a program that ends at SIGTERM."""
        self.popen.terminate()
        return self.report(timeout_s)

    def report(self, timeout_s: float) -> dict[str, Any]:
        out, err = self.popen.communicate(timeout=timeout_s * SLOW)
        assert out.strip(), f"the program said nothing: {err}"
        return dict(json.loads(out.splitlines()[-1]))


def until(done: Callable[[], Any], what: str, deadline_s: float = 10.0 * PATIENCE / SLOW, *, every_s: float = 0.02) -> Any:
    """Poll until truthy; fail with `what` past the deadline. One that is given is a promise of the product, or is long."""
    end = time.monotonic() + deadline_s * SLOW
    while not (value := done()):
        assert time.monotonic() < end, f"{what} within {deadline_s:g} s"
        time.sleep(every_s)
    return value
