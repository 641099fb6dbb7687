"""What systemd makes of a proxy whose workers outlive it: only a host with systemd shows that. By its units, on a host of
lab/host; the stream is opaque TCP that goes through the proxy, checked byte by byte."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.host.container import Container
from lab.host.mesh import READY_S, SOURCE, VENV, HostMesh, binds
from lab.pace import SLOW
from lab.state import LabError
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


# Its report is another at each step, so that it shows where it stands. A connection that was open when its proxy was killed ends
# by FIN where the proxy had read all, else by RST.
KNOCKER = f"""
import json, os, socket, time
whole, errors, stage, since = 0, [], "resolves", time.monotonic()

def enter(what):
    global stage, since
    stage, since = what, time.monotonic()
    with open("{SAID}.new", "w") as file:
        json.dump([whole, errors[:20], stage, since], file)
    os.rename("{SAID}.new", "{SAID}")

where = socket.getaddrinfo("raw.shop.mesh", {ECHO_PORT}, type=socket.SOCK_STREAM)[0][4][:2]
while True:
    try:
        enter("connects")
        with socket.create_connection(where, timeout={2 * READY_S}) as sock:
            enter("is open")
            sock.sendall(b"x")
            said = b""
            while not said.endswith(b"x"):
                more = sock.recv(100)
                if not more:
                    raise EOFError(f"after {{said!r}}")
                said += more
        whole += 1
    except (OSError, EOFError) as error:
        errors.append([stage, since, repr(error)])
    enter("pauses")
    time.sleep(0.02)
"""


class Knocker:
    """A workload that makes one connection after another, each of one exchange."""

    def __init__(self, host: Host) -> None:
        self.host = host
        host.mesh.container.put("/srv/knocker.py", KNOCKER.encode())
        host.mesh.run(["rm", "-f", SAID])
        run = ["/usr/local/bin/pillion", "run", "-n", "shop", "--service", "client", "--", "/usr/bin/python3", "/srv/knocker.py"]
        host.mesh.run(["systemd-run", "-q", "--collect", "--unit=knocker", "--setenv=HOME=/root", *run], check=True)

    def look(self) -> tuple[int, list[tuple[str, float, str]], str, float]:
        """How many were whole; of those that failed the stage, since when, and the error; its stage now, since when."""
        whole, errors, stage, since = json.loads(self.host.said() or '[0, [], "starts", 0]')
        return whole, [(at, began, error) for at, began, error in errors], stage, since

    def until(self, done: Callable[[], object], what: str) -> None:
        try:
            self.host.mesh.until(done, what)
        except LabError as error:
            whole, errors, stage, since = self.look()
            stands = f"{whole} whole, {stage} for {time.monotonic() - since:.1f} s, errors {errors}"
            raise LabError(f"{error.what}; the knocker: {stands}", error.remedy) from None

    def until_answered(self, what: str, count: int) -> None:
        """So many more."""
        before = self.look()[0]
        self.until(lambda: self.look()[0] > before + count, what)

    def hangs(self) -> bool:
        """Its connection is open, and is not answered."""
        _, _, stage, since = self.look()
        return stage == "is open" and time.monotonic() - since > 1


@pytest.mark.timeout(240 * SLOW)
def test_while_agent_and_proxy_are_both_killed_new_connections_wait(host: Host) -> None:
    """The service manager has the listeners, and gives them to the next agent. What was open is lost, and hears of it."""
    knocker = Knocker(host)
    knocker.until_answered("it knocks", 5)
    host.mesh.run(["systemctl", "kill", "-s", "STOP", "echo"], check=True)  # so that one is open at that moment
    knocker.until(knocker.hangs, "one is open")
    before = int(host.mesh.run(["systemctl", "show", "-P", "MainPID", "pillion-agent"], check=True).stdout)
    host.mesh.run(["systemctl", "kill", "-s", "KILL", "pillion-agent", PROXY], check=True)
    killed = time.monotonic()
    host.mesh.run(["systemctl", "kill", "-s", "CONT", "echo"], check=True)
    knocker.until(lambda: host.again(before), "both are back")
    knocker.until_answered("it is answered again", 20)
    _, errors, *_ = knocker.look()
    host.mesh.run(["systemctl", "stop", "knocker"])
    assert [stage for stage, *_ in errors] == ["is open"] and errors[0][1] < killed, (errors, killed)


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
