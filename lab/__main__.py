"""`python -m lab up|down|exec|status|vm`: what `pillion lab …` runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from lab import process, services, state
from lab.cleanup import known_labs, take_down
from lab.host import container
from lab.lab import Lab
from lab.state import LabError
from lab.topology import PlanError

EXEC_EXAMPLES = ("client -- curl -s http://front.shop.mesh/", "--name mine n1 -- ip route")


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _up(options: argparse.Namespace) -> int:
    began = time.monotonic()
    print(f"lab {options.name}: {options.nodes} nodes", file=sys.stderr)
    lab = Lab(options.name, _say).up(options.nodes, mesh=not options.no_mesh, workers=options.workers)
    print(f"lab {options.name} is up after {time.monotonic() - began:.1f} s; next: pillion status", file=sys.stderr)
    print(f"logs: {lab.paths.logs}", file=sys.stderr)
    return 0


def _down(options: argparse.Namespace) -> int:
    every, command = options.all or options.here, "pillion lab down"
    labs = known_labs() if every else [options.name]
    take_down("lab", labs, lambda name: Lab(name, _say).down(), command, state.checkout_of if options.here else None)
    hosts = [name for name in container.known() if every or name == options.name]
    take_down("host", hosts, container.remove, command, container.checkout_of if options.here else None)
    return 0


def _exec(options: argparse.Namespace) -> int:
    lab = Lab(options.name)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if os.geteuid() != 0:
        raise LabError("only root can enter a lab's namespaces", "run it as root")
    where = lab.workloads.get(options.where) or lab.nodes.get(options.where)
    if where is None:
        names = ", ".join([*sorted(lab.workloads), *sorted(lab.nodes)])
        raise LabError(f"the lab {lab.name!r} has no workload or node {options.where!r}", f"there are: {names}")
    argv = where.place.argv(command or ["/bin/bash"])
    os.execvpe(argv[0], argv, process.environment())  # noqa: S606  # becomes the program


def _status(options: argparse.Namespace) -> int:
    report = [_describe(Lab(name)) for name in ([options.name] if options.name_given else state.running())]
    if options.output == "json":
        print(json.dumps(report, indent=2))
        return 0
    if not report:
        print("no lab is up; start one: pillion lab up")
    for lab in report:
        _print(lab)
    return 0


def _describe(lab: Lab) -> dict[str, Any]:
    current = lab.state()
    names = ["controller", *(f"{node.name}-{what}" for node in current.nodes for what in ("agent", "proxy"))]
    return {
        "name": lab.name,
        "mesh": current.mesh,
        "logs": str(lab.paths.logs),
        "processes": [
            {
                "name": name,
                "pid": services.pid_of(name, lab.paths),
                "supervised": services.supervised(name, lab.paths),
                "starts": services.starts_of(name, lab.paths),
            }
            for name in (names if current.mesh else [])
        ],
        "nodes": [
            {
                "name": node.name,
                "addresses": node.addresses,
                "netns": str(node.netns),
                "ready": current.mesh and services.answers(node.agent_socket, "/v1/ready"),
            }
            for node in lab.nodes.values()
        ],
        "workloads": [
            {
                "name": workload.name,
                "namespace": workload.namespace,
                "service_account": workload.service_account,
                "node": workload.node,
                "addresses": workload.addresses,
                "processes": len(workload.pids()),
            }
            for workload in lab.workloads.values()
        ],
    }


def _print(lab: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"lab {lab['name']}, {'with' if lab['mesh'] else 'without'} a mesh; logs: {lab['logs']}", highlight=False)
    for title in ("processes", "nodes", "workloads"):
        rows = lab[title]
        if not rows:
            continue
        table = Table(*(key.replace("_", " ") for key in rows[0]), box=None, title=None, header_style="bold")
        for row in rows:
            table.add_row(*(" ".join(value) if isinstance(value, tuple) else str(value) for value in row.values()))
        console.print(table)
        console.print()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pillion lab", description="nodes and workloads as namespaces on this machine")
    named = os.environ.get("PILLION_LAB") or None  # as `pillion --lab` sets it, too
    commands = parser.add_subparsers(required=True, metavar="up|down|exec|status|vm")

    def command(name: str, function: Any, help: str, *examples: str) -> argparse.ArgumentParser:
        shown = "\n".join(["examples:", *(f"  pillion lab {name} {example}".rstrip() for example in examples)])
        raw = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=help, description=help, epilog=shown, formatter_class=raw)
        sub.add_argument("--name", default=named, help="which lab (default: PILLION_LAB, or demo)")
        sub.set_defaults(function=function)
        return sub

    up = command("up", _up, "bring a lab up, or back what died in it", "", "--nodes 3 --name mine")
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--workers", type=int, default=1, help="proxy workers for each node")
    up.add_argument("--no-mesh", action="store_true", help="the network alone")
    down = command("down", _down, "remove a lab, whatever state it is in", "", "--name mine")
    which = down.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every lab of this machine, and every host of lab/host")
    which.add_argument("--here", action="store_true", help="every lab and host of this checkout")
    run = command("exec", _exec, "run a program in a workload, or on a node beside the mesh", *EXEC_EXAMPLES)
    run.add_argument("where", metavar="WORKLOAD|NODE")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …")
    status = command("status", _status, "what is running", "", "-o json")
    status.add_argument("-o", "--output", choices=["table", "json"], default="table")
    commands.add_parser("vm", help="machines with kernels of their own", add_help=False)  # lab.vm reads what follows
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["vm"]:
        from lab.vm.__main__ import main as vm

        return vm(given[1:])
    options = parser.parse_args(given)
    options.name_given = options.name is not None
    options.name = options.name or "demo"
    try:
        return int(options.function(options))
    except LabError as error:
        print(f"error: {error.what}", file=sys.stderr)
        print(f"  {error.remedy}", file=sys.stderr)
        return 1
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"error: {error.filename}: {error.strerror}\n  run it as root", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
