"""What systemd says of the units of an enrolment: who they are, what they run, and which line of ours another drop-in undoes."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pillion.drop_in import AWAITING, SLICES
from pillion.errors import CliError

PARENT = "pillion.slice"
SHOWN = (
    "LoadState", "ActiveState", "Type", "User", "DynamicUser", "TriggeredBy", "PrivateNetwork", "PAMName",
    "NetworkNamespacePath", "AmbientCapabilities", "Delegate", "ControlGroup",
)  # fmt: skip
STEPS = ("ExecCondition", "ExecStartPre", "ExecStart", "ExecStartPost", "ExecReload", "ExecStop", "ExecStopPost")
OF_SOCKETS = ("ExecStartPre", "ExecStartPost", "ExecStopPre", "ExecStopPost")
AS_ROOT = {"privileged": "+", "no-setuid": "!"}  # `!!` is neither where the kernel has ambient capabilities, as all of ours do
DOWN = ("inactive", "failed")
BUS_TIMEOUT = "120s"  # its own 25 s are too few to read all unit files on a slow machine
_COMMAND = re.compile(r"^(Exec[A-Za-z]+?)(?:Ex)?=\{ path=(.*?) ; argv\[\]=(.*?) ; (?:flags|ignore_errors)=([^;]*) ;", re.M | re.S)


class Command(NamedTuple):
    """One of a unit."""

    setting: str
    path: str
    argv: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.setting}={''.join(sign for flag, sign in AS_ROOT.items() if flag in self.flags)}{self.path}"

    @property
    def ours(self) -> bool:
        return AWAITING in self.argv


def systemctl(*arguments: str) -> str:
    """Its output. Raises CliError."""
    try:
        env = {**os.environ, "SYSTEMD_BUS_TIMEOUT": BUS_TIMEOUT}
        done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=300, check=False, env=env)
    except subprocess.TimeoutExpired as error:
        what = f"systemctl {' '.join(arguments)}: not done after {error.timeout:.0f} s"
        raise CliError(what, "see: systemctl list-jobs") from error
    if done.returncode:
        raise CliError(f"systemctl {' '.join(arguments)}: {done.stderr.strip() or done.returncode}", "see: journalctl -xe")
    return done.stdout


def show(unit: str, names: Iterable[str]) -> dict[str, str]:
    """Properties by name; the lines of one that has several, joined."""
    found: dict[str, str] = {}
    for line in systemctl("show", unit, *(f"--property={name}" for name in names)).splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found[name] = f"{found[name]} {value}" if name in found else value
    return found


def facts(unit: str) -> dict[str, str]:
    """What decides whether it may be a workload."""
    found = show(unit, SHOWN)
    return {**found, "User": user_of(found.get("User", ""))}


def user_of(text: str) -> str:
    """One name for each uid, though a unit may say another of its names, or its number. As it stands if nobody has it (yet)."""
    try:
        return pwd.getpwuid(int(text) if text.isdecimal() else pwd.getpwnam(text).pw_uid).pw_name
    except KeyError:
        return text


def commands(unit: str) -> list[Command]:
    """All that systemd would run for it, as a service's or a socket's settings say."""
    names = OF_SOCKETS if unit.endswith(".socket") else [f"{each}Ex" for each in STEPS]
    out = systemctl("show", unit, *(f"--property={name}" for name in names))
    return [Command(setting, path, argv, tuple(flags.split())) for setting, path, argv, flags in _COMMAND.findall(out)]


def starts_as_root(unit: str) -> bool:
    """What comes before and after its start, by a setting that systemd does not show."""
    return re.search(r"^PermissionsStartOnly\s*=\s*(1|y|yes|t|true|on)\s*$", systemctl("cat", unit), re.M | re.I) is not None


def running(units: Iterable[str]) -> dict[str, str]:
    """Those that are not down, with what they are at: also who waits for the agent, or ends, has processes. Sockets first: they
    start their service while they are there, and refuse to start beside it."""
    sorted_ = sorted(units, key=lambda unit: not unit.endswith(".socket"))
    states = {unit: show(unit, ["ActiveState"]).get("ActiveState", "") for unit in sorted_}
    return {unit: state for unit, state in states.items() if state not in DOWN}


def again(units: dict[str, str]) -> list[str]:
    """Started are those that somebody had started. Which that were."""
    wanted = [unit for unit, state in units.items() if state != "deactivating"]
    if wanted:
        # How long a start takes that was not done before, nobody knows
        later = ("--no-block",) if "activating" in units.values() else ()
        systemctl("start", *later, *wanted)
    return wanted


def sockets_of(unit: str, known: dict[str, str]) -> list[str]:
    """The .socket units that make the service's listeners. TriggeredBy= alone knows those that systemd has loaded so far."""
    found = {each for each in known.get("TriggeredBy", "").split() if each.endswith(".socket")}
    files = systemctl("list-unit-files", "--type=socket", "--plain", "--no-legend")
    there = [line.split()[0] for line in files.splitlines() if line.split() and "@." not in line.split()[0]]
    for text in systemctl("show", "--property=Id,Triggers", *there).split("\n\n") if there else ():
        shown = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        if unit in shown.get("Triggers", "").split():
            found.add(shown["Id"])
    return sorted(found)


def cgroup_of_slice(mount: Path, name: str) -> Path:
    """Where systemd has it."""
    return mount / (show(name, ["ControlGroup"]).get("ControlGroup", "").lstrip("/") or f"{PARENT}/{SLICES}/{name}")


def elsewhere(unit: str, slice_: str) -> str:
    """The cgroup of a unit that runs outside its slice; empty: it does not."""
    found = show(unit, ["ActiveState", "ControlGroup"])
    group = found.get("ControlGroup", "")
    return group if group and found.get("ActiveState") not in DOWN and f"/{slice_}/" not in group else ""


def undone(unit: str, text: str) -> list[str]:
    """The settings of our drop-in ``text`` that are not in force: another drop-in, read later, has the last word."""
    lines = [line.partition("=")[::2] for line in text.splitlines() if "=" in line and not line.startswith("#")]
    shown = show(unit, dict(lines))
    return list(dict.fromkeys(f"{name}=" for name, value in lines if not _in_force(name, value, shown.get(name, ""))))


def _in_force(name: str, value: str, seen: str) -> bool:
    """Lists may hold more."""
    if name.startswith("Exec"):  # with whichever interpreter
        return f"{AWAITING}{value.partition(AWAITING)[2]} ;" in seen
    if name == "CapabilityBoundingSet":
        return not set(value.lstrip("~").lower().split()) & set(seen.lower().split())
    if name in ("Slice", "DefaultDependencies") or value in ("yes", "no"):
        return seen == value
    words = set(seen.split())
    if name == "BindReadOnlyPaths":  # shown with where it is to be seen, and how
        return all(words & {each, f"{each}:{each.lstrip('-')}", f"{each}:{each.lstrip('-')}:rbind"} for each in value.split())
    return set(value.split()) <= words
