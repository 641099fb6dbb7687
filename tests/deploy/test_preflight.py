"""check --pre on this machine: each feature is tried, a miss is told with its remedy, and nothing stays."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab import cgroups
from nodeagent.loader.attach import HOOKS
from nodeagent.optional import ENDING, EXPRESS, INSTEAD, PODS
from pillion import preflight

ROOT = Path(__file__).resolve().parents[2]


def test_this_kernel_has_all_that_a_node_needs() -> None:
    found = preflight.examine("node")
    lacking = {name: seen for name, seen in found.items() if seen.needed and not seen.ok}
    assert lacking.keys() <= {"systemd", "ports", "distribution"}, lacking  # what this machine is, not what its kernel can do
    assert not list(cgroups.mount_point().glob("pillion-check-*"))


def test_the_hooks_tried_are_those_that_are_used() -> None:
    assert {name: tuple(hook) for name, hook in HOOKS.items()} == preflight.HOOKS


def test_it_runs_on_a_bare_host() -> None:
    """With the distribution's Python alone, as an operator would before an install."""
    tree = ast.parse((ROOT / "pillion/preflight.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.startswith(("pillion", "mesh", "typer", "yaml"))}
    done = subprocess.run(
        ["/usr/bin/python3", "-I", str(ROOT / "pillion/preflight.py"), "controller"], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1) and "ports" in done.stdout, done.stderr


@pytest.mark.parametrize("feature", [*preflight.COMMON, *preflight.NODE, "ports"])
def test_each_that_is_missing_is_told_alone_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], feature: str, tmp_path: Path
) -> None:
    for name in ("COMMON", "NODE"):
        known = getattr(preflight, name)
        monkeypatch.setattr(preflight, name, {each: (lambda: preflight.Seen(True, "there"), known[each][1]) for each in known})
    monkeypatch.setattr(preflight, "ports", lambda _: preflight.Seen(True, "free"))
    monkeypatch.setattr(sys, "argv", ["preflight.py", "node"])
    monkeypatch.setattr(preflight, "INSTALLED", tmp_path)
    (tmp_path / "node").touch()  # or install.sh would bring some
    assert preflight.main() == 0 and "->" not in capsys.readouterr().out

    def no(*_: object) -> preflight.Seen:
        raise OSError(1, "forced")

    if feature == "ports":
        monkeypatch.setattr(preflight, "ports", no)
    else:
        there = preflight.COMMON if feature in preflight.COMMON else preflight.NODE
        monkeypatch.setitem(there, feature, (no, there[feature][1]))
    optional = feature in preflight.OPTIONAL
    assert preflight.main() == (0 if optional else 1)
    lines = capsys.readouterr().out.splitlines()
    (number,) = (index for index, line in enumerate(lines) if "forced" in line)
    assert lines[number].startswith(feature) and (" off " if optional else " MISSING ") in lines[number]
    assert lines[number + 1].strip().startswith("-> ") and sum("->" in line for line in lines) == 1


def test_what_an_install_brings_is_no_failure_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And what needs it is not tried; afterwards both are."""
    there = {name: (lambda: preflight.Seen(True, "there"), "") for name in preflight.NODE}
    lacks = {name: (lambda: preflight.Seen(False, "no such module"), "apt install it") for name in ("bcc", "programs")}
    monkeypatch.setattr(preflight, "COMMON", {})
    monkeypatch.setattr(preflight, "NODE", there | lacks)
    monkeypatch.setattr(preflight, "ports", lambda _: preflight.Seen(True, "free"))
    monkeypatch.setattr(preflight, "INSTALLED", tmp_path)
    monkeypatch.setattr(sys, "argv", ["preflight.py", "node"])
    assert preflight.main() == 0
    told = capsys.readouterr().out
    assert "later    install.sh brings it (no such module)" in told and "MISSING" not in told and "->" not in told
    (tmp_path / "node").touch()
    assert preflight.main() == 1
    assert capsys.readouterr().out.count("MISSING  no such module") == 2


@pytest.mark.parametrize(
    ("told", "good"), [('ID=debian\nVERSION_ID="13"\n', True), ("ID=fedora\nVERSION_ID=42\n", False), ("ID=debian\n", False)]
)
def test_only_what_the_installer_knows_will_do(monkeypatch: pytest.MonkeyPatch, told: str, good: bool) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: told)
    assert preflight.distribution().ok is good
    monkeypatch.undo()
    case = next(line for line in (ROOT / "deploy/install.sh").read_text().splitlines() if '"debian 12" |' in line)
    assert tuple(re.findall(r'"([a-z]+ [0-9.]+)"', case)) == preflight.DISTRIBUTIONS


def test_what_the_mesh_goes_on_without_is_what_is_optional() -> None:
    named = {"pods (veth, tc)": PODS, "ending connections": ENDING, "express (sockmap)": EXPRESS, "btf": EXPRESS}
    assert set(preflight.OPTIONAL) == set(named) and set(named.values()) == set(INSTEAD)


def test_a_hook_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(preflight.HOOKS, "hovercraft", (18, 4242))
    seen = preflight.hooks()
    assert not seen.ok and seen.what.startswith("hovercraft: ") and seen.remedy


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setitem(preflight.PORTS, "node", (server.getsockname()[1],))
        seen = preflight.ports("node")
    assert not seen.ok and "ss -ltnp" in seen.remedy


def test_what_fails_apart_is_told() -> None:
    def work() -> str:
        raise OSError(95, "no such thing here")

    with pytest.raises(OSError, match="no such thing here"):
        preflight.apart(work, preflight.CLONE_NEWNET)


def test_no_version_is_compared() -> None:
    text = (ROOT / "pillion/preflight.py").read_text()
    assert "release()" not in text and "uname" not in text
