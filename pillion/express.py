"""express: HTTP that the kernel carries by itself: where it does, why not elsewhere, how fast, and the switch."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer
import yaml

from pillion import output
from pillion.client import Client, Refused
from pillion.context import FormatOption, NodeOption, chosen
from pillion.errors import USAGE, CliError
from pillion.examples import epilog
from pillion.output import Format
from pillion.resources import apply_text, fetch, wait_for

app = typer.Typer(help="HTTP in the kernel, between workloads of one node.", no_args_is_help=True)

INTERVAL_S = 1.0
WAIT_S = 30.0
NODES = ("NODE", "EXPRESS", "PAIRS", "REQUESTS", "PUNTED", "LEGS", "WHY")
PROGRAMS = ("NODE", "SERVICE", "PORT", "SOURCE", "STATES", "CARRIED BY")
TOP = ("NODE", "SOURCE", "SERVICE", "RULE", "KERNEL", "KERNEL/S", "PROXY", "P50", "P99")
MESH: dict[str, Any] = {"apiVersion": "mesh.pillion.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"}, "spec": {}}

ServiceOption = Annotated[list[str] | None, typer.Option("--service", metavar="NS/NAME", help="only this service; may repeat")]
WorkloadOption = Annotated[
    list[str] | None, typer.Option("--workload", metavar="NS/NAME", help="only this workload, until it is deleted; may repeat")
]
WaitOption = Annotated[bool, typer.Option("--wait", help="until every node has it in force")]


def _reports(node: str | None) -> dict[str, dict[str, Any]]:
    """What each agent says of express, by node. `on` is None where nobody says it: what its kernel carries goes on."""
    where = chosen.endpoints()
    urls = {node: where.agent_of(node)} if node else dict(where.need_agents())
    out: dict[str, dict[str, Any]] = {}
    for name, url in urls.items():
        try:
            report = Client(url).get("/v1/express", timeout_s=10.0)
        except CliError as error:
            unknown = isinstance(error, Refused) and error.status == 404
            report = {"on": False, "why": "this agent knows nothing of express"} if unknown else {"on": None, "why": error.what}
        out[report.get("node") or name or "this node"] = report
    return out


@app.command("status", epilog=epilog("express status"))
def status(node: NodeOption = None, form: FormatOption = Format.TABLE) -> None:
    """Which nodes may, which services do, and what keeps the others in user space."""
    reports = _reports(node)
    if form is not Format.TABLE:
        output.machine(reports, form)
        return
    rows = []
    for name, report in reports.items():
        carried = report.get("carried", {})
        punted = " ".join(f"{reason}:{count}" for reason, count in sorted(carried.get("punted", {}).items()))
        on = {True: "on", False: "off", None: "unknown"}[report["on"]]
        rows.append(
            (
                name,
                on,
                report.get("pairs", 0),
                carried.get("requests", 0),
                punted,
                report.get("legs", {}).get("open", 0),
                report.get("why"),
            )
        )
    output.table(NODES, rows)
    failed = [
        (name, probe, seen)
        for name, report in reports.items()
        for probe, seen in sorted(report.get("probes", {}).items())
        if seen != "ok"
    ]
    if failed:
        print()
        output.table(("NODE", "PROBE THAT FAILED", "SEEN"), failed)
    programs = [
        (name, each["service"], each["port"], _source(each), each["states"], each.get("reason") or "kernel")
        for name, report in reports.items()
        for each in report.get("programs", ())
    ]
    if programs:
        print()
        output.table(PROGRAMS, programs)


def _source(program: dict[str, Any]) -> str:
    """With the caller's address where rules read it."""
    address = program.get("address")
    return f"{program['source']} at {address}" if address else str(program["source"])


def usage(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Entries of `top` of all nodes with rates between two samples, the busiest first. ``seconds`` lie between them."""
    rows = []
    for node, report in now.items():
        old = {_who(entry): entry["kernel"] for entry in before.get(node, {}).get("top", ())}
        for entry in report.get("top", ()):
            # programs that were loaded anew count from 0
            rate = max(entry["kernel"] - old.get(_who(entry), 0), 0) / max(seconds, 1e-3)
            rows.append({"node": node, **entry, "kernel_per_s": round(rate, 1)})
    return sorted(rows, key=lambda row: (-row["kernel_per_s"], -row["kernel"], row["node"], *_who(row)))


def _who(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["source"], entry["service"], entry["rule"]


@app.command("top", epilog=epilog("express top"))
def top(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="refresh until interrupted")] = False,
    node: NodeOption = None,
    interval: Annotated[float, typer.Option(help="seconds between two looks", min=0.1, max=60)] = INTERVAL_S,
    form: FormatOption = Format.TABLE,
) -> None:
    """Who asks whom, by which rule: requests the kernel carried and the proxy, and how long the kernel's took."""
    before, then = _reports(node), time.monotonic()
    for name, report in before.items():
        if report["on"] is None:
            print(f"{name}: {report['why']}", file=sys.stderr)
    while True:
        time.sleep(interval)
        reports, now = _reports(node), time.monotonic()
        rows = usage(before, reports, now - then)
        output.look(TOP, rows, _cells, form, follow)
        if not follow:
            return
        before, then = reports, now


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    took = (_micros(row.get("p50_us")), _micros(row.get("p99_us")))
    return row["node"], *_who(row), row["kernel"], f"{row['kernel_per_s']:.0f}", row.get("proxy"), *took


def _micros(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} µs" if value < 1000 else f"{value / 1000:.1f} ms"


@app.command("on", epilog=epilog("express on"))
def on(
    service: ServiceOption = None,
    workload: WorkloadOption = None,
    wait: WaitOption = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Let the kernel carry what it can: in the whole mesh, of a service, or of a workload."""
    _switch("auto", service or [], workload or [], wait, form)


@app.command("off", epilog=epilog("express off"))
def off(
    service: ServiceOption = None,
    workload: WorkloadOption = None,
    wait: WaitOption = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Let the proxy carry all HTTP: in the whole mesh, of a service, or of a workload. No request is lost by it."""
    _switch("off", service or [], workload or [], wait, form)


def _switch(mode: str, services: list[str], workloads: list[str], wait: bool, form: Format) -> None:
    client = chosen.controller_client()
    named = [("Service", name) for name in services] + [("Workload", name) for name in workloads]
    mesh = next(iter(fetch(client, "MeshConfig", None, "mesh")), MESH)
    targets = [_find(client, kind, name) for kind, name in dict.fromkeys(named)] if named else [mesh]
    changed = [{**target, "spec": {**target["spec"], "express": mode}} for target in targets]
    answer = apply_text(client, yaml.safe_dump_all(changed, sort_keys=False, explicit_start=True), "express")
    where = f" {wait_for(client, answer['revision'], WAIT_S)}" if wait else ""
    if form is not Format.TABLE:
        output.machine(answer, form)
    else:
        for result in answer["results"]:
            name = "/".join(part for part in (result["kind"], result["namespace"], result["name"]) if part)
            print(f"{name} express {mode}{', as it was' if result['result'] == 'unchanged' else ''}")
        print(f"revision {answer['revision']}{where}")
    if named and mode == "auto" and mesh["spec"].get("express") == "off":
        print("the mesh as a whole is off, so nothing changes yet: pillion express on", file=sys.stderr)


def _find(client: Client, kind: str, name: str) -> dict[str, Any]:
    namespace, slash, own = name.partition("/")
    if not slash or not namespace or not own or "/" in own:
        raise CliError(f"{name!r} is not namespace/name", f"write for example --{kind.lower()} shop/web", USAGE)
    found = fetch(client, kind, namespace, own)
    if not found:
        raise CliError(f"there is no {kind} {name}", f"see: pillion get {kind} -n {namespace}")
    return found[0]
