"""kill -9 of each process under load: what is open goes on, what is new is served, and both stay policed."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.e2e.mesh import ECHO_PORT, Mesh, Refused, until

READY_S, LOG_LINES = 120.0, 12


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
    holder = mesh.program("client", "hold.py", "echo.shop.mesh", ECHO_PORT, 4)
    assert holder.first_line().startswith("open")
    kill(mesh, node, what)
    report = holder.report(timeout_s=20)
    assert report["error"] == ""
    assert report["rounds"] > 50


@pytest.mark.parametrize("what", ["agent", "proxy-worker", "proxy", "controller"])
def test_native_connections_never_notice(mesh: Mesh, what: str) -> None:
    native_never_notices(mesh, None if what == "controller" else "n1", what)
    ready(mesh)


@pytest.mark.parametrize("what", ["proxy-worker", "proxy"])
def test_after_a_proxy_kill_new_connections_succeed_within_a_second(mesh: Mesh, what: str) -> None:
    assert mesh.curl("client", "http://far.shop.mesh:8080/")[0] == 200
    for pid in mesh.lab.pids("n1", what):
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    status, body = mesh.curl(
        "client", f"http://{mesh.w['web'].addresses[0]}:8080/"
    )  # by address: one try, no resolver's own retries
    took = time.monotonic() - began
    assert status == 200, body
    assert took < 1.5  # a second, and curl's own start
    ready(mesh)


@pytest.mark.parametrize("what", ["proxy-worker", "proxy"])
@pytest.mark.parametrize("server", ["web", "far"])
def test_a_proxy_killed_under_load_refuses_nobody(mesh: Mesh, what: str, server: str) -> None:
    """What it was serving at that moment is lost; who comes after waits at most a second, and nobody hears 'refused'."""
    load = mesh.program("client", "opener.py", f"http://{server}.shop.mesh:8080/", 50, 5)
    began = float(load.first_line().split()[1])
    until(lambda: time.time() - began > 1.5, "the load does not run")
    for pid in mesh.lab.pids("n1", what):
        os.kill(pid, signal.SIGKILL)
    killed = time.time() - began
    report = load.report(timeout_s=30)
    assert not [error for error in report["errors"] if "efused" in error[1]], report
    assert not [at for at, _text in report["errors"] if not killed - 0.2 <= at <= killed + 1], report
    ready(mesh)


@pytest.mark.timeout(180)
def test_sixty_seconds_without_agent_and_controller(mesh: Mesh) -> None:
    """Both killed at once, under load, and not brought back: 50 new connections a second by name, none of them reused
    upstream either, see no failure; and all stay policed."""
    for node in ("n1", "n2"):  # a new worker has no stock of what ran before
        for pid in mesh.lab.pids(node, "proxy-worker"):
            os.kill(pid, signal.SIGKILL)
        until(lambda node=node: mesh.metric(node, "pillion_proxy_stock") < 25 * 75, f"{node}'s worker is still the old one")
    ready(mesh)
    near = mesh.program("client", "opener.py", "http://web.shop.mesh:8080/", 25, 75)
    far = mesh.program("client", "opener.py", "http://far.shop.mesh:8080/", 25, 75)
    holder = mesh.program("client", "hold.py", "echo.shop.mesh", ECHO_PORT, 75)
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
        for report in (near.report(timeout_s=120), far.report(timeout_s=30)):
            assert report["failed"] == 0, report
            assert report["ok"] == 25 * 75
        assert holder.report(timeout_s=30)["error"] == ""
        assert time.monotonic() - began > 60
    ready(mesh)
    assert mesh.curl("client", "http://far.shop.mesh:8080/")[0] == 200
