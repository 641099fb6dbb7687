"""Help that teaches: every command shows how it is used, and what it shows is right. Completion, in a real bash."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from pillion.__main__ import LAB_COMMANDS, app
from pillion.examples import EXAMPLES
from tests.pillion.conftest import Cli

ROOT = Path(__file__).parents[2]
MACHINE_READS_NO_ANSWER = {"run", "lab", "completion"}  # programs' own output, a script


def commands(group: typer.main.TyperGroup, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


TREE = dict(commands(typer.main.get_command(app)))  # type: ignore[arg-type]  # the app is a group


@pytest.mark.parametrize("path", TREE, ids=" ".join)
def test_every_command_shows_how_it_is_used(cli: Cli, path: tuple[str, ...]) -> None:
    assert " ".join(path) in EXAMPLES
    if path == ("lab",):
        return  # its help is its own program's
    done = cli(*path, "--help")
    said = " ".join(done.out.split())
    assert done.code == 0 and all(" ".join(line.split()) in said for line in EXAMPLES[" ".join(path)]), done.out


def test_the_program_says_where_to_begin(cli: Cli) -> None:
    said = cli("--help").out
    assert all(line in said for line in EXAMPLES[""])


@pytest.mark.parametrize("command", LAB_COMMANDS)
def test_the_lab_shows_how_it_is_used(command: str) -> None:
    argv = [sys.executable, "-m", "pillion", "lab", command, "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert f"\n  pillion lab {command}" in done.stdout


@pytest.mark.parametrize("path", sorted(set(TREE) - {(name,) for name in MACHINE_READS_NO_ANSWER}), ids=" ".join)
def test_every_answer_can_be_had_as_json(path: tuple[str, ...]) -> None:
    assert "--output" in {option for parameter in TREE[path].params for option in parameter.opts}  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines if line.startswith("pillion ")])
def test_examples_are_commands(line: str) -> None:
    words, command = shlex.split(line)[1:], typer.main.get_command(app)
    context = command.make_context("pillion", words)
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    assert context.command is not None


def complete(tmp_path: Path, line: str) -> list[str]:
    """What bash offers at the end of a line, with the script the program prints."""
    program = tmp_path / "pillion"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pillion "$@"\n')
    program.chmod(0o755)
    script = f"""
source <(pillion completion bash)
COMP_WORDS=({line}{' ""' if line.endswith(" ") else ""})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
handler=$(complete -p pillion | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$handler pillion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pillion ex", ["express"]),
        ("pillion express ", ["status", "top", "on", "off"]),
        ("pillion operator re", ["remove"]),
        ("pillion get Auth", ["AuthorizationPolicy"]),
        ("pillion node cut --fo", ["--force"]),
        ("pillion lab e", ["exec"]),
    ],
)
def test_bash_completes(tmp_path: Path, line: str, offered: list[str]) -> None:
    assert sorted(complete(tmp_path, line)) == sorted(offered)
