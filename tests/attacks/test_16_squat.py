"""security.md 16: take the proxy's port in one's own namespace, join its listener, or be there before it."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from lab import Workload
from lab.process import Process
from nodeagent.roster import KEPT_OUT
from tests.attacks.actions import FAMILIES, PASSED, PROGRAMS, Dialled, address, dial
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import HTTP_PORT, Mesh, until

JOINABLE = Mutant(
    "b2",  # not beside the next: a joined listener would be found by it
    "bind() keeps our ports, and nobody can join",
    (
        "bpf/bind.c",
        "    if (port != PL_PORT_OUTBOUND && port != PL_PORT_HBONE && port != PL_PORT_DNS)\n      return 1;\n",
        "    return 1;\n",
    ),
    (
        "nodeagent/netns.py",
        "        sock.bind((address, port))\n",
        "        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n        sock.bind((address, port))\n",
    ),
)
ANYBODYS_LISTENER = Mutant(
    "b1",
    "connect() leads to our own listener only",
    ("bpf/choice.h", "  if (!listeners.lookup(&netns))\n    return PL_R_NO_LISTENER;\n", ""),
)  # fmt: skip
OLD_LISTENER = Mutant(
    "b2",
    "connect() leads to a listener that is there",
    ("bpf/sockops.c", "  listeners.delete(&netns);\n", ""),
)
OURS = ("15001", "15008", "15053", "15053/udp")


def take(mesh: Mesh, at: str, *ports: str) -> list[str]:
    """What becomes of each."""

    def one(port: str) -> str:
        return mesh.w["intruder"].run([sys.executable, str(PROGRAMS / "squat.py"), at, port], timeout=15).stdout.strip()

    with ThreadPoolExecutor(len(ports)) as pool:
        return list(pool.map(one, ports))


@pytest.mark.attack("join the proxy's listener")
@pytest.mark.parametrize("at", ["127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"])
def test_our_ports_cannot_be_bound(mesh: Mesh, counted: Counted, at: str) -> None:
    with counted(mesh, "n1", "bind_denied", times=len(OURS)):
        assert take(mesh, at, *OURS, "15101", "15101/udp") == ["PermissionError"] * len(OURS) + [PASSED] * 2


@pytest.mark.red("join the proxy's listener", JOINABLE)
@pytest.mark.parametrize("at", ["127.0.0.1", "::1"])
def test_the_listener_is_joined_without(broken: Mesh, at: str) -> None:
    assert take(broken, at, "15001", "15053") == [PASSED] * 2


# What a stranger has in the namespace of who comes late: one of the ports is enough
TAKEN = {
    "late": (("127.0.0.1", "15001"), ("::1", "15001")),
    "late-dns": (("127.0.0.1", "15053/udp"),),
    "late-dns-tcp": (("::", "15053"),),
    "late-tunnel": (("own", "15008"),),
}


@contextmanager
def there_before(mesh: Mesh, *names: str) -> Iterator[dict[str, Workload]]:
    """Workloads of the identity `client` that are enrolled while strangers listen in their namespaces; those go with it."""
    (agent,) = mesh.lab.pids("n1", "agent")
    os.kill(agent, signal.SIGSTOP)
    try:
        specs = [
            {"node": "n1", "name": name, "namespace": "shop", "service_account": "client", "labels": {"app": name}}
            for name in names
        ]
        late = {workload.name: workload for workload in mesh.lab.add_workloads(specs, wait=False)}
        squatters = [
            mesh.lab.nodes["n1"].start(
                ["nsenter", f"--net={late[name].netns}", sys.executable, str(PROGRAMS / "squat.py"),
                 at.replace("own", late[name].addresses[0]), port, "stay"],
                name=f"{name}-{number}",
            )
            for name in names for number, (at, port) in enumerate(TAKEN[name])
        ]  # fmt: skip
        until(lambda: all(PASSED in squatter.output() for squatter in squatters), "the squatters do not listen")
    finally:
        os.kill(agent, signal.SIGCONT)
    try:
        yield late
    finally:
        for squatter in squatters:
            squatter.kill()


QUESTION = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(2)
    try:
        sock.sendto(b"?", ("192.0.2.53", 53))
        print(sock.recv(4096).decode(errors="replace"))
    except OSError as error:
        print(type(error).__name__)
"""


def ask(workload: Workload) -> str:
    """What comes of a question to a resolver."""
    return workload.run([sys.executable, "-c", QUESTION], timeout=15).stdout.strip()


def told(mesh: Mesh, late: Iterable[str]) -> bool:
    """Whose port it is that somebody has stands in the node's status; which is ready, or a workload could hold it up."""
    status = mesh.lab.nodes["n1"].status()
    return bool(status["ready"]) and all(
        re.search(rf"shop/{name}: {KEPT_OUT}: .*port {TAKEN[name][0][1].partition('/')[0]} of ", str(status["detail"]))
        for name in late
    )


@pytest.mark.attack("be there before the agent")
def test_nothing_connects_until_the_ports_are_ours(mesh: Mesh, counted: Counted) -> None:
    web = mesh.w["web"]
    with there_before(mesh, *TAKEN) as late, ThreadPoolExecutor(4) as pool:
        until(lambda: told(mesh, late), "the agent does not say which port is taken")
        asked = [(name, family) for name in late for family in (FAMILIES if name == "late" else FAMILIES[:1])]
        with counted(mesh, "n1", "no_listener", times=len(asked) + len(late)):
            found = list(pool.map(lambda each: dial(late[each[0]], address(web, each[1]), HTTP_PORT), asked))
            assert found == [Dialled("", "PermissionError")] * len(asked)
            assert set(pool.map(ask, late.values())) == {"PermissionError"}
        assert "web for" in dial(mesh.w["client"], web.addresses[0], HTTP_PORT).answer
    mesh.lab.wait_enrolled(late.values())
    assert all("web for" in dial(each, web.addresses[0], HTTP_PORT).answer for each in late.values())
    for each in late.values():
        each.remove()


@pytest.mark.red("be there before the agent", ANYBODYS_LISTENER)
def test_a_stranger_answers_without(broken: Mesh) -> None:
    with there_before(broken, "late", "late-dns") as late:
        to = broken.w["web"].addresses[0]
        until(lambda: dial(late["late"], to, HTTP_PORT).answer == "SQUATTED", "the stranger is not reached")
        until(lambda: ask(late["late-dns"]) == "SQUATTED", "the stranger is not asked")


def after_both(mesh: Mesh) -> str:
    """What a workload hears when agent and proxy were killed, and a stranger took the port."""
    client, web = mesh.w["client"], mesh.w["web"].addresses[0]
    with mesh.lab.stopped("n1-agent", "n1-proxy"):
        argv = ["nsenter", f"--net={client.netns}", sys.executable, str(PROGRAMS / "squat.py"), "127.0.0.1", "15001", "stay"]
        squatters: list[Process] = []

        def taken() -> bool:
            """Those who were killed have the port until their last process is at its end."""
            squatters.append(mesh.lab.nodes["n1"].start(argv, name="after-both"))
            return PASSED in until(squatters[-1].output, "the stranger says nothing")

        try:
            until(taken, "the port is not free")
            found = dial(client, web, HTTP_PORT)
        finally:
            for squatter in squatters:
                squatter.kill()
    until(lambda: "web for" in dial(client, web, HTTP_PORT).answer, "the agent does not take the port again")
    return found.answer or found.error


@pytest.mark.attack("be there when agent and proxy are gone")
def test_nothing_is_led_to_who_comes_after_them(mesh: Mesh, counted: Counted) -> None:
    with counted(mesh, "n1", "no_listener"):
        assert after_both(mesh) == "PermissionError"


@pytest.mark.red("be there when agent and proxy are gone", OLD_LISTENER)
def test_a_stranger_is_reached_after_them_without(broken: Mesh) -> None:
    assert after_both(broken) == "SQUATTED"
