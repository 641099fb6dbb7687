"""check --pre on this machine: each feature is tried, a miss is told with its remedy, and nothing stays."""

from __future__ import annotations

import ast
import socket
import subprocess
from pathlib import Path

import pytest

from lab import cgroups
from nodeagent.loader.attach import HOOKS
from pillion import preflight

ROOT = Path(__file__).resolve().parents[2]


def test_this_kernel_has_all_that_a_node_needs() -> None:
    found = preflight.examine("node")
    lacking = {name: seen for name, seen in found.items() if seen.needed and not seen.ok}
    assert lacking.keys() <= {"systemd", "ports"}, lacking  # what this machine is, not what its kernel can do
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
