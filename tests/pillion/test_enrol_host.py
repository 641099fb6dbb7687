"""An enrolment as systemd itself has it, on a host of lab/host: whose drop-in wins, what runs where, and what ends with what."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.host.container import Container
from lab.host.mesh import HostMesh, binds
from lab.pace import SLOW
from tests.conftest import SESSION
from tests.trees import PROJECT

SLICE = "/pillion.slice/pillion-workloads.slice/pillion-workloads-held.slice"
EDITED = "/etc/systemd/system/held.service.d"
MOUNT = "run-pillion-bpf.mount"


class Host:
    """held.service, and held.socket that listens for it."""

    def __init__(self, mesh: HostMesh) -> None:
        self.mesh = mesh
        mesh.container.put("/etc/systemd/system/held.socket", b"[Socket]\nListenStream=10.99.0.1:9393\n")
        mesh.unit("held", "User=daemon", "ExecStart=/usr/bin/sleep infinity")

    def systemctl(self, *words: str) -> str:
        return str(self.mesh.run(["systemctl", *words], timeout=200 * SLOW).stdout)

    def shown(self, name: str, unit: str = "held.service") -> str:
        return self.systemctl("show", "-P", name, unit).strip()

    def edit(self, name: str, *lines: str) -> None:
        self.mesh.run(["mkdir", "-p", EDITED], check=True)
        self.mesh.container.put(f"{EDITED}/{name}", "\n".join(("[Service]", *lines, "")).encode())
        self.systemctl("daemon-reload")

    def unedit(self, name: str) -> None:
        self.mesh.run(["rm", f"{EDITED}/{name}"], check=True)
        self.systemctl("daemon-reload")

    def enrol(self) -> str:
        return self.mesh.pillion("enrol", "held.service", "--as", "shop/held", check=False)

    def row(self) -> tuple[str, str]:
        report = json.loads(self.mesh.run(["pillion", "check", "--security", "-o", "json"], timeout=100 * SLOW).stdout)
        return next((each["verdict"], each["seen"]) for each in report if each["check"] == "enrolled services")

    def ready(self) -> bool:
        return self.mesh.container.active("pillion-agent", "pillion-proxy")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Container(f"{SESSION}e", print, binds(PROJECT, Path(sys.prefix))) as container:
        mesh = HostMesh(container)
        mesh.start()
        yield Host(mesh)


@pytest.mark.timeout(400 * SLOW)
def test_the_operators_drop_in_does_not_win(host: Host) -> None:
    """By `systemctl edit`, before or after; one that does win is refused, and told where it came later."""
    host.edit("override.conf", "Slice=own.slice", "NoNewPrivileges=no", "ExecCondition=", "CapabilityBoundingSet=CAP_SYS_ADMIN")
    host.systemctl("start", "held.socket", "held.service")
    assert host.shown("ControlGroup") == "/own.slice/held.service"
    assert "restarted held.socket held.service in the mesh" in host.enrol()
    assert host.shown("ControlGroup") == f"{SLICE}/held.service"
    assert (host.shown("NoNewPrivileges"), host.shown("CapabilityBoundingSet")) == ("yes", "")
    assert host.row() == ("enforced", "1, as they were enrolled")
    host.edit("zzz.conf", "Slice=own.slice", "ProtectControlGroups=no")
    assert "undoes Slice=, ProtectControlGroups= of ours" in host.enrol()
    host.systemctl("restart", "held.service")
    verdict, seen = host.row()
    assert verdict == "not enforced"
    assert "held.service runs in /own.slice/held.service, outside the mesh" in seen and "ProtectControlGroups=" in seen
    host.unedit("zzz.conf")
    host.systemctl("restart", "held.service")
    assert host.row()[0] == "enforced"


@pytest.mark.timeout(400 * SLOW)
def test_prefixes_as_systemd_shows_them(host: Host) -> None:
    host.edit(
        "prefixes.conf",
        "ExecStartPre=+/bin/true",
        "ExecStartPost=-!/bin/true",
        "ExecStartPre=!!/bin/true",
        "ExecReload=/bin/true",
    )
    assert "held.service has ExecStartPre=+/bin/true, ExecStartPost=!/bin/true: as root" in host.enrol()
    host.unedit("prefixes.conf")
    assert "is shop/held-n1" in host.enrol()


@pytest.mark.timeout(600 * SLOW)
def test_it_ends_with_the_programs_and_not_with_the_agent(host: Host) -> None:
    """Without that mount no link is left, and with it no enforcement. A restart or an upgrade leaves the mount alone."""
    host.enrol()
    host.systemctl("start", "held.socket", "held.service")
    before = host.shown("MainPID"), host.shown("ActiveEnterTimestampMonotonic", "held.socket")
    assert before[0] != "0" and host.shown("ActiveState", "held.socket") == "active"
    host.systemctl("kill", "-s", "KILL", "pillion-agent")
    host.mesh.until(host.ready, "the agent is back")
    mount = f"/usr/local/lib/systemd/system/{MOUNT}"
    host.mesh.run(["sh", "-c", f"echo '# newer' >>{mount}; systemctl daemon-reload; systemctl daemon-reexec"], check=True)
    host.mesh.until(lambda: host.systemctl("is-system-running").strip() in ("running", "degraded"), "systemd is back")
    host.systemctl("restart", "pillion-agent", "pillion-proxy")
    host.mesh.until(host.ready, "the agent is back")
    assert (host.shown("MainPID"), host.shown("ActiveEnterTimestampMonotonic", "held.socket")) == before
    host.systemctl("stop", MOUNT)
    assert (host.shown("ActiveState"), host.shown("ActiveState", "held.socket")) == ("inactive", "inactive")
    host.systemctl("start", "pillion-agent", "held.socket", "held.service")
    assert (host.shown("ActiveState"), host.shown("ControlGroup")) == ("active", f"{SLICE}/held.service")


@pytest.mark.timeout(400 * SLOW)
def test_withdrawn_from_whatever_is_left(host: Host) -> None:
    """Half of an enrolment, as a crash leaves it, and no workloads file."""
    host.enrol()
    host.mesh.run(["rm", "/etc/pillion/workloads.yaml"], check=True)
    said = host.mesh.pillion("withdraw", "--all")
    assert "held.service is out of the mesh" in said
    assert not host.mesh.run(["sh", "-c", "ls /etc/systemd/system | grep -v pillion-agent.service.d | grep pillion"]).stdout
    assert not host.mesh.run(["sh", "-c", "ls /etc/systemd/system/held.*.d | grep pillion"]).stdout
    assert host.shown("ActiveState", SLICE.rpartition("/")[2]) == "inactive"
    assert host.shown("ControlGroup") == "/own.slice/held.service"
    host.systemctl("stop", "held.socket", "held.service")
    said = host.mesh.pillion("withdraw", "--all")
    assert said == "nothing is enrolled here\n"
