"""enrol, withdraw: a systemd service of this host as a workload of the mesh, and out of it again.

The unit gets a slice of its own below pillion.slice, and that slice is the workload: its cgroup stays while the unit, and
the sockets that activate it, come and go. A drop-in closes the ways out of it, and lets the unit start only once the
agent enforces and serves it, after a reboot as well. The workloads file, which the agent watches, outlives both.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pillion.awaiting import ASKED_AGAIN_S, UNGRANTED, WAIT_S, await_workload
from pillion.client import Client
from pillion.context import FormatOption, chosen, labels_of
from pillion.drop_in import AMBIENT, slice_of
from pillion.enrol_files import DROP_IN, files_left, files_of, locked, put, put_back, read_workloads, remove, write_workloads
from pillion.enrol_files import units as units_of_files
from pillion.enrol_systemd import (
    AS_ROOT,
    Command,
    again,
    cgroup_of_slice,
    commands,
    elsewhere,
    facts,
    running,
    sockets_of,
    starts_as_root,
    systemctl,
    undone,
)
from pillion.errors import USAGE, CliError
from pillion.output import Format, machine
from pillion.run import cgroup2_mount, grant_line

UNIT = re.compile(r"[A-Za-z0-9:_.@\\-]{1,200}\.service\Z")
DBUS_OPENS = (
    "may ask for programs outside the mesh by D-Bus: logind starts a manager of its user's for it (set-self-linger), and "
    "systemd what polkit lets it; root anything"
)
NOT_FOR_A_MESH = ("pillion-", "systemd-", "dbus", "user@", "getty@", "serial-getty@", "ssh.", "ssh@", "sshd")


def label(text: str) -> str:
    """A workload's name from a unit's."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-")


def account_of(text: str) -> tuple[str, str]:
    """(namespace, service account) of ``NS/SA`` or ``SA``."""
    namespace, slash, account = text.rpartition("/")
    if not account or "/" in namespace or (slash and not namespace):
        raise CliError(
            f"{text!r} is no service account", "write --as NAMESPACE/ACCOUNT, or --as ACCOUNT for namespace default", USAGE
        )
    return namespace or "default", account


def refusals(unit: str, known: dict[str, str], users: dict[str, str], runs: dict[str, list[Command]]) -> list[tuple[str, str]]:
    """(why not, remedy) of what no drop-in can mend. ``users``: user -> another unit enrolled with it. ``runs``: what the
    service and its sockets run. Pure."""
    found = []
    root = known.get("User", "") in ("", "root", "0") and known.get("DynamicUser") != "yes"
    if root:
        found.append(
            (
                "runs as root, which may tell systemd to start programs anywhere",
                f"give it User= or DynamicUser=: systemctl edit {unit}",
            )
        )
    elif other := users.get(known.get("User", "")):
        found.append((f"shares the user {known['User']} with {other}: one may trace the other", "give each its own User="))
    strong = set(known.get("AmbientCapabilities", "").upper().split()) & set(AMBIENT.split())
    if strong:
        what = f"is given {', '.join(sorted(strong))}, which leads out of its cgroup or to another's user"
        found.append((what, "take AmbientCapabilities= away"))
    if name := known.get("PAMName"):
        found.append((f"opens a session ({name}), for which logind moves it out of its cgroup", "take PAMName= away"))
    theirs = {each: [command for command in listed if not command.ours] for each, listed in runs.items()}
    as_root = [str(command) for command in theirs.get(unit, ()) if set(command.flags) & AS_ROOT.keys()]
    if known.get("PermissionsStartOnly") == "yes":
        as_root.append("PermissionsStartOnly=yes")
    if as_root:
        what = f"has {', '.join(as_root)}: as root, and by + outside all that an enrolment closes"
        found.append((what, f"have another unit do that, or take the prefix away: systemctl edit --full {unit}"))
    first = next((command for command in runs.get(unit, ()) if command.setting == "ExecCondition"), None)
    if first is not None and not first.ours:
        found.append((f"has {first}, which runs before the mesh is asked", "make it an ExecStartPre="))
    for each in sorted(theirs.keys() - {unit}):
        if theirs[each]:
            what = f"has {each} with {', '.join(str(command) for command in theirs[each])}, which nothing closes"
            found.append((what, "have the service do that"))
    return found


def impossible(unit: str, known: dict[str, str], allow_dbus: bool = False) -> tuple[str, str] | None:
    """Why the unit can be no workload at all, and what to do. Pure."""
    if known.get("LoadState") != "loaded":
        return f"{unit} is {known.get('LoadState', 'unknown')} to systemd", "check its name: systemctl list-units --type=service"
    if unit.startswith(NOT_FOR_A_MESH):
        return f"{unit} belongs to the system or to the mesh itself", "enrol the services that people use"
    if known.get("PrivateNetwork") == "yes" or known.get("NetworkNamespacePath"):
        return f"{unit} has a network of its own", "leave PrivateNetwork= and NetworkNamespacePath= to the mesh's policies"
    if known.get("Type") == "dbus" and not allow_dbus:
        remedy = "enrol what serves the network as its own unit, or accept that with --allow-dbus"
        return f"{unit} serves on D-Bus, which also leads to the service manager", remedy
    if known.get("Delegate") == "yes":
        return f"{unit} manages cgroups itself (Delegate=)", "run what it contains as workloads of their own"
    return None


# ---- commands


def need_root() -> None:
    if os.geteuid() != 0:
        raise CliError("only root may put services into the mesh", "run it with sudo")
    if not Path("/run/systemd/system").is_dir():
        raise CliError("systemd does not run here", "put a program into the mesh with: pillion run")


def full_name(unit: str) -> str:
    unit = unit if "." in unit else f"{unit}.service"
    if not UNIT.match(unit):
        raise CliError(f"{unit!r} is no service", "name a .service; its .socket units go with it", USAGE)
    return unit


def enrol(
    unit: Annotated[str, typer.Argument(help="the service, for example web.service")],
    as_: Annotated[str, typer.Option("--as", help="NAMESPACE/SERVICE-ACCOUNT it runs as; also its label app=…")],
    port: Annotated[list[int] | None, typer.Option(help="a port it listens on; may repeat", min=1, max=65535)] = None,
    label_: Annotated[list[str] | None, typer.Option("--label", help="key=value; may repeat")] = None,
    name: Annotated[str | None, typer.Option(help="the workload's name (default: the unit's and the node's)")] = None,
    force: Annotated[bool, typer.Option("--force", help="also where a way out stays open; they are told")] = False,
    allow_dbus: Annotated[bool, typer.Option("--allow-dbus", help="it may use the system's D-Bus: a way out, see docs")] = False,
    restart: Annotated[bool, typer.Option("--restart/--no-restart", help="restart it if it runs, to take effect")] = True,
    form: FormatOption = Format.TABLE,
) -> None:
    """A systemd service of this host becomes a workload of the mesh, until it is withdrawn. Safe to repeat."""
    need_root()
    unit = full_name(unit)
    namespace, account = account_of(as_)
    labels = labels_of(account, label_)
    systemctl("daemon-reload")  # what is judged is what will run
    known = facts(unit)
    if reason := impossible(unit, known, allow_dbus):
        raise CliError(*reason)
    with locked():
        entries = read_workloads()
        others = [entry for entry in entries if entry.get("unit") != unit]
        identity = f"{namespace}/{account}"
        users = {
            facts(str(entry["unit"])).get("User", ""): str(entry["unit"])
            for entry in others
            if entry.get("unit") and f"{entry.get('namespace')}/{entry.get('serviceAccount')}" != identity
        }
        sockets = sockets_of(unit, known)
        known["PermissionsStartOnly"] = "yes" if starts_as_root(unit) else "no"
        for what, remedy in refusals(unit, known, users, {each: commands(each) for each in (unit, *sockets)}):
            if not force:
                raise CliError(f"{unit} {what}", f"{remedy}; or accept it with --force")
            print(f"pillion: warning: {unit} {what}; {remedy}", file=sys.stderr)
        if allow_dbus:
            print(f"pillion: warning: {unit} {DBUS_OPENS}", file=sys.stderr)
        client = Client(chosen.endpoints().agent_of(None))
        before = client.get("/v1/status")
        node = str(before["node"])
        name = name or label(f"{unit.removesuffix('.service')}-{node}")
        entry = {
            "name": name, "namespace": namespace, "serviceAccount": account, "labels": labels,
            "cgroup": "", "ports": sorted(port or []), "unit": unit,
        }  # fmt: skip
        _install(entry, others, sockets, allow_dbus)
    # A no that was there before may be older than a grant; one that comes now is not
    known_as = {f"{each['namespace']}/{each['name']}" for each in before["workloads"]}
    ungranted_s = ASKED_AGAIN_S if f"{namespace}/{name}" in known_as else 0.0
    problem = await_workload(client, namespace, name, WAIT_S, ungranted_s)
    if problem.startswith(UNGRANTED):
        what = problem.removeprefix(UNGRANTED).partition("; ")[0]
        remedy = f"{grant_line(node, namespace, account)}; then repeat this, or undo it with: pillion withdraw {unit}"
        raise CliError(f"{namespace}/{name} is not enforced: {what}", remedy)
    if problem:
        raise CliError(
            f"{namespace}/{name} is not enforced: {problem}", f"see: pillion status; undo with: pillion withdraw {unit}"
        )
    said = [f"{unit} is {namespace}/{name}, service account {account}"]
    up = running((unit, *sockets))
    if up and restart:
        systemctl("stop", *up)
        started = again(up)
        for each in started:
            if group := elsewhere(each, slice_of(unit)):
                raise CliError(f"{each} runs in {group}, outside the mesh", f"see: systemctl status {each}")
        said += [f"restarted {' '.join(started)} in the mesh"] if started else []
        said += [f"{each} was stopping, and is down" for each in up if each not in started]
    elif up:
        said.append(f"{' '.join(up)} runs outside the mesh until it is restarted")
    if form is Format.TABLE:
        print("\n".join(said))
    else:
        machine({"unit": unit, "workload": f"{namespace}/{name}", "in_force": restart or not up, "said": said}, form)


def _install(entry: dict[str, Any], others: list[dict[str, Any]], sockets: list[str], allow_dbus: bool) -> None:
    """The entry and all files of it, in force; or none of it. Raises CliError."""
    unit = str(entry["unit"])
    texts = files_of(unit, sockets, f"{entry['namespace']}/{entry['name']}", allow_dbus)
    before = put(unit, texts)
    try:
        systemctl("daemon-reload")
        for path, text in texts.items():
            each = path.parent.name.removesuffix(".d")
            if path.name == DROP_IN and (lines := undone(each, text)):
                remedy = f"take its lines away, or name it so that it comes before {DROP_IN}: systemctl cat {each}"
                raise CliError(f"another drop-in of {each} undoes {', '.join(lines)} of ours", remedy)
        systemctl("start", slice_of(unit))
        entry["cgroup"] = str(cgroup_of_slice(cgroup2_mount(Path("/proc/self/mountinfo").read_text()), slice_of(unit)))
        write_workloads([*others, entry])
    except BaseException:
        put_back(before)
        systemctl("daemon-reload")
        raise


def withdraw(
    unit: Annotated[str | None, typer.Argument(help="the service")] = None,
    all_: Annotated[bool, typer.Option("--all", help="every enrolled service of this host")] = False,
    restart: Annotated[bool, typer.Option("--restart/--no-restart", help="restart it if it runs, to take effect")] = True,
    form: FormatOption = Format.TABLE,
) -> None:
    """Undo enrol: the service runs outside the mesh again. Safe to repeat."""
    need_root()
    if all_ == (unit is not None):
        raise CliError("name one service, or --all", "for example: pillion withdraw web.service", USAGE)
    if unit:
        chosen_units = [full_name(unit)]
    else:
        named = [str(entry["unit"]) for entry in read_workloads(needed=False) if entry.get("unit")]
        chosen_units = list(dict.fromkeys([*named, *sorted(units_of_files())]))
    said = {each: _withdraw(each, restart) for each in chosen_units}
    if form is not Format.TABLE:
        machine([{"unit": each, "said": text} for each, text in said.items()], form)
    else:
        print("\n".join(said.values()) or "nothing is enrolled here")


def _withdraw(unit: str, restart: bool) -> str:
    """What became of it."""
    left = files_left(unit)
    if not left and all(entry.get("unit") != unit for entry in read_workloads(needed=False)):
        return f"{unit} is not enrolled"
    drop_ins = [path.parent.name.removesuffix(".d") for path in left if path.suffix == ".conf"]
    up = running(dict.fromkeys([unit, *drop_ins]))
    if up and restart:
        systemctl("stop", *up)  # in the mesh to its end: never a moment with neither
    with locked():
        entries = read_workloads(needed=False)
        rest = [entry for entry in entries if entry.get("unit") != unit]
        if rest != entries:
            write_workloads(rest)
        for path in files_left(unit):
            remove(path)
        systemctl("daemon-reload")
    if up and not restart:
        return f"{unit} is out of the mesh; it runs on, denied everything, until it is restarted"
    systemctl("stop", slice_of(unit))
    started = again(up)
    stopped = [each for each in up if each not in started]
    return f"{unit} is out of the mesh" + (f"; {' '.join(stopped)} was stopping, and is down" if stopped else "")
