"""The files of enrolments: the workloads file, which the agent watches, and what systemd reads. Changed by who holds `locked`."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pillion.drop_in import AGENT, MARK, SLICES, service_drop_in, slice_of, slice_unit, socket_drop_in, unit_of
from pillion.errors import CliError

UNITS = Path("/etc/systemd/system")
WORKLOADS = Path("/etc/pillion/workloads.yaml")
# systemd reads drop-ins in their names' order, from whatever folder, and the last line wins. `systemctl edit` has override.conf
DROP_IN = "zz-pillion.conf"
FORMER = "50-pillion.conf"  # what an earlier version called it


@contextmanager
def locked() -> Iterator[None]:
    """One at a time reads and writes. A folder is locked, so that no file is left behind."""
    folder = os.open(UNITS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def read_workloads(needed: bool = True) -> list[dict[str, Any]]:
    """Of the workloads file. Raises CliError for one that is damaged, or not there though it is ``needed``."""
    if not needed and not WORKLOADS.exists():
        return []
    try:
        entries = (yaml.safe_load(WORKLOADS.read_text()) or {}).get("workloads") or []
    except FileNotFoundError as error:
        raise CliError(f"no {WORKLOADS}: this host is no node", "install one: deploy/install.sh node --name NAME") from error
    except (yaml.YAMLError, AttributeError) as error:
        raise CliError(f"{WORKLOADS}: {' '.join(str(error).split())}", "mend it, or restore a copy") from error
    return list(entries)


def write_workloads(entries: list[dict[str, Any]]) -> None:
    """As a whole or not at all."""
    text = "# Written by pillion enrol and pillion withdraw; watched by the agent\n" + yaml.safe_dump(
        {"workloads": entries}, sort_keys=False
    )
    write(WORKLOADS, text, 0o600)


def write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    fresh = Path(name)
    try:
        with os.fdopen(number, "w") as file:
            file.write(text)
            file.flush()
            os.fchmod(number, mode)
            os.fsync(number)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def files_of(unit: str, sockets: list[str], workload: str, allow_dbus: bool = False) -> dict[Path, str]:
    """Every file of an enrolment, beside a link to the slice. Pure."""
    out = {
        UNITS / slice_of(unit): slice_unit(unit),
        UNITS / f"{unit}.d" / DROP_IN: service_drop_in(unit, workload, allow_dbus),
    }
    for each in sockets:
        out[UNITS / f"{each}.d" / DROP_IN] = socket_drop_in(unit, workload)
    return out


def link_of(unit: str) -> Path:
    return UNITS / f"{AGENT}.wants" / slice_of(unit)


def put(unit: str, files: dict[Path, str]) -> dict[Path, str | None]:
    """In place of what an earlier version wrote. What was there before, for `put_back`."""
    old = [path for path in drop_ins_of(unit) if path not in files]
    before = {path: _text(path) for path in (*files, *old)}
    before[link_of(unit)] = str(link_of(unit).readlink()) if link_of(unit).is_symlink() else None
    try:
        for path, text in files.items():
            write(path, text)
        for path in old:
            if path.name == FORMER:
                path.unlink()
        _link(link_of(unit), UNITS / slice_of(unit))
    except BaseException:
        put_back(before)
        raise
    return before


def put_back(before: dict[Path, str | None]) -> None:
    for path, text in before.items():
        if text is None:
            remove(path)
        elif path.parent.name == f"{AGENT}.wants":
            _link(path, Path(text))
        else:
            write(path, text)


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def remove(path: Path) -> None:
    """And the folder that was made for it, unless it holds what is others'."""
    path.unlink(missing_ok=True)
    if path.parent != UNITS:
        try:
            path.parent.rmdir()
        except OSError:
            pass


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _ours(pattern: str) -> dict[Path, str]:
    """Path -> text of the files that an enrolment made."""
    return {path: text for path in UNITS.glob(pattern) if (text := _text(path)) and MARK in text}


def drop_ins_of(unit: str) -> list[Path]:
    """Those of an enrolment that are there: the unit's own and its sockets'."""
    wanted = f"Slice={slice_of(unit)}\n"
    every = {path: text for name in (DROP_IN, FORMER) for path, text in _ours(f"*.d/{name}").items()}
    own = [path for path in every if path.parent.name == f"{unit}.d"]
    return own + [path for path, text in every.items() if path not in own and wanted in text]


def files_left(unit: str) -> list[Path]:
    """All that is there of an enrolment."""
    there = [path for path in (UNITS / slice_of(unit), link_of(unit)) if path.exists() or path.is_symlink()]
    return drop_ins_of(unit) + there


def units() -> set[str]:
    """Services that a file of ours is there for, whether the workloads file names them or not."""
    slices, found = {path.name for path in _ours(f"{SLICES.removesuffix('.slice')}-*.slice")}, set[str]()
    for name in (DROP_IN, FORMER):
        for path, text in _ours(f"*.d/{name}").items():
            slices.update(re.findall(rf"^Slice=({SLICES.removesuffix('.slice')}-.+)$", text, re.M))
            if path.parent.name.endswith(".service.d"):
                found.add(path.parent.name.removesuffix(".d"))
    return found | {unit_of(each) for each in slices}
