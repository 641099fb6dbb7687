"""``python -m tests.deploy.restarts --write docs/hosts.md``: what is lost when a unit is restarted, upgraded or killed, counted.

A host of lab/host, installed by deploy/install.sh, with services enrolled by `pillion enrol` and a load of each kind of
connection. Counts, not times: they are as good on a busy machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lab.host import Container
from lab.state import LabError
from lab.vm import VmHandle, hosts

HERE = Path(__file__).parent
COUNTS = "/srv/counts.json"
BEGIN, END = "<!-- restarts: made by python -m tests.deploy.restarts -->", "<!-- restarts: end -->"
AFTER = 300  # requests of each kind that must have been answered since, before an event counts as over
WAIT_S = 300.0
NODE, CONTROLLER = ("pillion-agent", "pillion-proxy"), ("pillion-controller",)

KINDS: dict[str, dict[str, Any]] = {
    "native, open": {"url": "tcp://echo.shop.mesh:7000", "keep": True, "connections": 8, "pause_s": 0.02},
    "native, new": {"url": "tcp://echo.shop.mesh:7000", "keep": False, "connections": 2, "pause_s": 0.01},
    "HTTP, paired": {"url": "http://web.shop.mesh", "keep": True, "connections": 8, "pause_s": 0.02},
    "HTTP, open": {"url": "http://plain.shop.mesh", "keep": True, "connections": 8, "pause_s": 0.02},
    "HTTP, new": {"url": "http://plain.shop.mesh", "keep": False, "connections": 4, "pause_s": 0.005},
}
EVENTS: dict[str, tuple[str, list[str]]] = {  # event -> (unit, command)
    **{f"restart of the {unit.removeprefix('pillion-')}": (unit, ["systemctl", "restart", unit]) for unit in NODE + CONTROLLER},
    **{
        f"kill -9 of the {unit.removeprefix('pillion-')}": (unit, ["systemctl", "kill", "-s", "KILL", unit])
        for unit in NODE + CONTROLLER
    },
}
UPGRADE = "upgrade of the package"
RESOURCES = """
apiVersion: mesh.pillion.dev/v1alpha1
kind: NodeGrant
metadata: {name: n1}
spec: {node: n1, serviceAccounts: ["shop/*"]}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: clients, namespace: shop}
spec:
  action: ALLOW
  rules:
  - from: [{source: {principals: ["mesh.local/ns/shop/sa/client"]}}]
"""
SERVICE = """---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec:
  selector: {{app: {app}}}
  ports: [{{name: main, port: {port}, targetPort: {target}, appProtocol: {protocol}}}]
"""
UNIT = "[Service]\nDynamicUser=yes\nRuntimeDirectory={name}\nExecStart={command}\n[Install]\nWantedBy=multi-user.target\n"
NGINX = """daemon off; worker_processes 1; pid /run/web/pid; error_log stderr crit;
events { worker_connections 1024; }
http { access_log off; client_body_temp_path /run/web/b; proxy_temp_path /run/web/p; fastcgi_temp_path /run/web/f;
 uwsgi_temp_path /run/web/u; scgi_temp_path /run/web/s; keepalive_requests 10000000; keepalive_timeout 600;
 server { listen [::]:8080 ipv6only=off; location / { return 200 "hello\\n"; } } }
"""

Counts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Lost:
    """During one event, by kind."""

    asked: dict[str, int]
    failed: dict[str, int]
    why: dict[str, list[str]]


def until(done: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > end:
            raise LabError(f"not within {WAIT_S:.0f} s: {what}")
        time.sleep(0.05)


class Host:
    """An installed host under load."""

    def __init__(self, machine: Container, say: Callable[[str], None]) -> None:
        self.machine, self.say = machine, say
        self.vm = cast(VmHandle, machine)  # what hosts.py calls of it, it has

    def install(self) -> None:
        hosts.prepare(self.vm, self.say)
        hosts.install_controller(self.vm)
        services = (("echo", "echo", 7000, 7000, "tcp"), ("web", "web", 80, 8080, "http"), ("plain", "web", 80, 8080, "http"))
        fields = ("name", "app", "port", "target", "protocol")
        text = RESOURCES + "".join(SERVICE.format(**dict(zip(fields, each, strict=True))) for each in services)
        self.machine.put("/srv/mesh.yaml", text.encode())
        self.machine.run(["pillion", "apply", "-f", "/srv/mesh.yaml"], check=True)
        self.machine.run(["pillion", "express", "off", "--service", "shop/plain"], check=True)
        hosts.install_node(self.vm, self.vm)
        until(lambda: self.active(*NODE, *CONTROLLER), "the units are up")
        self.machine.put("/srv/nginx.conf", NGINX.encode())
        for name in ("asks.py", "echo.py"):
            place = HERE / "programs" / name
            self.machine.put(f"/srv/{name}", (place if place.exists() else HERE.parent / "kernels/programs" / name).read_bytes())
        self.enrol("web", "/usr/sbin/nginx -c /srv/nginx.conf -e stderr", 8080)
        self.enrol("echo", "/usr/bin/python3 /srv/echo.py 7000", 7000)

    def enrol(self, name: str, command: str, port: int) -> None:
        self.machine.put(f"/etc/systemd/system/{name}.service", UNIT.format(name=name, command=command).encode())
        self.machine.run(["systemctl", "daemon-reload"], check=True)
        enrol = ["pillion", "enrol", f"{name}.service", "--as", f"shop/{name}", "--port", str(port)]
        self.machine.run(enrol, check=True, timeout=200)
        self.machine.run(["systemctl", "enable", "--now", f"{name}.service"], check=True, timeout=200)

    def active(self, *units: str) -> bool:
        return set(self.machine.run(["systemctl", "is-active", *units]).stdout.split()) == {"active"}

    def load(self) -> None:
        program = ["/usr/bin/python3", "/srv/asks.py", COUNTS, json.dumps(KINDS)]
        unit = ["systemd-run", "-q", "--unit=load", "--collect", "--setenv=HOME=/root"]
        run = ["/usr/local/bin/pillion", "run", "-n", "shop", "--service", "client", "--", *program]
        self.machine.run([*unit, *run], check=True)
        until(lambda: self.answered(self.counts(), {}, AFTER), f"the load goes: {self.counts()}")
        until(self.carries, "the kernel carries requests")

    def carries(self) -> bool:
        told = self.machine.run(["pillion", "express", "status", "-o", "json"], check=True).stdout
        found = next(iter(json.loads(told).values()))
        return bool(found["pairs"] >= KINDS["HTTP, paired"]["connections"] and found["carried"]["requests"] > AFTER)

    def counts(self) -> Counts:
        done = self.machine.run(["cat", COUNTS])
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    @staticmethod
    def answered(after: Counts, before: Counts, least: int) -> bool:
        """Whether of each kind so many were answered in between."""

        def good(found: Counts, kind: str) -> int:
            each = found.get(kind, {"asked": 0, "failed": 0})
            return int(each["asked"]) - int(each["failed"])

        return bool(after) and all(good(after, kind) - good(before, kind) >= least for kind in KINDS)

    def during(self, event: Callable[[], object]) -> Lost:
        before = self.counts()
        event()
        over = self.counts()
        until(lambda: self.answered(self.counts(), over, AFTER), f"all kinds are answered again: {self.counts()}")
        after = self.counts()

        def grown(what: str) -> dict[str, int]:
            return {kind: after[kind][what] - before[kind][what] for kind in KINDS}

        failed = grown("failed")
        return Lost(grown("asked"), failed, {kind: after[kind]["why"][-failed[kind] :] for kind in KINDS if failed[kind]})

    def happens(self, unit: str, command: list[str]) -> None:
        """The command, until another process of the unit is ready."""

        def invocation() -> str:
            return self.machine.run(["systemctl", "show", "-P", "InvocationID", unit], check=True).stdout

        old = invocation()
        self.machine.run(command, check=True, timeout=200)
        until(lambda: invocation() != old and self.active(unit), f"{unit} is back")

    def upgrade(self) -> None:
        hosts.upgrade(self.vm)
        until(lambda: self.active(*NODE), "the units are up")


def table(found: dict[str, Lost]) -> str:
    """Failed of asked. Pure."""
    lines = [f"| event | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for event, lost in found.items():
        lines.append(f"| {event} | " + " | ".join(f"{lost.failed[kind]} of {lost.asked[kind]:,}" for kind in KINDS) + " |")
    return "\n".join(lines) + "\n"


def written(text: str, fresh: str) -> str:
    """The document with its table replaced. Pure. Raises ValueError where it has no place for one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} … {END} in it")
    return f"{before}{BEGIN}\n{fresh}{END}{after}"


def main() -> int:
    """The exit code: 1 if something was lost that must not be."""
    parser = argparse.ArgumentParser(prog="tests.deploy.restarts", description=__doc__)
    parser.add_argument("--write", type=Path, help="the document whose table is replaced")
    parser.add_argument("--only", action="append", help="an event; may repeat")
    options = parser.parse_args()
    found: dict[str, Lost] = {}
    with Container("n1", print) as machine:
        host = Host(machine, print)
        host.install()
        host.load()
        for event in options.only or (*EVENTS, UPGRADE):
            found[event] = host.during(host.upgrade if event == UPGRADE else lambda event=event: host.happens(*EVENTS[event]))  # type: ignore[misc]  # bound now
            print(f"{event}: {found[event]}", flush=True)
    text = table(found)
    print(text)
    if options.write:
        options.write.write_text(written(options.write.read_text(), text))
    return int(any(lost.failed["native, open"] or lost.failed["HTTP, paired"] for lost in found.values()))


if __name__ == "__main__":
    sys.exit(main())
