"""kill -9 of each process under load: what is open goes on, what is new is served, and both stay policed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.mesh import ECHO_PORT, Mesh, Refused, until

READY_S, LOG_LINES = 120.0, 12
HELD_S = 2.0  # at least: 20 ms a round


def kill(mesh: Mesh, node: str | None, what: str, number: signal.Signals = signal.SIGKILL) -> None:
    victims = mesh.lab.pids(node, what)
    assert victims
    for pid in victims:
        os.kill(pid, number)
    until(lambda: (now := mesh.lab.pids(node, what)) and not set(now) & set(victims), f"{what} did not come back")


def ready(mesh: Mesh) -> None:
    """It takes what a start takes, some seconds of a CPU for compiling: on a busy machine as long as that lasts."""
    for node in ("n1", "n2"):
        try:
            until(lambda node=node: mesh.lab.answers(node, "/v1/ready"), f"{node} is not ready again", READY_S)
        except AssertionError as error:
            log = mesh.lab.log(f"{node}-agent").read_text().splitlines()[-LOG_LINES:]
            status = mesh.lab.agent_api(node, "GET", "/v1/status") if mesh.lab.answers(node, "/v1/status") else "no answer"
            raise AssertionError("\n".join([f"{error}: {status}", *log])) from None


def native_never_notices(mesh: Mesh, node: str | None, what: str) -> None:
    """From before it to when all is ready again."""
    holder = mesh.program("client", "hold.py", "echo.shop.mesh", ECHO_PORT, 2 * READY_S)
    assert holder.first_line().startswith("open")
    began = time.monotonic()
    kill(mesh, node, what)
    ready(mesh)
    until(lambda: time.monotonic() > began + HELD_S, "")
    holder.popen.terminate()
    report = holder.report(timeout_s=20)
    assert report["error"] == ""
    assert report["rounds"] > 50


@pytest.mark.parametrize("what", ["agent", "proxy-worker", "proxy", "controller"])
def test_native_connections_never_notice(mesh: Mesh, what: str) -> None:
    native_never_notices(mesh, None if what == "controller" else "n1", what)


def waits(mesh: Mesh) -> dict[int, float]:
    """Seconds that each process of n1's mesh has waited for a CPU so far: a busy machine's doing, not the mesh's."""
    found = {}
    for pid in [pid for what in ("agent", "proxy", "proxy-worker") for pid in mesh.lab.pids("n1", what)]:
        try:
            found[pid] = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
        except OSError:  # it has just died
            continue
    return found


def starved(mesh: Mesh, before: dict[int, float]) -> float:
    """How long those that live now have waited since."""
    return sum(waited - before.get(pid, 0.0) for pid, waited in waits(mesh).items())


@pytest.mark.parametrize("what", ["proxy-worker", "proxy"])
def test_after_a_proxy_kill_new_connections_succeed_within_a_second(mesh: Mesh, what: str) -> None:
    assert mesh.curl("client", "http://far.shop.mesh:8080/")[0] == 200
    before = waits(mesh)
    for pid in mesh.lab.pids("n1", what):
        os.kill(pid, signal.SIGKILL)
    # By address: one try, no resolver's own retries
    argv = ["curl", "-sS", "--max-time", "5", "-w", " %{http_code} %{time_total}", f"http://{mesh.w['web'].addresses[0]}:8080/"]
    done = mesh.w["client"].run(argv)
    status, took = done.stdout.split()[-2:]
    assert status == "200", done
    assert float(took) < 1.0 + starved(mesh, before)
    ready(mesh)


@pytest.mark.parametrize("what", ["proxy-worker", "proxy"])
@pytest.mark.parametrize("server", ["web", "far"])
def test_a_proxy_killed_under_load_refuses_nobody(mesh: Mesh, what: str, server: str) -> None:
    """What it was serving at that moment is lost; who comes after waits at most a second, and nobody hears 'refused'."""
    load = mesh.program("client", "opener.py", f"http://{server}.shop.mesh:8080/", 50, 5)
    began = float(load.first_line().split()[1])
    until(lambda: time.time() - began > 1.5, "the load does not run")
    before, killed = waits(mesh), time.time() - began
    kill(mesh, "n1", what)
    ready(mesh)
    late = killed + 1 + starved(mesh, before)
    report = load.report(timeout_s=30)
    assert not [text for _, _, text in report["errors"] if "efused" in text], report
    assert not [asked for asked, failed, _ in report["errors"] if failed < killed - 0.1 or asked > late], report


@pytest.mark.timeout(180)
def test_sixty_seconds_without_agent_and_controller(mesh: Mesh) -> None:
    """Both killed at once, under load, and not brought back: 50 new connections a second by name, none of them reused
    upstream either, see no failure; and all stay policed."""
    for node in ("n1", "n2"):  # a new worker has no stock of what ran before
        for pid in mesh.lab.pids(node, "proxy-worker"):
            os.kill(pid, signal.SIGKILL)
        until(lambda node=node: mesh.metric(node, "pillion_proxy_stock") < 25 * 75, f"{node}'s worker is still the old one")
    ready(mesh)
    near = mesh.program("client", "opener.py", "http://web.shop.mesh:8080/", 25, 100)
    far = mesh.program("client", "opener.py", "http://far.shop.mesh:8080/", 25, 100)
    holder = mesh.program("client", "hold.py", "echo.shop.mesh", ECHO_PORT, 100)
    assert near.first_line().startswith("started") and far.first_line().startswith("started")
    assert holder.first_line().startswith("open")
    # The stock follows the load within seconds; the sum has some hundred sockets for other workloads in it
    for node in ("n1", "n2"):
        until(lambda node=node: mesh.metric(node, "pillion_proxy_stock") > 25 * 110, f"{node}'s stock does not follow the load")
    with mesh.lab.stopped("n1-agent", "n2-agent", "controller"):
        began = time.monotonic()
        assert mesh.curl("client", "http://web.shop.mesh:8080/")[0] == 200
        assert mesh.curl("intruder", "http://web.shop.mesh:8080/")[0] == 403
        assert mesh.curl("intruder", "http://far.shop.mesh:8080/")[0] == 403
        with pytest.raises(Refused):
            mesh.echo("intruder", "echo.shop.mesh")
        until(lambda: time.monotonic() > began + 61, "", 62, every_s=0.5)
        for each in (near, far, holder):
            each.popen.terminate()
        for report in (near.report(timeout_s=30), far.report(timeout_s=30)):
            assert report["failed"] == 0, report
            assert report["ok"] > 25 * 60
        assert holder.report(timeout_s=30)["error"] == ""
    ready(mesh)
    assert mesh.curl("client", "http://far.shop.mesh:8080/")[0] == 200
