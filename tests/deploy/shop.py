"""The shop on machines where deploy/install.sh put the mesh: services that systemd runs, and a client that asks them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lab.lab import grants
from lab.machine import Machine
from tests.e2e.mesh import ECHO_PORT, HTTP_PORT, NS, PROGRAMS, nginx, policy, service

COUNTS = "/srv/counts.json"
TIMEOUT_S = 300.0  # in emulation, on a machine with other work
WEB, ECHO = "http://web.shop.mesh", f"tcp://echo.shop.mesh:{ECHO_PORT}"
UNIT = "[Service]\nDynamicUser=yes\nRuntimeDirectory={name}\nExecStart={command}\n[Install]\nWantedBy=multi-user.target\n"

Counts = dict[str, dict[str, Any]]  # by kind, see programs/asks.py


def resources(nodes: Iterable[str], *more: str) -> str:
    """`client` may ask all."""
    services = service("web", "web", 80, "http", HTTP_PORT), service("echo", "echo", ECHO_PORT, "tcp")
    return "".join((grants((node, NS) for node in nodes), *services, policy("clients", ""), *more))


def serve(machine: Machine, says: str) -> None:
    """web, which says that, and echo."""
    machine.put("/srv/nginx.conf", nginx(Path("/run/web"), says).encode())
    machine.put("/srv/echo.py", (PROGRAMS / "echo.py").read_bytes())
    for name, command, port in (
        ("web", "/usr/sbin/nginx -c /srv/nginx.conf -e stderr", HTTP_PORT),
        ("echo", f"/usr/bin/python3 /srv/echo.py {ECHO_PORT} quiet", ECHO_PORT),
    ):
        enrol(machine, name, UNIT.format(name=name, command=command), "--port", str(port))


def enrol(machine: Machine, name: str, unit: str, *options: str) -> None:
    """A service of systemd's, as the account of its name; it runs."""
    machine.put(f"/etc/systemd/system/{name}.service", unit.encode())
    machine.run(["systemctl", "daemon-reload"], check=True, timeout=TIMEOUT_S)
    machine.run(["pillion", "enrol", f"{name}.service", "--as", f"{NS}/{name}", *options], check=True, timeout=TIMEOUT_S)
    machine.run(["systemctl", "enable", "--now", f"{name}.service"], check=True, timeout=TIMEOUT_S)


def ask(machine: Machine, kinds: dict[str, dict[str, Any]]) -> None:
    """`client`, asking from now on, see programs/asks.py."""
    machine.put("/srv/asks.py", (Path(__file__).with_name("programs") / "asks.py").read_bytes())
    machine.run(["rm", "-f", COUNTS], check=True)
    program = ["/usr/bin/python3", "/srv/asks.py", COUNTS, json.dumps(kinds)]
    unit = ["systemd-run", "-q", "--unit=load", "--collect", "--setenv=HOME=/root"]
    run = ["/usr/local/bin/pillion", "run", "-n", NS, "--service", "client", "--", *program]
    machine.run([*unit, *run], check=True, timeout=TIMEOUT_S)


def counts(machine: Machine) -> Counts:
    """What it says so far; empty before it does."""
    done = machine.run(["cat", COUNTS], timeout=TIMEOUT_S)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def answered(each: dict[str, Any]) -> int:
    return int(each["asked"]) - int(each["failed"])


def express(machine: Machine) -> dict[str, Any]:
    """`pillion express status` of this node."""
    told = machine.run(["pillion", "express", "status", "-o", "json"], check=True, timeout=TIMEOUT_S).stdout
    return dict(next(iter(json.loads(told).values())))
