"""`pillion`: commands that show are nouns, commands that change are verbs."""

from __future__ import annotations

import os
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from pillion import check, enrol, express, flows, nodes, operators, output, policy, resources, run, top
from pillion.context import Command, chosen
from pillion.errors import USAGE, CliError
from pillion.examples import epilog

app = typer.Typer(
    name="pillion",
    help="A service mesh without sidecars.",
    epilog=epilog(""),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
LAB_COMMANDS = ("up", "down", "exec", "status")
SHELLS = ("bash", "zsh", "fish")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pillion {metadata.version('pillion')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    controller: Annotated[
        str | None, typer.Option(envvar="PILLION_CONTROLLER", help="unix:///… or https://host:15443", show_envvar=True)
    ] = None,
    agent: Annotated[str | None, typer.Option(envvar="PILLION_AGENT", help="unix:///… of a node's agent")] = None,
    lab: Annotated[str | None, typer.Option(envvar="PILLION_LAB", help="a running lab by name")] = None,
    _: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="print the version and end")] = False,
) -> None:
    """A service mesh without sidecars: services ride on the node's own kernel."""
    given = {name for name in context.params if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"}
    if {"controller", "agent"} & given:
        if "lab" in given:
            raise CliError("--lab and --controller or --agent exclude each other", "name one mesh", USAGE)
        lab = None  # from the environment: what is typed wins
    chosen.controller, chosen.agent, chosen.lab = controller, agent, lab


def _complete_lab(context: typer.Context, incomplete: str) -> list[str]:
    given = context.params.get("arguments")
    return [] if given else [name for name in LAB_COMMANDS if name.startswith(incomplete)]


@app.command(
    "lab",
    epilog=epilog("lab"),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lab_command(arguments: Annotated[list[str] | None, typer.Argument(autocompletion=_complete_lab)] = None) -> None:
    """A mesh of namespaces on this machine: lab up|down|exec|status (see: pillion lab --help)."""
    # The lab is a program of its own, beside this package: this one talks to APIs only.
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != root)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if chosen.lab is not None:
        env["PILLION_LAB"] = chosen.lab
    os.execve(sys.executable, [sys.executable, "-m", "lab", *(arguments or [])], env)  # noqa: S606


@app.command("completion", epilog=epilog("completion"))
def completion(shell: Annotated[str, typer.Argument(help=" | ".join(SHELLS))]) -> None:
    """Print the completion script of a shell; for bash: source <(pillion completion bash)"""
    if shell not in SHELLS:
        raise CliError(f"no completion for {shell!r}", f"use one of: {', '.join(SHELLS)}", USAGE)
    from typer._completion_shared import get_completion_script

    print(get_completion_script(prog_name="pillion", complete_var="_PILLION_COMPLETE", shell=shell))


COMMANDS: dict[str, Command] = {
    "apply": resources.apply,
    "get": resources.get,
    "delete": resources.delete,
    "wait": resources.wait,
    "status": nodes.status,
    "check": check.check,
    "flows": flows.flows,
    "top": top.top,
    "enrol": enrol.enrol,
    "withdraw": enrol.withdraw,
}
for _name, _command in COMMANDS.items():
    app.command(_name, epilog=epilog(_name))(_command)
app.command("run", epilog=epilog("run"), context_settings={"allow_interspersed_args": False})(run.run)
app.add_typer(nodes.node_app, name="node")
app.add_typer(nodes.identity_app, name="identity")
app.add_typer(operators.app, name="operator")
app.add_typer(policy.app, name="policy")
app.add_typer(express.app, name="express")


def main() -> None:
    """Errors as two lines: what, and what to do. Exit codes: 1 failed, 2 used wrongly."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if "_PILLION_COMPLETE" in os.environ:
        from typer._completion_classes import completion_init

        completion_init()  # knows the shells; typer itself does so only with its own install option
    try:
        app(prog_name="pillion")
    except CliError as error:
        output.error(error.what, error.remedy)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
