"""What README.md, ARCHITECTURE.md and docs/ name is there: files, links, commands and their options, maps, ports."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import typer

from pillion.__main__ import app
from pillion.preflight import PORTS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ("README.md", "ARCHITECTURE.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
NAMED = re.compile(r"(?<![\w/.~*])((?:[\w-]+/)*[\w-]+\.(?:py|c|h|sh|md|yaml|lua|json|svg))\b(?!\()")
OF_A_MACHINE = {"workloads.yaml", "web.yaml"}  # what an install makes, or an operator writes
PROGRAMS_MAPS = re.compile(r"^(?:PL_MAP\(\"\w+\", |PL_SK_STORAGE\(|PL_RINGBUF\(|PL_SOCKHASH\()(\w+)", re.MULTILINE)
COMMAND = re.compile(r"(?<![\w/-])pillion((?: +[^\s`|#;]+)*)")


def table(title: str) -> list[list[str]]:
    """Cells of the first table of a section of ARCHITECTURE.md, without its head."""
    lines = ARCHITECTURE.partition(f"## {title}\n")[2].splitlines()
    rows = itertools.takewhile(
        lambda line: line.startswith("|"), itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    )
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][2:]


@pytest.mark.parametrize("name", DOCS)
def test_files_and_links(name: str) -> None:
    listed = [str(path) for place in ROOT.glob("[!.]*") for path in (place, *place.rglob("*"))]
    text = (ROOT / name).read_text()
    missing = {named for named in NAMED.findall(text) if not any(path.endswith(f"/{named}") for path in listed)}
    assert not missing - OF_A_MACHINE
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text):
        assert not target or target.startswith("https://") or (ROOT / name).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("name", DOCS)
def test_commands(name: str) -> None:
    """Each `pillion …`: its words are commands as far as there are groups, its long options are that command's."""
    text = (ROOT / name).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", text) + [line for block in blocks for line in block.splitlines()]
    for words in (match[1].split() for span in spans for match in COMMAND.finditer(span)):
        command, left = typer.main.get_command(app), words
        while left and isinstance(command, typer.main.TyperGroup) and not left[0].startswith("-"):
            assert left[0] in command.commands, words
            command, left = command.commands[left[0]], left[1:]
        if command.name == "lab":
            continue  # a program of its own
        known = {option for each in command.params for option in each.opts} | {"--help"}
        given = {word for word in itertools.takewhile(lambda word: word != "--", left) if word.startswith("--")}
        assert given <= known, words


def test_every_map_has_its_writer() -> None:
    sources = sorted((ROOT / "bpf").glob("*.[ch]"))
    made = {found for path in sources for found in PROGRAMS_MAPS.findall(path.read_text())}
    assert made == {name for row in table("Who writes which map") for name in re.findall(r"`(\w+)`", row[0])}


def test_every_reason_why_a_request_goes_up_is_told() -> None:
    listed = re.search(r"enum pl_xreason \{(.*?)\};", (ROOT / "bpf/types.h").read_text(), re.DOTALL)
    assert listed is not None
    reasons = {name.lower() for name in re.findall(r"PL_XR_(\w+)", listed[1])} - {"carried", "answered", "count"}
    assert reasons <= set(re.findall(r"`(\w+)`", (ROOT / "docs/express.md").read_text()))


def test_ports() -> None:
    told = {row[0] for row in table("Ports")} - {"unix sockets"}
    assert told == {str(port) for ports in PORTS.values() for port in ports}
