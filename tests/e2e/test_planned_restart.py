"""A proxy that is restarted by plan: nothing that is open is lost. New connections are the new generation's from the moment it
serves; the former one goes on with what it has, and ends with the last of it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.mesh import ECHO_PORT, NS, PROGRAMS, Mesh, policy, service, until
from tests.e2e.test_kill import kill, ready

LASTING, PORT = ("lasting", "lasting-far"), 8060
ROUNDS = 20  # of others, while the former generation still holds something


@pytest.fixture(scope="module", autouse=True)
def lasting(mesh: Mesh) -> Iterator[None]:
    """The same server on each node: one endpoint is next door, one behind a tunnel."""
    for name, node in zip(LASTING, ("n1", "n2"), strict=True):
        mesh.w[name] = mesh.lab.add_workload(node, name, NS, name, {"app": name})
        mesh.w[name].start([sys.executable, str(PROGRAMS / "lasting.py"), "serve", str(PORT)], name="server")
        mesh.listening(name, PORT)
        mesh.apply(service(name, name, PORT, "http") + policy(name, name))
    yield
    for name in LASTING:
        mesh.delete("AuthorizationPolicy", name)
        mesh.delete("Service", name)
        mesh.w.pop(name).remove()


def workers(mesh: Mesh, node: str) -> set[int]:
    return set(mesh.lab.pids(node, "proxy-worker"))


def begun(mesh: Mesh, *arguments: object) -> Any:
    running = mesh.program("client", "lasting.py", *arguments)
    assert running.first_line() == "begun\n", running.popen.communicate()
    return running


@pytest.mark.parametrize("node", ["n1", "n2"], ids=["of the source's node", "of the destination's node"])
def test_what_has_no_boundary_lives_through_it(mesh: Mesh, node: str) -> None:
    """Opaque TCP between nodes, and answers that take long: byte for byte, while others are served by the new generation."""
    former = workers(mesh, node)
    stream = begun(mesh, "tcp", "echo-far.shop.mesh", ECHO_PORT)
    answers = {name: begun(mesh, "http", f"{name}.shop.mesh", PORT) for name in LASTING[node == "n2" :]}
    kill(mesh, node, "proxy", signal.SIGTERM)
    assert mesh.curl("client", "http://far.shop.mesh:8080/")[0] == 200, "until the new generation serves, the former one does"
    ready(mesh)
    fresh = workers(mesh, node) - former
    assert fresh and former <= workers(mesh, node)
    for _ in range(ROUNDS):
        assert mesh.curl("client", "http://far.shop.mesh:8080/")[0] == 200
    for name, answer in answers.items():
        assert mesh.curl("client", f"http://{name}.shop.mesh:{PORT}/enough")[0] == 200
        report = answer.report(20)
        assert report["error"] == "" and report["bytes"] > 0, report
    assert former <= workers(mesh, node), "the stream is still open"
    stream.popen.terminate()
    report = stream.report(20)
    assert report["error"] == "" and report["bytes"] > 0, report
    until(lambda: workers(mesh, node) == fresh, f"the former generation of {node} does not end")


def test_several_generations_at_once(mesh: Mesh) -> None:
    """Each has a stream; every worker is told of a policy, whatever its generation: a denial ends them all."""
    streams = []
    for _ in range(3):
        streams.append(begun(mesh, "tcp", "echo-far.shop.mesh", ECHO_PORT))
        if len(streams) < 3:
            kill(mesh, "n1", "proxy", signal.SIGTERM)
            ready(mesh)
    assert len(workers(mesh, "n1")) == 3
    try:
        mesh.apply(policy("shut", "echo-far", action="DENY"))
        for stream in streams:
            assert stream.report(10)["error"]
        until(lambda: len(workers(mesh, "n1")) == 1, "former generations do not end")
    finally:
        mesh.delete("AuthorizationPolicy", "shut")
