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
OWN = "/etc/systemd/system/asks.service.d/own.conf"
RESOLVED = "/run/systemd/resolve"
CONFS = f"{RESOLVED}/stub-resolv.conf {RESOLVED}/resolv.conf"
DAEMONS = f"{RESOLVED}/io.systemd.Resolve /run/nscd/socket /run/avahi-daemon/socket"
SERVES = """
import os, select, socket, sys
*confs, sockets = sys.argv[1:3] + [sys.argv[3:]]
there = []
for path in confs:
    with open(f"{path}.new", "w") as file:
        file.write("nameserver 127.0.0.53")
    os.rename(f"{path}.new", path)
for path in sockets:
    if os.path.exists(path):
        os.unlink(path)
    there.append(socket.socket(socket.AF_UNIX))
    there[-1].bind(path)
    os.chmod(path, 0o666)
    there[-1].listen()
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
    manager.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
while True:
    for each in select.select(there, [], [])[0]:
        each.accept()[0].close()
"""
ASKS = """
import json, socket, sys
*confs, sockets = sys.argv[1:3] + [sys.argv[3:]]
out = {"answered": [], "read": []}
for path in sockets:
    try:
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.connect(path)
        out["answered"].append(path)
    except OSError:
        pass
for path in confs:
    try:
        with open(path) as file:
            out["read"] += [path] if "nameserver" in file.read() else []
    except OSError:
        pass
print(json.dumps(out))
"""
# As systemd-resolved's unit has it: the folder outlives a restart, the sockets in it do not
RESOLVER = (
    "Type=notify", "User=daemon", "RuntimeDirectory=systemd/resolve nscd avahi-daemon", "RuntimeDirectoryPreserve=yes",
    f"ExecStart=/usr/bin/python3 /srv/resolver.py {CONFS} {DAEMONS}",
)  # fmt: skip


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

    def row(self, check: str = "enrolled services") -> tuple[str, str]:
        report = json.loads(self.mesh.run(["pillion", "check", "--security", "-o", "json"], timeout=100 * SLOW).stdout)
        return next((each["verdict"], each["seen"]) for each in report if each["check"] == check)

    def ready(self) -> bool:
        return self.mesh.container.active("pillion-agent", "pillion-proxy")


class Asks:
    """asks.service, enrolled, and a stand-in for the daemons that answer for names by a socket of the file system."""

    def __init__(self, host: Host) -> None:
        self.host, self.mesh = host, host.mesh
        host.systemctl("stop", "held.socket", "held.service")  # the folders are made for it, too
        self.mesh.run(["rm", "-rf", *(path.rpartition("/")[0] for path in DAEMONS.split())], check=True)
        self.mesh.container.put("/srv/resolver.py", SERVES.encode())
        self.mesh.unit("resolver", *RESOLVER)
        # It is up when it runs in a file system of its own
        self.mesh.unit("asks", "Type=exec", "User=games", "ExecStart=/usr/bin/sleep infinity")
        self.mesh.pillion("enrol", "asks.service", "--as", "shop/asks")

    def start(self, unit: str) -> None:
        self.mesh.run(["systemctl", "restart", unit], check=True, timeout=200 * SLOW)

    def answers(self, inside: bool = True) -> tuple[list[str], list[str]]:
        """Which of the daemons answer, which of the files are read: by its user in its file system, or on the host."""
        enter = ["nsenter", "-t", self.host.shown("MainPID", "asks.service"), "-m"] if inside else []
        user = ["setpriv", "--reuid=games", "--regid=games", "--clear-groups"]
        argv = [*enter, *user, "/usr/bin/python3", "-c", ASKS, *CONFS.split(), *DAEMONS.split()]
        said = json.loads(self.mesh.run(argv, check=True).stdout)
        return said["answered"], said["read"]

    def withdraw(self) -> None:
        self.mesh.pillion("withdraw", "asks.service")
        self.mesh.run(["systemctl", "stop", "asks", "resolver"], check=True)
        self.mesh.run(["rm", "-f", OWN], check=True)
        self.host.systemctl("start", "held.socket", "held.service")


@pytest.fixture
def asks(host: Host) -> Iterator[Asks]:
    made = Asks(host)
    yield made
    made.withdraw()


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
def test_no_daemon_resolves_past_the_meshs_dns(asks: Asks) -> None:
    """Whether it was there before the service, came later, or came back with a new socket. resolv.conf stays to be read."""
    asks.start("asks")
    assert asks.answers() == ([], [])
    for _ in range(2):
        asks.start("resolver")
        assert asks.answers(inside=False) == (DAEMONS.split(), CONFS.split())
        assert asks.answers() == ([], [])
    asks.start("asks")
    assert asks.answers() == ([], CONFS.split())
    asks.start("resolver")
    assert asks.answers(inside=False)[0] == DAEMONS.split()
    assert asks.answers() == ([], CONFS.split())
    assert (asks.host.row()[0], asks.host.row("service managers")[0]) == ("enforced", "enforced")


@pytest.mark.timeout(400 * SLOW)
@pytest.mark.parametrize("bound", [True, False], ids=["bound back", "a new folder"])
def test_a_daemon_in_reach_is_told(asks: Asks, bound: bool) -> None:
    """By neither is a line of ours undone, so it is seen by who runs."""
    asks.start("resolver")
    if bound:
        asks.mesh.container.put(OWN, f"[Service]\nBindPaths={RESOLVED}\n".encode())
        asks.host.systemctl("daemon-reload")
    asks.start("asks")
    if not bound:
        asks.mesh.run(["rm", "-r", RESOLVED], check=True)
        asks.start("resolver")
    assert asks.answers()[0] == DAEMONS.split()[:1]
    verdict, seen = asks.host.row("service managers")
    assert verdict == "not enforced" and "shop/asks-n1" in seen and seen.endswith(f" reaches {DAEMONS.split()[0]}")


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
