"""enrol, withdraw: a systemd service of this host as a workload of the mesh, and out of it again.

The unit gets a slice of its own below pillion.slice, and that slice is the workload: its cgroup stays while the unit, and
the sockets that activate it, come and go. A drop-in closes the ways out of it, and lets the unit start only once the
agent enforces and serves it, after a reboot as well. The workloads file, which the agent watches, outlives both.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pillion.awaiting import await_workload
from pillion.client import Client
from pillion.context import FormatOption, chosen, labels_of
from pillion.drop_in import AGENT, SLICES, STRONG, service_drop_in, slice_of, slice_unit, socket_drop_in
from pillion.errors import USAGE, CliError
from pillion.output import Format, machine
from pillion.run import cgroup2_mount

UNITS = Path("/etc/systemd/system")
WORKLOADS = Path("/etc/pillion/workloads.yaml")
DROP_IN = "50-pillion.conf"
PARENT = "pillion.slice"
SHOWN = (
    "LoadState", "ActiveState", "FragmentPath", "Type", "User", "DynamicUser", "Slice", "TriggeredBy", "PrivateNetwork",
    "NetworkNamespacePath", "AmbientCapabilities", "Delegate", "ControlGroup",
)  # fmt: skip
UNIT = re.compile(r"[A-Za-z0-9:_.@\\-]{1,200}\.service\Z")
DBUS_OPENS = (
    "may ask for programs outside the mesh by D-Bus: logind starts a manager of its user's for it (set-self-linger), and "
    "systemd what polkit lets it; root anything"
)
NOT_FOR_A_MESH = ("pillion-", "systemd-", "dbus", "user@", "getty@", "serial-getty@", "ssh.", "ssh@", "sshd")


def systemctl(*arguments: str) -> str:
    """Its output. Raises CliError."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise CliError(f"systemctl {' '.join(arguments)}: {done.stderr.strip() or done.returncode}", "see: journalctl -xe")
    return done.stdout


def facts(unit: str) -> dict[str, str]:
    """What systemd says of a unit."""
    out = systemctl("show", unit, *(f"--property={name}" for name in SHOWN))
    found = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    return {**found, "User": user_of(found.get("User", ""))}


def user_of(text: str) -> str:
    """One name for each uid, though a unit may say another of its names, or its number. As it stands if nobody has it (yet)."""
    try:
        return pwd.getpwuid(int(text) if text.isdecimal() else pwd.getpwnam(text).pw_uid).pw_name
    except KeyError:
        return text


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
    return mount / (facts(name).get("ControlGroup", "").lstrip("/") or f"{PARENT}/{SLICES}/{name}")


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


def refusals(unit: str, known: dict[str, str], users: dict[str, str]) -> list[tuple[str, str]]:
    """(why not, remedy) of what no drop-in can mend. ``users``: user -> another unit enrolled with it. Pure."""
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
    strong = set(known.get("AmbientCapabilities", "").upper().split()) & set(STRONG.split())
    if strong:
        found.append((f"is given {', '.join(sorted(strong))}, which leads out of its cgroup", "take AmbientCapabilities= away"))
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


# ---- files


def read_workloads() -> list[dict[str, Any]]:
    """Of the workloads file. Raises CliError for one that is damaged."""
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
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.chmod(mode)
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


def files_of(unit: str, sockets: list[str], workload: str, allow_dbus: bool = False) -> dict[Path, str]:
    """Every file of an enrolment. Pure."""
    out = {
        UNITS / slice_of(unit): slice_unit(unit),
        UNITS / f"{AGENT}.wants" / slice_of(unit): slice_unit(unit),  # a link in effect: see `enrol`
        UNITS / f"{unit}.d" / DROP_IN: service_drop_in(unit, workload, allow_dbus),
    }
    for each in sockets:
        out[UNITS / f"{each}.d" / DROP_IN] = socket_drop_in(unit, workload)
    return out


def drop_ins_of(unit: str) -> list[Path]:
    """Those of an enrolment that are there: the unit's own and its sockets'."""
    found = [UNITS / f"{unit}.d" / DROP_IN]
    wanted = f"Slice={slice_of(unit)}\n"
    found += [path for path in UNITS.glob(f"*.socket.d/{DROP_IN}") if wanted in path.read_text()]
    return [path for path in found if path.exists()]


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
    known = facts(unit)
    if reason := impossible(unit, known, allow_dbus):
        raise CliError(*reason)
    entries = read_workloads()
    others = [entry for entry in entries if entry.get("unit") != unit]
    identity = f"{namespace}/{account}"
    users = {
        facts(str(entry["unit"])).get("User", ""): str(entry["unit"])
        for entry in others
        if entry.get("unit") and f"{entry.get('namespace')}/{entry.get('serviceAccount')}" != identity
    }
    for what, remedy in refusals(unit, known, users):
        if not force:
            raise CliError(f"{unit} {what}", f"{remedy}; or accept it with --force")
        print(f"pillion: warning: {unit} {what}; {remedy}", file=sys.stderr)
    if allow_dbus:
        print(f"pillion: warning: {unit} {DBUS_OPENS}", file=sys.stderr)
    client = Client(chosen.endpoints().agent_of(None))
    node = str(client.get("/v1/status")["node"])
    name = name or label(f"{unit.removesuffix('.service')}-{node}")
    sockets = sockets_of(unit, known)
    entry = {
        "name": name, "namespace": namespace, "serviceAccount": account, "labels": labels,
        "cgroup": "", "ports": sorted(port or []), "unit": unit,
    }  # fmt: skip
    for path, text in files_of(unit, sockets, f"{namespace}/{name}", allow_dbus).items():
        if path.parent.name == f"{AGENT}.wants":
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(UNITS / path.name)
        else:
            write(path, text)
    systemctl("daemon-reload")
    systemctl("start", slice_of(unit))
    entry["cgroup"] = str(cgroup_of_slice(cgroup2_mount(Path("/proc/self/mountinfo").read_text()), slice_of(unit)))
    write_workloads([*others, entry])
    problem = await_workload(client, namespace, name)
    if problem:
        raise CliError(
            f"{namespace}/{name} is not enforced: {problem}", f"see: pillion status; undo with: pillion withdraw {unit}"
        )
    said = [f"{unit} is {namespace}/{name}, service account {account}"]
    active = [each for each in (unit, *sockets) if facts(each).get("ActiveState") == "active"]
    if active and restart:
        systemctl("stop", *active)
        systemctl("start", *active)
        said.append(f"restarted {' '.join(active)} in the mesh")
    elif active:
        said.append(f"{' '.join(active)} runs outside the mesh until it is restarted")
    if form is Format.TABLE:
        print("\n".join(said))
    else:
        machine({"unit": unit, "workload": f"{namespace}/{name}", "in_force": restart or not active, "said": said}, form)


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
    entries = read_workloads()
    chosen_units = [full_name(unit)] if unit else [str(entry["unit"]) for entry in entries if entry.get("unit")]
    said = {each: _withdraw(each, restart) for each in chosen_units}
    if form is not Format.TABLE:
        machine([{"unit": each, "said": text} for each, text in said.items()], form)
    else:
        print("\n".join(said.values()) or "nothing is enrolled here")


def _withdraw(unit: str, restart: bool) -> str:
    """What became of it."""
    entries = read_workloads()
    rest = [entry for entry in entries if entry.get("unit") != unit]
    drop_ins = drop_ins_of(unit)
    if len(rest) == len(entries) and not drop_ins:
        return f"{unit} is not enrolled"
    units = [path.parent.name.removesuffix(".d") for path in drop_ins]
    active = [each for each in units if facts(each).get("ActiveState") == "active"]
    if active and restart:
        systemctl("stop", *active)  # in the mesh to its end: never a moment with neither
    write_workloads(rest)
    for path in drop_ins:
        path.unlink()
        try:
            path.parent.rmdir()
        except OSError:
            pass  # others' drop-ins
    for path in (UNITS / f"{AGENT}.wants" / slice_of(unit), UNITS / slice_of(unit)):
        path.unlink(missing_ok=True)
    try:
        (UNITS / f"{AGENT}.wants").rmdir()
    except OSError:
        pass
    systemctl("daemon-reload")
    if active and restart:
        systemctl("stop", slice_of(unit))
        systemctl("start", *active)
    return f"{unit} is out of the mesh" + (
        "" if restart or not active else "; it runs on, denied everything, until it is restarted"
    )
