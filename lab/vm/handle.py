"""One VM, running or not: commands and files in it."""

from __future__ import annotations

import io
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from lab import cgroups
from lab.state import LabError
from lab.vm.channel import Channel, ChannelLost, Peer, Sink


class VmHandle:
    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.name = str(facts["name"])
        self.number = int(facts["number"])
        self.kernel = str(facts["kernel"])
        self.release = str(facts["release"])
        self.kind = str(facts["kind"])
        self.addresses = tuple(str(address) for address in facts["addresses"])
        self._cgroup = Path(facts["cgroup"])
        self._channel = Channel(folder, self.name, self.console)

    @property
    def console(self) -> Path:
        """The log of its serial console."""
        return self.folder / "console.log"

    @property
    def running(self) -> bool:
        return cgroups.populated(self._cgroup) and not (self.folder / "exit").exists()

    def ready(self, timeout_s: float = 180.0) -> Peer:
        """Wait until it takes commands."""
        return self._channel.hello(timeout_s)

    def stream(
        self,
        argv: Sequence[str],
        *,
        input: bytes | BinaryIO | None = None,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> int:
        """Run to the end, output to the sinks as it comes. The exit code."""
        return self._channel.run(argv, input=input, timeout_s=timeout, env=env, cwd=cwd, stdout=stdout, stderr=stderr)

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str | bytes | None = None,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Like subprocess.run: output as text. Raises TimeoutExpired, CalledProcessError with `check`, ChannelLost."""
        data = input.encode() if isinstance(input, str) else input
        out, err = io.BytesIO(), io.BytesIO()
        code = self.stream(argv, input=data, timeout=timeout, env=env, cwd=cwd, stdout=out, stderr=err)
        texts = [each.getvalue().decode(errors="replace") for each in (out, err)]
        done = subprocess.CompletedProcess(list(argv), code, texts[0], texts[1])
        if check and code != 0:
            raise LabError(f"{shlex.join(argv)[:200]} in {self.name}: exit code {code}", (texts[1] or texts[0])[-1000:])
        return done

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file."""
        script = 'umask 077; mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        self.run(["sh", "-c", script, "sh", path, f"{mode:o}"], input=data, check=True)

    def get(self, path: str) -> bytes:
        """Read a file."""
        out, err = io.BytesIO(), io.BytesIO()
        if self.stream(["cat", path], stdout=out, stderr=err) != 0:
            raise LabError(f"{path} in {self.name}: {err.getvalue().decode(errors='replace').strip()}")
        return out.getvalue()

    def copy_in(self, source: Path, target: str, *, exclude: Sequence[str] = (), timeout: float = 300.0) -> None:
        """A file into the folder `target`, or a folder's content."""
        what = ["-C", str(source), "."] if source.is_dir() else ["-C", str(source.parent), source.name]
        argv = ["tar", "-c", *(f"--exclude={each}" for each in exclude), *what]
        unpack = ["sh", "-c", 'mkdir -p "$1" && exec tar -x --no-same-owner -C "$1"', "sh", target]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as tar:
            err = io.BytesIO()
            if self.stream(unpack, input=cast(BinaryIO, tar.stdout), timeout=timeout, stderr=err) != 0:
                raise LabError(f"{source} → {self.name}:{target}: {err.getvalue().decode(errors='replace')[-400:]}")
        if tar.returncode != 0:
            raise LabError(f"{source} could not be read whole (tar: {tar.returncode})")

    def copy_out(self, source: str, target: Path, *, timeout: float = 300.0) -> None:
        """A folder's content, into the folder `target`."""
        target.mkdir(parents=True, exist_ok=True)
        err = io.BytesIO()
        with subprocess.Popen(["tar", "-x", "-C", str(target)], stdin=subprocess.PIPE) as tar:
            code = self.stream(["tar", "-c", "-C", source, "."], timeout=timeout, stdout=cast(BinaryIO, tar.stdin), stderr=err)
        if code != 0 or tar.returncode != 0:
            raise LabError(f"{self.name}:{source} → {target}: {err.getvalue().decode(errors='replace')[-400:]}")

    def reboot(self, timeout_s: float = 300.0) -> Peer:
        """By systemd, and wait for the next boot. Machines alone."""
        before = self.ready().boot_id
        try:
            self.run(["systemctl", "reboot"], timeout=60)
        except ChannelLost:
            pass  # it went faster than the answer
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                peer = self.ready(max(1.0, deadline - time.monotonic()))
            except ChannelLost:
                if not self.running:
                    raise
                continue
            if peer.boot_id != before:
                return peer
            time.sleep(0.5)
        raise LabError(f"{self.name} did not come back within {timeout_s:.0f} s", f"see {self.console}")
