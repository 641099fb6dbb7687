"""A host for whole systems, in namespaces (lab/host) or in a VM (lab/vm): commands and files in it."""

from __future__ import annotations

import io
import shlex
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from lab.state import LabError


class Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


class Machine(ABC):
    name: str
    addresses: tuple[str, ...]

    @abstractmethod
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
        """Run to the end, output to the sinks. The exit code. Raises TimeoutExpired, LabError if the machine is lost."""

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
        """Like subprocess.run: output as text. Raises what `stream` raises, LabError with `check`."""
        data = input.encode() if isinstance(input, str) else input
        out, err = io.BytesIO(), io.BytesIO()
        code = self.stream(argv, input=data, timeout=timeout, env=env, cwd=cwd, stdout=out, stderr=err)
        texts = [each.getvalue().decode(errors="replace") for each in (out, err)]
        if check and code != 0:
            raise LabError(f"{shlex.join(argv)[:200]} in {self.name}: exit code {code}", (texts[1] or texts[0])[-1000:])
        return subprocess.CompletedProcess(list(argv), code, texts[0], texts[1])

    def active(self, *units: str) -> bool:
        """All of them: systemctl's own exit code is 0 for any."""
        return set(self.run(["systemctl", "is-active", *units], timeout=120).stdout.split()) == {"active"}

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file."""
        script = 'mkdir -p "$(dirname "$1")" && umask 077 && cat >"$1" && chmod "$2" "$1"'
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
