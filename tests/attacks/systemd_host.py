"""A host with systemd (lab/host) whose services are attacked: by services of it, enrolled as its operator would enrol them. The
attacks' red twins run on the same host: what is patched is `pillion enrol` and what it writes, so it is run from another tree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.host.container import Container
from lab.host.mesh import SOURCE, VENV, HostMesh, binds
from lab.pace import SLOW
from tests.attacks import mutants
from tests.attacks.actions import PROGRAMS
from tests.attacks.mutants import Mutant, mutated
from tests.conftest import SESSION, opened
from tests.e2e.mesh import HTTP_PORT, nginx, policy, service, total
from tests.trees import PROJECT

GROUP = "hosts"  # of mutants: their trees are not run as a lab
OUT = "/srv/out"
VICTIM = "/sys/fs/cgroup/pillion.slice/pillion-workloads.slice/pillion-workloads-victim.slice"
CAPLESS_ROOT = ("CapabilityBoundingSet=",)


@dataclass(frozen=True)
class Outcome:
    refused: str  # by `pillion enrol`; then nothing ran
    error: str = ""  # of the step
    status: str = ""  # what web said to whoever asked in the end


class Host:
    """web, whom `client` may ask; victim, which is `client`; and attackers, which are `intruder`."""

    def __init__(self, mesh: HostMesh, trees: Path) -> None:
        self.mesh, self.trees = mesh, trees
        mesh.container.put("/srv/nginx.conf", nginx(Path("/run/web"), "hello").encode())
        mesh.container.put("/srv/as_service.py", (PROGRAMS / "as_service.py").read_bytes())
        mesh.run(["sh", "-c", f"mkdir -m 0777 {OUT}; useradd -r shopper; useradd -r stranger"], check=True)
        mesh.unit("web", "DynamicUser=yes", "RuntimeDirectory=web", "ExecStart=/usr/sbin/nginx -c /srv/nginx.conf -e stderr")
        mesh.unit("victim", "User=shopper", self._runs("hold", "-"))
        mesh.pillion("enrol", "web.service", "--as", "shop/web", "--port", str(HTTP_PORT))
        mesh.pillion("enrol", "victim.service", "--as", "shop/client")
        mesh.apply(service("web", "web", 80, "http", HTTP_PORT) + policy("web", "web"))
        mesh.run(["systemctl", "start", "web", "victim"], check=True, timeout=120 * SLOW)
        mesh.until(lambda: self.answer("hold"), "the victim has its connection")

    @staticmethod
    def _runs(step: str, argument: str) -> str:
        return f"ExecStart=/usr/bin/python3 /srv/as_service.py {OUT} {step} {argument}"

    def answer(self, step: str) -> dict[str, Any]:
        done = self.mesh.run(["cat", f"{OUT}/{step}.json"])
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def denied(self) -> float:
        done = self.mesh.run(["curl", "-s", "--unix-socket", "/run/pillion/agent.sock", "http://agent/metrics"], check=True)
        return total(done.stdout, "pillion_denied_total", {"reason": "policy_denied"})

    def pillion(self, code: Path | None, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
        """`pillion` of the tree ``code``, or of ours; after the line of shell ``before``."""
        script = f'{before}\nexec env PYTHONPATH={code or SOURCE} {VENV}/bin/python -m pillion "$@"'
        return self.mesh.run(["bash", "-c", script, "bash", *arguments], timeout=200 * SLOW)

    def without(self, mutant: Mutant) -> Path:
        """A tree without this defence, in there."""
        name = str(mutants.ALL.index(mutant))
        if not (self.trees / name).exists():
            mutated(self.trees / name, [mutant])
        return Path("/srv/mutants", name)

    def attack(self, step: str, argument: str, *lines: str, code: Path | None = None, more: Sequence[str] = ()) -> Outcome:
        """By a new service that this `pillion` enrols, with --force where it runs as root, and with ``more`` options."""
        self.mesh.unit("attacker", "Type=oneshot", *lines, self._runs(step, argument))
        force = () if any(line.startswith("User=") for line in lines) else ("--force",)
        done = self.pillion(code, "enrol", "attacker.service", "--as", "shop/intruder", *force, *more)
        try:
            if done.returncode:
                return Outcome(done.stderr)
            self.mesh.run(["systemctl", "start", "attacker"], timeout=200 * SLOW)
            return Outcome("", **self.answer(step))
        finally:
            self.mesh.pillion("withdraw", "attacker.service")
            self.mesh.run(["rm", "-f", f"{OUT}/{step}.json"])


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    trees = opened(tmp_path_factory.mktemp("hosts"))
    seen = {**binds(PROJECT, Path(sys.prefix)), "/srv/mutants": trees}
    with Container(f"{SESSION}h", print, seen) as container:
        mesh = HostMesh(container)
        mesh.start()
        yield Host(mesh, trees)
