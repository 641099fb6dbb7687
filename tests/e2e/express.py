"""What the end-to-end tests of express share: a server whose answers can be checked, and what the kernel says it carried."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lab.pace import SLOW
from tests.e2e.mesh import PROGRAMS, Background, Mesh, policy, service, until

PORT = 8070
NAME = "exact"


def event(mesh: Mesh, name: str, node: str = "n1") -> float:
    """Requests carried, or sent to user space for a reason, so far; by the kernel's counters."""
    return mesh.metric(node, "pillion_express_total", event=name)


def pairings(mesh: Mesh, result: str, node: str = "n1") -> float:
    return mesh.metric(node, "pillion_express_pairings_total", result=result)


def load(mesh: Mesh, who: str = "client", *, host: str = NAME, **options: Any) -> Background:
    """`programs/exact_client.py`, running."""
    question = {"host": f"{host}.shop.mesh", "port": PORT, **options}
    return mesh.program(who, "exact_client.py", json.dumps(question))


def carried_on(mesh: Mesh, requests: int = 20) -> None:
    """Until the kernel has carried so many more of what runs."""
    before = event(mesh, "carried")
    until(lambda: event(mesh, "carried") >= before + requests, "the kernel carries nothing more")


def started(running: Background) -> None:
    line = running.first_line()
    assert line == "started\n", line or running.popen.communicate()


def stopped(running: Background) -> dict[str, Any]:
    """Its report, as soon as what is asked is answered."""
    running.popen.terminate()
    return running.report(30 * SLOW)


def warm(mesh: Mesh) -> None:
    """Until the kernel carries what `client` asks the exact server."""

    def carries() -> bool:
        before = event(mesh, "carried")
        report = load(mesh, connections=2, seconds=10, each=200, rate=200).report(30)  # longer than any connection is doubted
        assert not report["wrong"] and not report["errors"], report
        return event(mesh, "carried") > before + 10

    until(carries, "the kernel carries nothing")


@contextmanager
def exact(mesh: Mesh, name: str = NAME, *, app: str = NAME, accounts: tuple[str, ...] = ("client",)) -> Iterator[None]:
    """A workload on n1 with that server behind a service of the same name."""
    workload = mesh.lab.add_workload("n1", name, "shop", name, {"app": app})
    mesh.w[name] = workload
    workload.start([sys.executable, str(PROGRAMS / "exact_server.py"), str(PORT)], name="server")
    mesh.listening(name, PORT)
    mesh.apply(service(name, app, PORT, "http") + "".join(policy(f"{name}-{who}", app, who=who) for who in accounts))
    try:
        yield
    finally:
        for who in accounts:
            mesh.delete("AuthorizationPolicy", f"{name}-{who}")
        mesh.delete("Service", name)
        mesh.w.pop(name).remove()


def clean(report: dict[str, Any]) -> None:
    """Nothing lost, doubled, or changed."""
    assert not report["wrong"] and not report["errors"] and not report["doubled"], report
    assert set(report["statuses"]) == {"200"}, report
