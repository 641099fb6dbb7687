"""``python deploy/lock.py`` writes requirements.lock and build.lock beside it: what of ../requirements.lock a host runs with,
and what the wheel is built with. `make lock` calls it."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")  # Debian 12, Ubuntu 24.04, Debian 13
HEAD = "# Made by `make lock`: what of ../requirements.lock {}. Not edited by hand.\n"


def entries(lock: str) -> dict[str, str]:
    """Canonical name -> its lines, without comments."""
    found: dict[str, str] = {}
    name = ""
    for line in lock.splitlines(keepends=True):
        if match := re.match(r"([A-Za-z0-9._-]+)==", line):
            name = canonicalize_name(match[1])
            found[name] = line
        elif line.startswith("    --hash=") and name:
            found[name] += line
    return {name: text.rstrip().rstrip("\\").rstrip() + "\n" for name, text in found.items()}


def wanted(package: str) -> set[str]:
    """Canonical names of all that ``package`` needs to run, on any of PYTHONS."""
    found: set[str] = set()
    todo = [package]
    while todo:
        for text in metadata.requires(todo.pop()) or []:
            need = Requirement(text)
            name = canonicalize_name(need.name)
            if name not in found and any(applies(need, version) for version in PYTHONS):
                found.add(name)
                todo.append(name)
    return found


def applies(need: Requirement, version: str) -> bool:
    environment = {"python_version": version, "python_full_version": f"{version}.0", "extra": ""}
    return need.marker is None or need.marker.evaluate(environment)


def texts() -> dict[str, str]:
    """File name -> content. Raises KeyError for a package that is not locked."""
    locked = entries((ROOT / "requirements.lock").read_text())
    built_with = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    found = {
        "requirements.lock": ("a host runs with", wanted("pillion")),
        "build.lock": ("the wheel is built with", {canonicalize_name(Requirement(text).name) for text in built_with}),
    }
    return {file: HEAD.format(what) + "".join(locked[name] for name in sorted(names)) for file, (what, names) in found.items()}


if __name__ == "__main__":
    for file, text in texts().items():
        (ROOT / "deploy" / file).write_text(text)
    sys.exit(0)
