"""The shop: its workloads, its programs, and the questions the scenes ask of it."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lab import Lab, Workload
from lab.lab import WorkloadSpec
from lab.process import Process
from mesh.model import VIP4, VIP6

HERE = Path(__file__).parent
SERVICES = HERE / "services"
NAMESPACE = "shop"
LISTEN_TIMEOUT_S = 30.0
CATALOGS = {"catalog-v1a": ("n1", "v1"), "catalog-v1b": ("n2", "v1"), "catalog-v2": ("n2", "v2")}
PORTS = {"front": 8080, **dict.fromkeys(CATALOGS, 8000), "redis": 6379, "mariadb": 3306}


class NotSeen(Exception):
    """A scene did not show what it should; the message says what was observed instead."""


def specs() -> list[WorkloadSpec]:
    """Who runs where: each talks to something on its own node and to something on the other."""
    places: list[tuple[str, str, str, dict[str, str]]] = [
        ("front", "n1", "front", {"app": "front"}),
        *((name, node, "catalog", {"app": "catalog", "version": version}) for name, (node, version) in CATALOGS.items()),
        ("redis", "n1", "redis", {"app": "redis"}),
        ("mariadb", "n2", "mariadb", {"app": "mariadb"}),
        ("client", "n1", "client", {"app": "client"}),
        ("intruder", "n1", "intruder", {"app": "intruder"}),
    ]
    return [
        WorkloadSpec(node=node, name=name, namespace=NAMESPACE, service_account=account, labels=labels)
        for name, node, account, labels in places
    ]


class Shop:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.processes: dict[str, Process] = {}

    def __getitem__(self, name: str) -> Workload:
        return self.lab.workloads[name]

    # ---- opening

    def open(self, say: Callable[[str], None]) -> None:
        """Workloads, resources, programs; returns when each of them listens."""
        self.lab.add_workloads(specs())
        say("workloads have their identities")
        revision = self.lab.apply((HERE / "shop.yaml").read_text())
        self.lab.wait(revision)
        say(f"resources are in force, revision {revision}")
        for name, (_, version) in CATALOGS.items():
            self.start(name, [sys.executable, str(SERVICES / "catalog.py"), name, version, "8000"])
        self.start_redis()
        for name in (*CATALOGS, "redis"):
            self.await_listening(name)
        self.start_front()
        self.start_mariadb()  # last: it takes longest
        for name in ("front", "mariadb"):
            self.await_listening(name)
        say("nginx, the catalogs, redis and mariadb listen")

    def start(self, name: str, argv: list[str], user: str | None = None) -> None:
        self.processes[name] = self[name].start(argv, "server", user=user)

    def start_front(self) -> None:
        files = self["front"].files
        config = files / "nginx.conf"
        config.write_text((SERVICES / "nginx.conf").read_text().replace("@DIR@", str(files)))
        self.start("front", ["nginx", "-c", str(config), "-e", "stderr"])

    def start_redis(self) -> None:
        options = {"port": "6379", "protected-mode": "no", "save": "", "appendonly": "no", "dir": "/", "daemonize": "no"}
        argv = ["redis-server", "--bind", "*", "-::*", *(part for key, value in options.items() for part in (f"--{key}", value))]
        self.start("redis", argv, user="redis")

    def start_mariadb(self) -> None:
        """A data folder of its own, made and removed with the lab; runs as the user mysql."""
        data = self["mariadb"].files / "data"
        sql = self["mariadb"].files / "shop.sql"
        sql.write_text(
            "CREATE DATABASE IF NOT EXISTS shop;\n"  # an init file wants a line for each statement
            "CREATE OR REPLACE USER shop@'%' IDENTIFIED BY 'shop';\n"
            "GRANT ALL ON shop.* TO shop@'%';\n"
            "CREATE TABLE IF NOT EXISTS shop.items (id INT PRIMARY KEY, name VARCHAR(40));\n"
            "REPLACE INTO shop.items VALUES (1, 'saddle'), (2, 'bridle'), (3, 'pillion');\n"
        )
        small = ["--innodb-log-file-size=4M", "--innodb-buffer-pool-size=16M", "--skip-log-bin"]
        # Beside the mesh, but in the lab's cgroup: what crashes here is cleaned with the lab.
        made = self.lab.nodes["n2"].run(
            [
                *(
                    "mariadb-install-db",
                    "--no-defaults",
                    f"--datadir={data}",
                    "--user=mysql",
                    "--skip-test-db",
                    "--skip-name-resolve",
                    "--force",  # also where the host cannot look up its own name
                ),
                *("--auth-root-authentication-method=normal", *small),
            ],
            timeout=90,
        )
        if made.returncode != 0:
            raise NotSeen(f"mariadb-install-db failed: {(made.stderr or made.stdout)[-400:]}")
        self.start(
            "mariadb",
            [
                *("mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={data}/shop.sock", f"--pid-file={data}/shop.pid"),
                *("--port=3306", "--bind-address=*", "--skip-name-resolve", f"--init-file={sql}", "--user=mysql", *small),
            ],
        )

    def await_listening(self, name: str) -> None:
        """Until the workload's program listens on its port, seen from inside its namespace."""
        deadline = time.monotonic() + LISTEN_TIMEOUT_S
        argv = ["ip", "netns", "exec", self[name].pod.netns, "ss", "-Htln", f"sport = :{PORTS[name]}"]
        while not subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip():
            process = self.processes[name]
            if not process.alive or time.monotonic() > deadline:
                raise NotSeen(f"{name} does not listen on port {PORTS[name]}: {process.output()[-400:]}")
            time.sleep(0.05)

    # ---- asking

    def curl(self, source: str, url: str, *options: str, timeout_s: float = 5.0) -> tuple[int, str]:
        """(status, body); status 0 with curl's error if there was no answer."""
        argv = ["curl", "-sS", "--max-time", f"{timeout_s:g}", "-w", "\n%{http_code}", *options, url]
        done = self[source].run(argv, timeout=timeout_s + 10)
        body, _, code = done.stdout.rpartition("\n")
        return int(code or 0), body if code not in ("", "000") else done.stderr.strip()

    def ask(self, source: str, url: str, *options: str) -> dict[str, Any]:
        """The JSON of a 200."""
        status, body = self.curl(source, url, *options)
        if status != 200:
            raise NotSeen(f"{source} asked {url}: {status} {body[:300]}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def load(self, source: str, host: str, path: str, amount: str, connections: int = 1, body: str = "") -> dict[str, Any]:
        """Runs services/load.py to its end."""
        argv = [sys.executable, str(SERVICES / "load.py"), host, path, amount, str(connections), *([body] if body else [])]
        done = self[source].run(argv, timeout=120)
        if done.returncode != 0:
            raise NotSeen(f"the load from {source} failed: {done.stderr[-400:]}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def metric(self, node: str, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels, from the node's agent."""
        total = 0.0
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in str(self.lab.agent_api(node, "GET", "/metrics")).splitlines():
            if line.split("{")[0].split(" ")[0] == name and all(want in line for want in wanted):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def flows(self, node: str, limit: int = 500) -> list[dict[str, Any]]:
        answer = self.lab.agent_api(node, "GET", f"/v1/flows?limit={limit}")
        if isinstance(answer, dict):
            return [answer]
        return [json.loads(line) for line in str(answer or "").splitlines()]

    def why(self, *question: str) -> dict[str, Any]:
        """`pillion policy why … -o json`."""
        argv = [sys.executable, "-m", "pillion", "--lab", self.lab.name, "policy", "why", *question, "-o", "json"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, cwd=HERE.parents[1])
        if not done.stdout:
            raise NotSeen(f"policy why {' '.join(question)}: {done.stderr.strip()}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def serials(self, node: str) -> dict[str, str]:
        """Certificate serials of a node's workloads, from its agent."""
        workloads: Iterable[dict[str, Any]] = self.lab.nodes[node].status()["workloads"]
        return {each["name"]: str((each.get("svid") or {}).get("serial")) for each in workloads}


def is_virtual(address: str) -> bool:
    """Whether an address is of the mesh's virtual ranges."""
    ip = ipaddress.ip_address(address)
    return ip in (VIP4 if ip.version == 4 else VIP6)
