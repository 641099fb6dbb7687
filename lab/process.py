"""Processes inside the lab: first the cgroup, then the network namespace, then the resolver file, then the program.

The order matters: the kernel hooks go by the cgroup that *made* a socket, so a process joins its cgroup
before it can make one. Small standard tools do it (sh, nsenter, unshare, setpriv), each by exec, so the pid
that was started is the program's own.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import cgroups
from lab.pace import PATIENCE, SLOW
from lab.state import LabError

_JOIN = 'echo $$ >"$1/cgroup.procs" || exit 125; shift; exec "$@"'
_RESOLV = 'mount --bind "$1" /etc/resolv.conf || exit 125; shift; exec "$@"'
STOP_TIMEOUT_S = 5.0 * SLOW


@dataclass(frozen=True)
class Place:
    """Where a process runs. None: as the caller."""

    cgroup: Path
    netns: Path | None = None
    resolv_conf: Path | None = None

    def argv(self, command: Sequence[str], user: str | None = None) -> list[str]:
        """The command line that goes there and becomes `command`. Exit code 125: the way there failed."""
        inner = list(command)
        if user is not None:
            group = str(pwd.getpwnam(user).pw_gid)
            inner = ["setpriv", "--reuid", user, "--regid", group, "--init-groups", "--", *inner]
        if self.resolv_conf is not None:  # a private mount namespace; unmounts outside still reach it (slave)
            bind = ["/bin/sh", "-c", _RESOLV, "sh", str(self.resolv_conf)]
            inner = ["unshare", "--mount", "--propagation", "slave", "--", *bind, *inner]
        if self.netns is not None:
            inner = ["nsenter", f"--net={self.netns}", "--", *inner]
        return ["/bin/sh", "-c", _JOIN, "sh", str(self.cgroup), *inner]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's environment, with the project importable."""
    env = dict(os.environ)
    root = str(Path(__file__).resolve().parent.parent)
    others = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != root]
    env["PYTHONPATH"] = os.pathsep.join([root, *others])
    env.update(extra or {})
    return env


def run(
    place: Place,
    command: Sequence[str],
    *,
    input: str | bytes | None = None,
    timeout: float | None = 90.0,
    user: str | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = False,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end and collect output as text. Raises subprocess.TimeoutExpired (of seconds of this machine: lab.pace), and
    CalledProcessError with `check`."""
    text = input.decode() if isinstance(input, bytes) else input
    return subprocess.run(
        place.argv(command, user),
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=None if timeout is None else timeout * SLOW,
        env=environment(env),
        check=check,
        cwd=cwd,
        start_new_session=True,
    )


class Process:
    """A started process; its output goes to `log`, from `begins` on: former ones of its name wrote there too. It outlives the
    Python that started it."""

    def __init__(self, name: str, argv: Sequence[str], popen: subprocess.Popen[bytes], log: Path, begins: int) -> None:
        self.name = name
        self.argv = list(argv)  # the program's own
        self.log = log
        self._popen, self._begins = popen, begins

    @property
    def pid(self) -> int:
        return self._popen.pid

    def poll(self) -> int | None:
        """Exit code (negative: signal), None while it runs."""
        return self._popen.poll()

    @property
    def alive(self) -> bool:
        return self.poll() is None

    def output(self) -> str:
        """All it wrote so far, stdout and stderr together."""
        return self.log.read_bytes()[self._begins :].decode(errors="replace")

    def wait(self, timeout: float | None = None) -> int:
        return self._popen.wait(timeout)

    def signal(self, number: int) -> None:
        if self.alive:
            self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait. Children of the process live on; see Workload.kill for all of them."""
        self.signal(signal.SIGKILL)
        self.wait(STOP_TIMEOUT_S * PATIENCE)

    def stop(self) -> int:
        """SIGTERM, then SIGKILL. Returns the exit code."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.wait()


def start(
    place: Place,
    command: Sequence[str],
    *,
    name: str,
    log: Path,
    user: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Process:
    """Start in the background, in a session of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        begins = output.tell()
        popen = subprocess.Popen(
            place.argv(command, user),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(env),
            cwd=cwd,
            start_new_session=True,
        )
    wait_joined(popen, place, log)
    return Process(name, command, popen, log, begins)


def wait_joined(popen: subprocess.Popen[bytes], place: Place, log: Path, timeout_s: float = 5.0 * PATIENCE) -> None:
    """Until the new process is in its cgroup, so that a caller who kills the cgroup gets it too."""
    deadline = time.monotonic() + timeout_s
    while popen.pid not in cgroups.pids(place.cgroup):
        if (code := popen.poll()) is not None:
            if code == 125:
                raise LabError(f"no process could be started in {place.cgroup}: {log.read_text()[-300:]}", "is the lab up?")
            return  # a short-lived program came and went
        if time.monotonic() > deadline:
            raise LabError(f"pid {popen.pid} did not reach {place.cgroup}", f"see {log}")
        time.sleep(0.002)
