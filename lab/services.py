"""The mesh's own processes in a lab: their command lines, started under a supervisor each, and when they are ready."""

from __future__ import annotations

import fcntl
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import api, process
from lab.pace import PATIENCE
from lab.process import Place
from lab.state import LabError
from lab.topology import CONTROLLER_ADDRESSES, NETNS_ROOT, LabPlan, NodePlan, Paths
from mesh.ports import CONTROLLER_PORT

TRUST_DOMAIN = "mesh.local"
PROXY_USER = "pillion-proxy"
PROXY_UID = 64077  # where the package made no user
READY_TIMEOUT_S = 60.0 * PATIENCE
START_TIMEOUT_S = 10.0 * PATIENCE  # of a process, until it has a number
LOG_TAIL_LINES = 12


@dataclass(frozen=True)
class Service:
    """One supervised process."""

    name: str  # controller, n1-agent, n1-proxy
    place: Place
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    leave_rest: bool = False  # what it leaves behind at its end goes on


def proxy_user() -> str:
    try:
        return pwd.getpwnam(PROXY_USER).pw_name
    except KeyError:
        return str(PROXY_UID)


def controller(plan: LabPlan, paths: Paths, root: Path) -> Service:
    listen: list[str] = []
    for address in CONTROLLER_ADDRESSES:
        host = f"[{address}]" if ":" in address else address
        listen += ["--listen", f"{host}:{CONTROLLER_PORT}"]
    command = [
        *(sys.executable, "-m", "controller", "--trust-domain", TRUST_DOMAIN),
        *("--state-dir", str(paths.controller_state), "--run-dir", str(paths.controller_run)),
        *listen,
    ]
    return Service("controller", Place(root / "controller", NETNS_ROOT / plan.netns), tuple(command))


def proxy(node: NodePlan, paths: Paths, root: Path, workers: int) -> Service:
    command = [
        *(sys.executable, "-m", "l7proxy", "--run-dir", str(paths.agent_run(node.name) / "proxy")),
        *("--workers", str(workers), "--user", proxy_user()),
    ]
    place = Place(root / node.name / "proxy", NETNS_ROOT / node.netns)
    return Service(f"{node.name}-proxy", place, tuple(command), leave_rest=True)


def agent(node: NodePlan, paths: Paths, root: Path) -> Service:
    run = paths.agent_run(node.name)
    command = [
        *(sys.executable, "-m", "nodeagent", "--node", node.name),
        *(part for address in node.addresses for part in ("--address", address)),
        *("--join-token-file", str(paths.join_token(node.name)), "--state-dir", str(paths.agent_state(node.name))),
        *("--run-dir", str(run), "--cgroup", str(root / node.name), "--bpf-dir", str(run / "bpf")),
        *("--proxy-dir", str(run / "proxy"), "--workloads", str(paths.workloads_file(node.name))),
    ]
    return Service(f"{node.name}-agent", Place(root / node.name / "agent", NETNS_ROOT / node.netns), tuple(command))


def start(service: Service, paths: Paths, root: Path, code: Path | None = None) -> None:
    """Start its supervisor, unless that lives. `code`: the tree the program is imported from, not this one."""
    if supervised(service.name, paths):
        return
    log = paths.logs / f"{service.name}.log"
    elsewhere = {"PYTHONPATH": str(code)} if code else {}
    supervisor = [
        *(sys.executable, "-I", "-S", str(Path(__file__).with_name("supervise.py")), "--name", service.name),
        *("--pids", str(paths.pids), "--log", str(log), "--cgroup", str(service.place.cgroup)),
        *(("--leave-rest",) if service.leave_rest else ()),
        *("--", *service.place.argv(service.command)),
    ]
    place = Place(root / "supervise")
    with log.open("ab") as output:
        popen = subprocess.Popen(
            place.argv(supervisor),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=process.environment({"PYTHONDONTWRITEBYTECODE": "1", **service.env, **elsewhere}),
            cwd="/",
            start_new_session=True,
        )
    process.wait_joined(popen, place, log)
    wait_until(
        lambda: pid_of(service.name, paths) is not None, f"{service.name} is not started", paths, service.name, START_TIMEOUT_S
    )


def supervised(name: str, paths: Paths) -> bool:
    """Whether the supervisor of this name lives (it keeps its file locked)."""
    try:
        fd = os.open(paths.pids / f"{name}.supervisor", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def pid_of(name: str, paths: Paths) -> int | None:
    """The pid the supervisor noted last; the process may have died since."""
    try:
        return int((paths.pids / f"{name}.pid").read_text())
    except (FileNotFoundError, ValueError):
        return None


def starts_of(name: str, paths: Paths) -> int:
    try:
        return int((paths.pids / f"{name}.starts").read_text())
    except (FileNotFoundError, ValueError):
        return 0


def tail(paths: Paths, name: str, lines: int = LOG_TAIL_LINES) -> str:
    """The end of a service's log, for error messages."""
    try:
        text = (paths.logs / f"{name}.log").read_text(errors="replace")
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(line[:400] for line in text.splitlines()[-lines:])


TICK_S = 1.9  # before others say that it takes longer than two seconds


class Ticker:
    """Says every two seconds what is being waited for, so that nothing looks stuck."""

    def __init__(self, progress: Callable[[str], None], what: str) -> None:
        self._progress, self._what = progress, what
        self._began = self._said = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._said >= TICK_S:
            self._said = now
            self._progress(f"{self._what} … {now - self._began:.0f} s")


def wait_until(
    done: Callable[[], Any],
    what: str,
    paths: Paths,
    log: str,
    timeout_s: float = READY_TIMEOUT_S,
    tick: Callable[[], None] | None = None,
) -> Any:
    """Poll until `done()` is truthy. Past the time: LabError with the end of `log`."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := done():
            return value
        if time.monotonic() > deadline:
            raise LabError(
                f"{what} after {timeout_s:.0f} s; the end of {paths.logs}/{log}.log:\n{tail(paths, log)}", "see that log"
            )
        if tick is not None:
            tick()
        time.sleep(0.03)


def answers(socket: Path, path: str) -> bool:
    """Whether a GET there is answered with 200."""
    try:
        return api.request(socket, "GET", path, timeout_s=5.0)[0] == 200
    except OSError:
        return False
