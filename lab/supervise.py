"""Keeps one program running: `python supervise.py --name agent --pids DIR --log FILE --cgroup DIR -- command …`

One supervisor for each process of the mesh, so that each dies and comes back alone. Standard library only and
imported by nobody, to start fast and stay small. Files: `<name>.pid` (the program), `<name>.supervisor` (this
process; locked while it lives), `<name>.starts` (how often it was started). Like a service manager it empties
the program's cgroup before each start: half-dead workers of the last one hold nothing the next one needs. With
`--leave-rest`, systemd's KillMode=process, what a program leaves behind goes on until the supervisor is told to stop.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import time
from pathlib import Path

BACKOFF_FIRST_S = 0.02
BACKOFF_MAX_S = 0.5
STEADY_S = 5.0  # ran this long: the next failure starts at the first backoff again
STOP_TIMEOUT_S = 5.0
LOG_BYTES_MAX = 64 << 20
_SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def next_backoff(previous_s: float, ran_s: float) -> float:
    """How long to wait before the next start, given the last wait and how long the program then ran."""
    if ran_s >= STEADY_S or previous_s == 0.0:
        return BACKOFF_FIRST_S
    return min(previous_s * 2, BACKOFF_MAX_S)


class Supervisor:
    def __init__(
        self, name: str, pids: Path, log: Path, cgroup: Path | None, command: list[str], leave_rest: bool = False
    ) -> None:
        self.name, self.pids, self.log, self.cgroup, self.command = name, pids, log, cgroup, command
        self.leave_rest = leave_rest
        self.starts = 0
        self.stopping = False

    def take_lock(self) -> bool:
        """False if another supervisor of this name lives."""
        self.lock = os.open(self.pids / f"{self.name}.supervisor", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, f"{os.getpid()}\n".encode(), 0)
        return True

    def note(self, suffix: str, text: str) -> None:
        temporary = self.pids / f".{self.name}.{suffix}"
        temporary.write_text(text + "\n")
        temporary.replace(self.pids / f"{self.name}.{suffix}")

    def say(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(f'{{"event": "{text}", "logger": "supervise", "timestamp": {time.time():.3f}}}\n')

    def empty_cgroup(self) -> None:
        if self.cgroup is None:
            return
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while "populated 1" in (self.cgroup / "cgroup.events").read_text() and time.monotonic() < deadline:
            (self.cgroup / "cgroup.kill").write_text("1")
            time.sleep(0.002)

    def start(self) -> int:
        if not self.leave_rest:
            self.empty_cgroup()
        out = (os.POSIX_SPAWN_OPEN, 1, str(self.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
        pid = os.posix_spawnp(
            self.command[0],
            self.command,
            os.environ,
            file_actions=[null, out, (os.POSIX_SPAWN_DUP2, 1, 2)],
            setsigmask=[],
            setpgroup=0,
        )
        self.starts += 1
        self.note("pid", str(pid))
        self.note("starts", str(self.starts))
        return pid

    def wait(self, pid: int) -> int:
        """Until the program ends; passes SIGTERM on. Returns its exit code."""
        kill_at = float("inf")
        while True:
            caught = signal.sigtimedwait(_SIGNALS, 1.0)
            if caught is not None and caught.si_signo in (signal.SIGTERM, signal.SIGINT):
                self.stopping = True
                kill_at = time.monotonic() + STOP_TIMEOUT_S
                os.kill(pid, signal.SIGTERM)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > kill_at:
                os.kill(pid, signal.SIGKILL)
            if self.log.stat().st_size > LOG_BYTES_MAX:
                os.truncate(self.log, 0)  # writers append, so they go on at the start

    def pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            caught = signal.sigtimedwait(_SIGNALS, left)
            if caught is not None and caught.si_signo in (signal.SIGTERM, signal.SIGINT):
                self.stopping = True
                return

    def run(self) -> int:
        if not self.take_lock():
            return 0
        backoff = 0.0
        while True:
            began = time.monotonic()
            code = self.wait(self.start())
            if self.stopping:
                self.empty_cgroup()
                return 0
            ran = time.monotonic() - began
            backoff = next_backoff(backoff, ran)
            self.say(f"{self.name} ended with {code} after {ran:.1f} s, starting again in {backoff:.2f} s")
            self.pause(backoff)
            if self.stopping:
                return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="supervise", description="keeps one program running")
    parser.add_argument("--name", required=True)
    parser.add_argument("--pids", type=Path, required=True, help="folder for pid files")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--cgroup", type=Path, help="the program's cgroup, emptied before each start")
    parser.add_argument("--leave-rest", action="store_true", help="do not empty it")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command after --")
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    return Supervisor(options.name, options.pids, options.log, options.cgroup, command, options.leave_rest).run()


if __name__ == "__main__":
    sys.exit(main())
