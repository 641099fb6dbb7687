"""One VM, running or not."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lab import cgroups
from lab.machine import Machine, Sink
from lab.state import LabError
from lab.vm.channel import Channel, ChannelLost, Peer


class VmHandle(Machine):
    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.name = str(facts["name"])
        self.number = int(facts["number"])
        self.kernel = str(facts["kernel"])
        self.release = str(facts["release"])
        self.kind = str(facts["kind"])
        self.addresses = tuple(str(address) for address in facts["addresses"])
        self.cgroup = Path(facts["cgroup"])
        self._channel = Channel(folder, self.name, self.console)

    @property
    def console(self) -> Path:
        """The log of its serial console."""
        return self.folder / "console.log"

    @property
    def running(self) -> bool:
        return cgroups.populated(self.cgroup) and not (self.folder / "exit").exists()

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
        """Output comes to the sinks as it is written. Raises ChannelLost."""
        return self._channel.run(argv, input=input, timeout_s=timeout, env=env, cwd=cwd, stdout=stdout, stderr=stderr)

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
