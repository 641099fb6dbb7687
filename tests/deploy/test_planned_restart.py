"""What systemd makes of a proxy whose workers outlive it: only a host with systemd shows that. By its units, on a host of
lab/host; the stream is opaque TCP that goes through the proxy, checked byte by byte."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.host.container import Container
from lab.host.mesh import SOURCE, VENV, HostMesh, binds
from lab.pace import SLOW
from tests.conftest import SESSION
from tests.e2e.mesh import ECHO_PORT, PROGRAMS, policy, service, total

PROJECT = Path(__file__).resolve().parents[2]
PROXY = "pillion-proxy"
SAID, PID = "/srv/said", "/srv/pid"


class Host:
    def __init__(self, mesh: HostMesh) -> None:
        self.mesh = mesh
        for name in ("echo.py", "lasting.py"):
            mesh.container.put(f"/srv/{name}", (PROGRAMS / name).read_bytes())
        stream = f"echo $$ >{PID}; exec /usr/bin/python3 /srv/lasting.py tcp raw.shop.mesh {ECHO_PORT} >{SAID} 2>/dev/null\n"
        mesh.container.put("/srv/stream", stream.encode())
        mesh.unit("echo", "DynamicUser=yes", f"ExecStart=/usr/bin/python3 /srv/echo.py {ECHO_PORT}")
        mesh.pillion("enrol", "echo.service", "--as", "shop/echo", "--port", str(ECHO_PORT))
        raw = service("raw", "echo", ECHO_PORT, "tcp").replace(", appProtocol: tcp", "")  # not native: it might be HTTP
        mesh.apply(raw + policy("echo", "echo"))
        mesh.run(["systemctl", "start", "echo"], check=True, timeout=120 * SLOW)

    def systemctl(self, *words: str) -> str:
        return str(self.mesh.run(["systemctl", *words, PROXY], check=True, timeout=120 * SLOW).stdout)

    def processes(self) -> set[int]:
        """All of the unit."""
        text = self.mesh.run(["cat", f"/sys/fs/cgroup/pillion.slice/{PROXY}.slice/{PROXY}.service/cgroup.procs"]).stdout
        return {int(pid) for pid in text.split()}

    def restart(self) -> set[int]:
        """By plan. The former main process is gone at once; its workers, if they still are there."""
        former = self.processes()
        main = int(self.systemctl("show", "-P", "MainPID"))
        self.systemctl("restart")
        assert main not in self.processes()
        self.mesh.until(self.ready, "the new generation serves")
        return former - {main}

    def again(self, old: int) -> bool:
        """Whether another agent is ready."""
        return int(self.mesh.run(["systemctl", "show", "-P", "MainPID", "pillion-agent"]).stdout) not in (0, old) and self.ready()

    def ready(self) -> bool:
        return self.curl("/v1/ready").returncode == 0

    def curl(self, path: str) -> Any:
        return self.mesh.run(["curl", "-sf", "--unix-socket", "/run/pillion/agent.sock", f"http://agent{path}"])

    def cut(self) -> float:
        return total(self.curl("/metrics").stdout, "pillion_agent_events_total", {"kind": "proxy_drain_cut"})

    def stream(self) -> None:
        """Begins one."""
        self.mesh.run(["rm", "-f", SAID, PID])
        run = ["/usr/local/bin/pillion", "run", "-n", "shop", "--service", "client", "--", "sh", "/srv/stream"]
        self.mesh.run(["systemd-run", "-q", "--collect", "--setenv=HOME=/root", *run], check=True)
        self.mesh.until(lambda: self.said().startswith("begun"), "the stream begins")

    def said(self) -> str:
        return str(self.mesh.run(["cat", SAID]).stdout)

    def ended(self, *, asked: bool = True) -> dict[str, Any]:
        """Its report, when it has been asked to end, or by itself."""
        if asked:
            self.mesh.run(["sh", "-c", f"kill $(cat {PID})"], check=True)
        self.mesh.until(lambda: "}" in self.said(), "the stream ends")
        return dict(json.loads(self.said().splitlines()[-1]))


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Container(f"{SESSION}r", print, binds(PROJECT, Path(sys.prefix))) as container:
        mesh = HostMesh(container)
        mesh.start()
        yield Host(mesh)


@pytest.mark.timeout(240 * SLOW)
def test_a_restart_cuts_nothing(host: Host) -> None:
    """And systemd lets who was left behind go on, in the unit's cgroup, until it ends by itself."""
    host.stream()
    former = host.restart()
    assert former and former <= host.processes()
    host.restart()  # while the first one still drains
    assert former <= host.processes()
    report = host.ended()
    assert report["error"] == "" and report["bytes"] > 0, report
    host.mesh.until(lambda: not host.processes() & former, "the former generation ends")
    assert host.cut() == 0


@pytest.mark.timeout(240 * SLOW)
def test_a_stop_takes_nothing_new_and_a_kill_ends_the_rest(host: Host) -> None:
    host.stream()
    before = host.processes()
    host.systemctl("stop")
    assert host.mesh.run(["systemctl", "is-active", PROXY]).stdout.strip() == "inactive"
    left = host.processes()
    assert left and left < before
    host.systemctl("kill", "-s", "TERM")
    host.mesh.until(lambda: not host.processes(), "what was left ends")
    assert host.ended(asked=False)["error"]
    host.systemctl("start")
    host.mesh.until(host.ready, "it serves again")


@pytest.mark.timeout(240 * SLOW)
def test_at_the_limit_it_is_cut_and_counted(host: Host) -> None:
    host.mesh.container.put("/etc/pillion/proxy.env", b"PILLION_PROXY_OPTIONS=--workers 1 --drain-limit-s 3\n")
    host.restart()
    cut = host.cut()
    host.stream()
    former = host.restart()
    assert host.ended(asked=False)["error"]
    host.mesh.until(lambda: not host.processes() & former, "the former generation ends")
    assert host.cut() == cut + 1


KNOCKER = f"""
import json, os, socket, time
where = socket.getaddrinfo("raw.shop.mesh", {ECHO_PORT}, type=socket.SOCK_STREAM)[0][4][:2]
whole, errors = 0, []
while True:
    try:
        with socket.create_connection(where, timeout={60 * SLOW}) as sock:
            sock.sendall(b"x")
            while not sock.recv(100).endswith(b"x"):
                pass
        whole += 1
    except OSError as error:
        errors.append(repr(error))
    with open("{SAID}.new", "w") as file:
        json.dump([whole, errors], file)
    os.rename("{SAID}.new", "{SAID}")
    time.sleep(0.02)
"""


@pytest.mark.timeout(240 * SLOW)
def test_while_agent_and_proxy_are_both_killed_new_connections_wait(host: Host) -> None:
    """The service manager has the listeners, and gives them to the next agent."""
    host.mesh.container.put("/srv/knocker.py", KNOCKER.encode())
    host.mesh.run(["rm", "-f", SAID])
    run = ["/usr/local/bin/pillion", "run", "-n", "shop", "--service", "client", "--", "/usr/bin/python3", "/srv/knocker.py"]
    host.mesh.run(["systemd-run", "-q", "--collect", "--unit=knocker", "--setenv=HOME=/root", *run], check=True)

    def knocks() -> tuple[int, list[str]]:
        whole, errors = json.loads(host.said() or "[0, []]")
        return int(whole), list(errors)

    host.mesh.until(lambda: knocks()[0] > 5, "it knocks")
    before = int(host.mesh.run(["systemctl", "show", "-P", "MainPID", "pillion-agent"], check=True).stdout)
    host.mesh.run(["systemctl", "kill", "-s", "KILL", "pillion-agent", PROXY], check=True)
    host.mesh.until(lambda: host.again(before), "both are back")
    at = knocks()[0]
    host.mesh.until(lambda: knocks()[0] > at + 20, "it is answered again")
    _, errors = knocks()
    host.mesh.run(["systemctl", "stop", "knocker"])
    assert not [error for error in errors if "Refused" in error], errors[:5]
    assert len(errors) <= 1, errors[:5]  # what was open at that moment


def test_systemd_lets_the_proxy_come_first(host: Host) -> None:
    """As the slices say; and as it says itself, by a call that its sandbox refuses unless the unit names it."""
    slices = [f"pillion{each}.slice" for each in ("", "-agent", "-proxy")]
    shown = host.mesh.run(["systemctl", "show", "-P", "CPUWeight", *slices])
    assert shown.stdout.split() == ["400", "200", "1000"]
    code = "from l7proxy.scheduling import *; assert patient() and LoopThread().crowd(True) and any(ran_and_waited())"
    own = ("Type=", "WatchdogSec=", "Restart=", "Slice=", "EnvironmentFile=", "ExecStart=", "RuntimeDirectory=")
    unit = (PROJECT / f"deploy/systemd/{PROXY}.service").read_text().partition("[Service]\n")[2].partition("[Install]")[0]
    sandbox = [line for line in unit.splitlines() if not line.startswith(own)]
    runs = (f'ExecStart={VENV}/bin/python -c "{code}"', f"Environment=PYTHONPATH={SOURCE} PYTHONDONTWRITEBYTECODE=1")
    assert sum("sched_setattr" in line for line in sandbox if not line.startswith("#")) == 1
    closed = [line.replace(" sched_setattr", "") for line in sandbox]
    for name, lines, fails in (("told", sandbox, False), ("untold", closed, True)):
        host.mesh.unit(name, "Type=oneshot", *runs, *lines)
        done = host.mesh.run(["systemctl", "start", name])
        log = host.mesh.run(["journalctl", "-u", name, "-o", "cat", "-n", "20"]).stdout
        assert bool(done.returncode) == fails and ("AssertionError" in log) == fails, log


def test_the_unit_is_for_that() -> None:
    unit = (PROJECT / f"deploy/systemd/{PROXY}.service").read_text().splitlines()
    assert "KillMode=process" in unit and "RuntimeDirectoryPreserve=yes" in unit
    assert any(" --drain-limit-s 600 " in line for line in unit if line.startswith("ExecStart="))
