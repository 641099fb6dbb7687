"""check --security: what of the mesh's promises is enforced on this node now. Reads, and changes nothing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import typer

from mesh.model import State
from pillion import node_facts, output
from pillion.client import Client
from pillion.context import chosen
from pillion.endpoints import HOST_AGENT
from pillion.enrolled import enrolled
from pillion.errors import CliError
from pillion.findings import Finding, Verdict, judge
from pillion.node_facts import Facts, Process
from pillion.output import Format
from pillion.run import agent_pid, cgroup2_mount

SYSCTLS = ("kernel.unprivileged_bpf_disabled",)
UNKNOWN_EXIT = 2


def gather(status: dict[str, Any], pid: int, socket: str, proc: Path = node_facts.PROC) -> Facts:
    """Facts of the node whose agent is ``pid`` and listens at ``socket``. Paths on its command line are as it sees them."""
    root, options = proc / str(pid) / "root", node_facts.arguments(pid, proc)

    def at(path: str | Path) -> Path:
        return root / str(path).lstrip("/")

    run_dir = options.get("run-dir", str(Path(socket).parent))
    bpf_dir, proxy_dir = options.get("bpf-dir", f"{run_dir}/bpf"), options.get("proxy-dir", f"{run_dir}/proxy")
    workers = {int(worker["pid"]) for worker in status.get("proxy", []) if worker.get("pid")}  # their word, and the kernel's
    workers.update(
        node_facts.cgroup_processes(at(options.get("proxy-cgroup", options.get("cgroup", "/nowhere") + "/proxy"))) or ()
    )
    found: dict[int, Process | None] = {worker: node_facts.process(worker, proc) for worker in sorted(workers)}
    try:
        group = at(options["cgroup"]).stat().st_ino
    except (KeyError, OSError):
        group = 0
    links = sorted(at(f"{bpf_dir}/links").glob("*")) if group else []
    files = {"bpffs": at(bpf_dir), "agent's socket": Path(socket), "agent's state": at(options.get("state-dir", "/nowhere"))}
    files |= {path.name: path for path in sorted(at(proxy_dir).glob("worker-*.sock"))}
    groups = {f"{w['namespace']}/{w['name']}": at(w["cgroup"]) for w in status.get("workloads", [])}
    inside: dict[str, list[Process] | None] = {}
    for name, path in groups.items():
        pids = node_facts.cgroup_processes(path)
        inside[name] = None if pids is None else node_facts.processes(pids, proc)
    veths = {
        f"{w['namespace']}/{w['name']}": str(w["veth"]) for w in status.get("workloads", []) if w.get("netns") and "veth" in w
    }
    on = node_facts.filtered({veth for veth in veths.values() if veth}, pid, proc)
    return Facts(
        node_facts.process(pid, proc),
        found,
        inside,
        {name: node_facts.mode_of(path, root) for name, path in groups.items()},
        {name: node_facts.mode_of(path, root) for name, path in files.items()},
        {path.name: node_facts.link_attached(path, group) for path in links},
        {name: node_facts.read_sysctl(name, proc) for name in SYSCTLS},
        {name: on.get(veth, False) for name, veth in veths.items()},
    )


def state_of(client: Client) -> State | None:
    """What the node enforces; None if its agent can not say."""
    try:
        return msgspec.convert(client.get("/v1/state")["items"], State)
    except (CliError, msgspec.ValidationError, KeyError, TypeError):
        return None


def examine(client: Client) -> list[Finding]:
    """Everything about one agent's node."""
    socket = urlsplit(client.url).path
    if not client.url.startswith("unix://"):
        text = "run it on the node: --agent unix:///run/pillion/agent.sock"
        return [Finding("agent", Verdict.UNKNOWN, f"{client.url} is not of this machine", text)]
    try:
        cgroup2_mount(Path("/proc/self/mountinfo").read_text())
        status, pid = client.get("/v1/status", timeout_s=10.0), agent_pid(client.url)
    except CliError as error:
        return [Finding("agent", Verdict.UNKNOWN, error.what, error.remedy)]
    of_host = [enrolled()] if client.url == HOST_AGENT else []  # the lab's services are no units
    return [*judge(gather(status, pid, socket), status, state_of(client)), *of_host]


def check_security(form: Format, node: str | None) -> None:
    """Exit code 0: all is enforced; 1: something is not; 2: nothing is known to be missing, but not all could be told."""
    clients = {node or "": chosen.agent_client(node)} if node else chosen.agent_clients()
    report = [{"node": name, **asdict(finding)} for name, client in clients.items() for finding in examine(client)]
    if form is Format.TABLE:
        rows = [tuple(row.values()) if any(clients) else tuple(row.values())[1:] for row in report]
        columns = ("CHECK", "STATE", "SEEN", "REMEDY")
        output.table(("NODE", *columns) if any(clients) else columns, rows)
    else:
        output.machine([{**row, "verdict": str(row["verdict"])} for row in report], form)
    verdicts = {row["verdict"] for row in report}
    if Verdict.NOT in verdicts:
        raise typer.Exit(1)
    if Verdict.UNKNOWN in verdicts:
        raise typer.Exit(UNKNOWN_EXIT)
