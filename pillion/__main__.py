"""`pillion`: commands that show are nouns, commands that change are verbs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from pillion import check, flows, nodes, policy, resources, run, top
from pillion.context import chosen
from pillion.errors import USAGE, CliError

app = typer.Typer(
    name="pillion",
    help="A service mesh without sidecars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SHELLS = ("bash", "zsh", "fish")


@app.callback()
def options(
    context: typer.Context,
    controller: Annotated[
        str | None, typer.Option(envvar="PILLION_CONTROLLER", help="unix:///… or https://host:15443", show_envvar=True)
    ] = None,
    agent: Annotated[str | None, typer.Option(envvar="PILLION_AGENT", help="unix:///… of a node's agent")] = None,
    lab: Annotated[str | None, typer.Option(envvar="PILLION_LAB", help="a running lab by name")] = None,
) -> None:
    """A service mesh without sidecars: services ride on the node's own kernel."""
    given = {name for name in context.params if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"}
    if {"controller", "agent"} & given:
        if "lab" in given:
            raise CliError("--lab and --controller or --agent exclude each other", "name one mesh", USAGE)
        lab = None  # from the environment: what is typed wins
    chosen.controller, chosen.agent, chosen.lab = controller, agent, lab


@app.command("lab", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def lab_command(context: typer.Context) -> None:
    """A mesh of namespaces on this machine: lab up|down|exec|status (see: pillion lab --help)."""
    # The lab is a program of its own, beside this package: this one talks to APIs only.
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != root)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    os.execve(sys.executable, [sys.executable, "-m", "lab", *context.args], env)  # noqa: S606


@app.command("completion")
def completion(shell: Annotated[str, typer.Argument(help=" | ".join(SHELLS))]) -> None:
    """Print the completion script of a shell; for bash: source <(pillion completion bash)"""
    if shell not in SHELLS:
        raise CliError(f"no completion for {shell!r}", f"use one of: {', '.join(SHELLS)}", USAGE)
    from typer._completion_shared import get_completion_script

    print(get_completion_script(prog_name="pillion", complete_var="_PILLION_COMPLETE", shell=shell))


app.command("apply")(resources.apply)
app.command("get")(resources.get)
app.command("delete")(resources.delete)
app.command("wait")(resources.wait)
app.command("status")(nodes.status)
app.command("check")(check.check)
app.command("flows")(flows.flows)
app.command("top")(top.top)
app.command("run", context_settings={"ignore_unknown_options": False})(run.run)
app.add_typer(nodes.node_app, name="node")
app.add_typer(nodes.identity_app, name="identity")
app.add_typer(policy.app, name="policy")


def main() -> None:
    """Errors as two lines: what, and what to do. Exit codes: 1 failed, 2 used wrongly."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if "_PILLION_COMPLETE" in os.environ:
        from typer._completion_classes import completion_init

        completion_init()  # knows the shells; typer itself does so only with its own install option
    try:
        app()
    except CliError as error:
        print(f"error: {error.what}", file=sys.stderr)
        print(f"  {error.remedy}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
