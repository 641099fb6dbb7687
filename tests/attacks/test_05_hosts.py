"""security.md 5 on a host with systemd: sockets made for a service by the service manager, or handed to `pillion run` by who
starts it. No hook saw them being made, and none ever runs for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.pace import SLOW
from tests.attacks.actions import PROGRAMS
from tests.attacks.mutants import Mutant
from tests.attacks.systemd_host import GROUP, Host
from tests.e2e.mesh import total

SOCKETS_LEFT_OUT = Mutant(
    GROUP,
    "a service's .socket units go with it",
    (
        "pillion/enrol.py",
        "    sockets = sockets_of(unit, known)\n",
        "    sockets: list[str] = []\n",
    ),
)
INHERITED = Mutant(
    GROUP,
    "pillion run closes what it was given",
    ("pillion/run.py", "        os.closerange(3, failure)\n", ""),
    ("pillion/run.py", '        os.closerange(max(failure, low) + 1, os.sysconf("SC_OPEN_MAX"))\n', ""),
)
ADDRESS = "10.99.0.1"
OUTSIDE_PORT, STORE_PORT = 9191, 9090
# What the shell opens, before pillion runs, is made outside the mesh: by nobody of it
OPENED = f"exec 7<>/dev/tcp/{ADDRESS}/{OUTSIDE_PORT}"
SAY = "import os; os.write(7, b'GET / HTTP/1.0\\r\\n\\r\\n'); print(os.read(7, 20))"


def from_outside(host: Host, code: Path | None = None) -> str:
    """What somebody outside the mesh gets from a service that the service manager listens for."""
    container = host.mesh.container
    container.put("/srv/listen.py", (PROGRAMS / "listen.py").read_bytes())
    container.put("/etc/systemd/system/store.socket", f"[Socket]\nListenStream={ADDRESS}:{STORE_PORT}\n".encode())
    host.mesh.unit("store", "User=stranger", "ExecStart=/usr/bin/python3 /srv/listen.py")
    try:
        done = host.pillion(code, "enrol", "store.service", "--as", "shop/store", "--port", str(STORE_PORT))
        assert done.returncode == 0, done.stderr
        host.mesh.run(["systemctl", "start", "store.socket"], check=True, timeout=120 * SLOW)
        asked = host.mesh.run(["curl", "-s", "-m", "4", f"http://{ADDRESS}:{STORE_PORT}/"], timeout=60 * SLOW)
        return asked.stdout
    finally:
        host.mesh.run(["systemctl", "stop", "store.socket", "store.service"], timeout=120 * SLOW)
        host.mesh.pillion("withdraw", "store.service")
        host.mesh.run(["rm", "-f", "/etc/systemd/system/store.socket"])


def dropped(host: Host) -> float:
    done = host.mesh.run(["curl", "-s", "--unix-socket", "/run/pillion/agent.sock", "http://agent/metrics"], check=True)
    return total(done.stdout, "pillion_datapath_total", {"reason": "ingress_plaintext"})


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.attack("a listener the service manager made")
def test_a_socket_unit_is_enrolled_with_its_service(host: Host, request: pytest.FixtureRequest) -> None:
    before = dropped(host)
    assert from_outside(host) == ""
    assert dropped(host) > before
    request.node.user_properties.append(("reason", "ingress_plaintext"))


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.red("a listener the service manager made", SOCKETS_LEFT_OUT)
def test_a_socket_unit_left_out_is_open_to_all_without(host: Host) -> None:
    assert from_outside(host, host.without(SOCKETS_LEFT_OUT)) == "hello\n"


def inherited(host: Host, code: Path | None = None) -> str:
    """What a program of `pillion run` gets on a connection that its starter had open to somewhere outside the mesh."""
    host.mesh.run(["systemd-run", "-q", "--unit=outside", "python3", "-m", "http.server", "--bind", ADDRESS, str(OUTSIDE_PORT)])
    listens = ["bash", "-c", f"exec 7<>/dev/tcp/{ADDRESS}/{OUTSIDE_PORT}"]
    host.mesh.until(lambda: host.mesh.run(listens).returncode == 0, "somebody outside listens")
    try:
        done = host.pillion(
            code, "run", "-n", "shop", "--service", "intruder", "--", "/usr/bin/python3", "-c", SAY, before=OPENED
        )
        return done.stdout + done.stderr
    finally:
        host.mesh.run(["systemctl", "stop", "outside"], timeout=60 * SLOW)


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.attack("a socket its starter left open")
def test_pillion_run_hands_on_no_socket(host: Host) -> None:
    assert "Bad file descriptor" in inherited(host)


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.red("a socket its starter left open", INHERITED)
def test_pillion_run_hands_it_on_without(host: Host) -> None:
    assert "HTTP/1.0 200" in inherited(host, host.without(INHERITED))
