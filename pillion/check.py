"""check: is this machine able to run the mesh, and does the mesh on it do what it should?"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pillion import output, preflight
from pillion.context import FormatOption, NodeOption, chosen
from pillion.errors import USAGE, CliError
from pillion.output import Format
from pillion.run import cgroup2_mount
from pillion.security import check_security

KERNEL_MIN = (5, 15)
TOOLS = ("ip", "nsenter", "unshare", "setpriv")
Result = tuple[bool, str, str]  # good, what was seen, remedy


def kernel_version(release: str) -> tuple[int, int]:
    parts = release.split("-")[0].split(".")
    return int(parts[0]), int("".join(char for char in parts[1] if char.isdigit()))


def _root() -> Result:
    return os.geteuid() == 0, f"uid {os.geteuid()}", "run it with sudo"


def _kernel() -> Result:
    release = platform.release()
    good = kernel_version(release) >= KERNEL_MIN
    return good, release, f"use kernel {KERNEL_MIN[0]}.{KERNEL_MIN[1]} or newer"


def _cgroup() -> Result:
    try:
        mount = cgroup2_mount(Path("/proc/self/mountinfo").read_text())
    except CliError as error:
        return False, error.what, error.remedy
    # cgroup.kill is of every group but the root
    good = any((child / "cgroup.kill").exists() for child in mount.iterdir() if child.is_dir()) or kernel_version(
        platform.release()
    ) >= (5, 14)
    return good, str(mount), "use kernel 5.14 or newer (cgroup.kill)"


def _bcc() -> Result:
    code = "import bcc; print(bcc.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    seen = f"bcc {done.stdout.strip()}" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    return done.returncode == 0, seen, "apt install python3-bpfcc, and use a Python made from /usr/bin/python3"


def _libbpf() -> Result:
    found = list(Path("/usr/lib").glob("*/libbpf.so.1"))
    return bool(found), str(found[0]) if found else "no libbpf.so.1", "apt install libbpf1"


def _tools() -> Result:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return not missing, f"missing: {', '.join(missing)}" if missing else " ".join(TOOLS), "apt install iproute2 util-linux"


def _controller() -> Result:
    where = chosen.endpoints()
    if where.controller is None:
        return True, "none known here", ""
    try:
        status = chosen.controller_client().get("/v1/status", timeout_s=10.0)
    except CliError as error:
        return False, error.what, error.remedy
    return (
        not status.get("error"),
        f"revision {status['revision']} {status.get('error') or ''}".rstrip(),
        "see the controller's log",
    )


def _agents() -> Result:
    where = chosen.endpoints()
    seen, good, remedy = [], True, "see: pillion status, and the agent's log"
    for name, client in chosen.agent_clients().items() if where.agents else ():
        try:
            status = client.get("/v1/status", timeout_s=10.0)
            seen.append(f"{status['node']} {'ready' if status['ready'] else 'not ready: ' + str(status.get('detail'))}")
            good = good and status["ready"]
        except CliError as error:
            seen.append(f"{name}: {error.what}" if name else error.what)
            good, remedy = False, error.remedy
    return good, "; ".join(seen) or "none known here", remedy


CHECKS: dict[str, Callable[[], Result]] = {
    "root": _root,
    "kernel": _kernel,
    "cgroup2": _cgroup,
    "bcc": _bcc,
    "libbpf": _libbpf,
    "tools": _tools,
    "controller": _controller,
    "agents": _agents,
}


def check(
    form: FormatOption = Format.TABLE,
    security: Annotated[bool, typer.Option("--security", help="what is enforced on this node, and what is not")] = False,
    pre: Annotated[bool, typer.Option("--pre", help="what this kernel and host can do, before an install")] = False,
    role: Annotated[str, typer.Option(help="with --pre: node or controller")] = "node",
    node: NodeOption = None,
) -> None:
    """Whether this machine can run the mesh, and whether the mesh on it is well. Exit code 1 if anything is not.

    With --security: 0 all enforced, 1 something is not, 2 not all could be told.
    """
    if security:
        check_security(form, node)
        return
    if pre:
        check_before(form, role)
        return
    report = []
    for name, probe in CHECKS.items():
        try:
            good, seen, remedy = probe()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            good, seen, remedy = False, str(error), "unexpected; see the message"
        report.append({"check": name, "ok": good, "seen": seen, "remedy": "" if good else remedy})
    if form is Format.TABLE:
        output.table(("CHECK", "OK", "SEEN", "REMEDY"), [tuple(each.values()) for each in report])
    else:
        output.machine(report, form)
    if not all(each["ok"] for each in report):
        raise typer.Exit(1)


def check_before(form: Format, role: str) -> None:
    """See `pillion.preflight`. Exit code 1 if something that is needed is missing."""
    if role not in preflight.PORTS:
        raise CliError(f"{role!r} is no role", "use --role node or --role controller", USAGE)
    found = preflight.examine(role)
    if form is Format.TABLE:
        rows = [(name, seen.state, seen.what, seen.remedy) for name, seen in found.items()]
        output.table(("FEATURE", "STATE", "SEEN", "REMEDY"), rows)
    else:
        output.machine([{"feature": name, **seen._asdict()} for name, seen in found.items()], form)
    if any(seen.needed and not seen.ok for seen in found.values()):
        raise typer.Exit(1)
