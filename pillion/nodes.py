"""status, node and identity: who is in the mesh, and in what state."""

from __future__ import annotations

import sys
from typing import Annotated, Any
from urllib.parse import quote

import typer

from pillion import output
from pillion.client import Refused
from pillion.context import FormatOption, chosen
from pillion.errors import CliError
from pillion.examples import epilog
from pillion.output import Format
from pillion.resources import wait_for

node_app = typer.Typer(help="Nodes: admit, cut, list.", no_args_is_help=True)
identity_app = typer.Typer(help="Identities and their certificates.", no_args_is_help=False, invoke_without_command=True)

TOKEN_TTL_S_MAX = 600


def _agents() -> dict[str, dict[str, Any]]:
    """Status of the agents reachable from here, by node; one that does not answer says so in `detail`."""
    out: dict[str, dict[str, Any]] = {}
    for name, client in chosen.agent_clients().items():
        try:
            status = client.get("/v1/status", timeout_s=10.0)
            out[status["node"]] = status
        except CliError as error:
            silent = {"node": name or "agent", "ready": False, "detail": error.what, "remedy": error.remedy}
            out[name or "?"] = {**silent, "workloads": [], "proxy": [], "programs": {}}
    return out


def status(form: FormatOption = Format.TABLE) -> None:
    """The mesh at a glance: nodes, revisions, workloads, what is not as it should be. Exit code 1 if not all is ready."""
    where = chosen.endpoints()
    report: dict[str, Any] = {"origin": where.origin, "controller": None, "agents": {}}
    if where.controller:
        report["controller"] = chosen.controller_client().get("/v1/status")
    if where.agents:
        report["agents"] = _agents()
    if not where.controller and not where.agents:
        where.need_controller()
    controller = report["controller"] or {"nodes": []}
    ready = all(agent["ready"] for agent in report["agents"].values()) and all(
        node["connected"] and node["ready"] for node in controller["nodes"] if not node["cut"]
    )
    report["ready"] = ready
    if form is not Format.TABLE:
        output.machine(report, form)
    else:
        _show_status(report, controller)
    if not ready:
        raise typer.Exit(1)


def _show_status(report: dict[str, Any], controller: dict[str, Any]) -> None:
    print(f"{report['origin']}: {'ready' if report['ready'] else 'NOT READY'}", end="")
    if report["controller"]:
        print(f", trust domain {controller['trust_domain']}, revision {controller['revision']}")
        nodes = []
        for node in controller["nodes"]:
            state = "cut" if node["cut"] else "ready" if node["ready"] else "connected" if node["connected"] else "away"
            nodes.append((node["name"], state, node["acked"], node.get("workloads"), node["digest_ok"], node.get("error")))
        output.table(("NODE", "STATE", "REVISION", "WORKLOADS", "SAME STATE", "ERROR"), nodes)
        if not nodes:
            print("no node has joined yet; a token for one: pillion node token NAME", file=sys.stderr)
    else:
        print()
    ages = [_policy_age(agent) for agent in report["agents"].values() if agent.get("revision")]
    if ages:
        print()
        output.table(("NODE", "POLICY AGE", "LEASE", "CONTROLLER"), ages)
    rows = []
    for agent in report["agents"].values():
        for workload in agent["workloads"]:
            svid = workload.get("svid") or {}
            name = f"{workload['namespace']}/{workload['name']}"
            rows.append((agent["node"], name, workload.get("spiffe"), svid.get("serial"), output.until(svid.get("not_after"))))
    if rows:
        print()
        output.table(("NODE", "WORKLOAD", "IDENTITY", "CERTIFICATE", "FOR"), rows)
    lacking = [
        (agent["node"], part, output.printable(state["why"]), state["instead"])
        for agent in report["agents"].values()
        for part, state in agent.get("optional", {}).items()
        if not state["on"]
    ]
    if lacking:
        print()
        output.table(("NODE", "OFF", "WHY", "INSTEAD"), lacking)
    strays = [
        (agent["node"], stray["pid"], stray["workload"], output.printable(stray["into"]))
        for agent in report["agents"].values()
        for stray in agent.get("moves", {}).get("strays", ())
    ]
    if strays:
        print()
        output.table(("NODE", "PROCESS", "LEFT", "AND IS IN"), strays)
    for agent in report["agents"].values():
        off = [name for name, there in agent.get("programs", {}).items() if not there]
        if off:
            print(f"{agent['node']}: programs not attached: {', '.join(off)}")
        if agent.get("detail"):
            print(f"{agent['node']}: {output.printable(agent['detail'])}")
        if agent.get("remedy"):
            print(f"  {output.printable(agent['remedy'])}")


def _policy_age(agent: dict[str, Any]) -> tuple[str, str, str, str]:
    """How long ago the controller confirmed what a node enforces, and what comes of it."""
    age, lease = agent.get("policy_age_s"), agent.get("policy_lease_s") or 0.0
    over = bool(lease) and (age is None or age > lease)
    limit = "no limit" if not lease else f"{output.age(lease)}{', over: nothing new is let in' if over else ''}"
    stream = agent.get("controller") or {}
    return agent["node"], output.age(age), limit, "connected" if stream.get("connected") else stream.get("error") or "away"


@node_app.command("list", epilog=epilog("node list"))
def node_list(form: FormatOption = Format.TABLE) -> None:
    """Nodes the controller knows."""
    nodes = chosen.controller_client().get("/v1/status")["nodes"]
    if form is not Format.TABLE:
        output.machine(nodes, form)
        return
    columns = ("connected", "ready", "cut", "acked", "workloads", "error")
    output.table(("NODE", *(column.upper() for column in columns)), [(n["name"], *(n.get(c) for c in columns)) for n in nodes])


@node_app.command("token", epilog=epilog("node token"))
def node_token(
    name: Annotated[str, typer.Argument(help="the node's name")],
    ttl: Annotated[int, typer.Option(help="seconds it can be used", min=1, max=TOKEN_TTL_S_MAX)] = TOKEN_TTL_S_MAX,
    readmit: Annotated[bool, typer.Option("--readmit", help="also a node that was cut")] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """A token with which this node joins, once."""
    answer = chosen.controller_client().call(
        "POST", f"/v1/nodes/{quote(name, safe='')}/token", {"ttl_s": ttl, "readmit": readmit}
    )
    if form is not Format.TABLE:
        output.machine(answer, form)
        return
    print(answer["token"])
    print(f"usable once within {ttl} s; give it to the agent: --join-token-file", file=sys.stderr)


@node_app.command("cut", epilog=epilog("node cut"))
def node_cut(
    name: Annotated[str, typer.Argument(help="the node's name")],
    force: Annotated[bool, typer.Option("--force", help="also a node the controller has not heard of")] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Shut a node out at once: its certificates are no longer honoured."""
    try:
        answer = chosen.controller_client().call("POST", f"/v1/nodes/{quote(name, safe='')}/cut", {"force": force})
    except Refused as error:
        if error.status == 404 and not force:
            raise CliError(error.what, f"see: pillion node list; in any case: pillion node cut {name} --force") from error
        raise
    if form is not Format.TABLE:
        output.machine({"node": name, **answer}, form)
        return
    print(f"node {name} is cut, revision {answer['revision']}")


@identity_app.callback()
def identity(context: typer.Context, form: FormatOption = Format.TABLE) -> None:
    """Identities and their certificates."""
    if context.invoked_subcommand is None:
        identity_list(form)


@identity_app.command("list", epilog=epilog("identity list"))
def identity_list(form: FormatOption = Format.TABLE) -> None:
    """Every identity of the mesh and its number."""
    answer = chosen.controller_client().get("/v1/identities")
    items = answer["items"]
    if form is not Format.TABLE:
        output.machine(items, form)
        return
    output.table(("ID", "IDENTITY", "WORKLOADS"), [(item["id"], item["spiffe"], ", ".join(item["workloads"])) for item in items])


@identity_app.command("show", epilog=epilog("identity show"))
def identity_show(
    name: Annotated[str, typer.Argument(help="SPIFFE id, namespace/service-account, or namespace/workload")],
    form: FormatOption = Format.TABLE,
) -> None:
    """Where an identity runs, and its certificates."""
    rows = []
    for agent in _agents().values():
        for workload in agent["workloads"]:
            spiffe = str(workload.get("spiffe") or "")
            names = {spiffe, spiffe.removeprefix("spiffe://"), f"{workload['namespace']}/{workload['name']}"}
            parts = spiffe.split("/")
            if len(parts) >= 7:
                names.add(f"{parts[-3]}/{parts[-1]}")
            if name in names:
                rows.append({"node": agent["node"], **workload})
    if not rows:
        raise CliError(f"nothing here runs as {name!r}", "see: pillion identity list, pillion status")
    if form is not Format.TABLE:
        output.machine(rows, form)
        return
    columns = ("NODE", "WORKLOAD", "IDENTITY", "SERIAL", "FOR", "CGROUP")
    cells = []
    for row in rows:
        svid = row.get("svid") or {}
        cells.append(
            (
                row["node"],
                f"{row['namespace']}/{row['name']}",
                row.get("spiffe"),
                svid.get("serial"),
                output.until(svid.get("not_after")),
                row.get("cgroup"),
            )
        )
    output.table(columns, cells)


@identity_app.command("revoke", epilog=epilog("identity revoke"))
def identity_revoke(
    serials: Annotated[list[str], typer.Argument(metavar="SERIAL…", help="of certificates, as identity show prints them")],
    wait: Annotated[bool, typer.Option("--wait", help="until every node has ended what was open with them")] = False,
    form: FormatOption = Format.TABLE,
) -> None:
    """Take back single certificates: connections with them end, and a workload that still has its grant gets another.

    A node's own certificate can be meant too; that node is out until it joins again. For all of a node's: pillion node cut.
    """
    client = chosen.controller_client()
    answers: list[dict[str, Any]] = []
    failed: CliError | None = None
    for serial in serials:
        try:
            answers.append(client.call("POST", f"/v1/certificates/{quote(serial, safe='')}/revoke"))
        except CliError as error:
            failed = error
            if isinstance(error, Refused) and error.status == 404:
                remedy = "serials are given whole, as these show them: pillion identity show NAME, pillion operator list"
                failed = CliError(error.what, remedy)
            break
    where = f" {wait_for(client, answers[-1]['revision'], 30.0)}" if wait and answers else ""
    if form is not Format.TABLE:
        output.machine(answers, form)
    else:
        for answer in answers:
            whose = f"certificate {answer['serial']} of {output.printable(answer['spiffe'])}"
            print(f"{whose} is revoked, revision {answer['revision']}{where}")
    if failed is not None:  # those before it are revoked, and were told
        raise failed
