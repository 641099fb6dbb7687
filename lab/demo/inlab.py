"""The shop in the namespace lab."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from lab import Lab, Workload, process
from lab.capture import Capture
from lab.demo import wire
from lab.demo.shop import CATALOGS, HERE, NAMESPACE, PORTS, SERVICES, NotSeen, Shop
from lab.lab import WorkloadSpec
from lab.process import Place, Process

NODES = {"near": "n1", "far": "n2"}
LISTEN_TIMEOUT_S = 30.0


def specs() -> list[WorkloadSpec]:
    """Who runs where: each talks to something on its own node and to something on the other."""
    places: list[tuple[str, str, str, dict[str, str]]] = [
        ("front", "n1", "front", {"app": "front"}),
        *(
            (name, NODES[node], "catalog", {"app": "catalog", "version": version})
            for name, (node, version, _) in CATALOGS.items()
        ),
        ("redis", "n1", "redis", {"app": "redis"}),
        ("mariadb", "n2", "mariadb", {"app": "mariadb"}),
        ("client", "n1", "client", {"app": "client"}),
        ("intruder", "n1", "intruder", {"app": "intruder"}),
    ]
    return [
        WorkloadSpec(node=node, name=name, namespace=NAMESPACE, service_account=account, labels=labels)
        for name, node, account, labels in places
    ]


class LabShop(Shop):
    near, far = "n1", "n2"
    names = ("catalog.shop.mesh", "catalog")
    shown = "catalog-v2"
    shown_as = ("n2", "catalog-v2")
    stranger = ("n2", "catalog-v1a")

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
        for name, (_, version, port) in CATALOGS.items():
            self.start(name, [sys.executable, str(SERVICES / "catalog.py"), name, version, str(port)])
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
        sql.write_text((SERVICES / "shop.sql").read_text())  # its user may not read ours
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

    def agent_api(self, node: str, method: str, path: str) -> Any:
        return self.lab.agent_api(node, method, path)

    def outside(self, node: str, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return self.lab.nodes[node].run(argv, timeout=15)

    def capture(self, node: str) -> Capture:
        return self.lab.capture(node)

    def why(self, *question: str) -> dict[str, Any]:
        argv = [sys.executable, "-m", "pillion", "--lab", self.lab.name, "policy", "why", *question, "-o", "json"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, cwd=HERE.parents[1])
        if not done.stdout:
            raise NotSeen(f"policy why {' '.join(question)}: {done.stderr.strip()}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def kill(self, name: str) -> None:
        self[name].kill()

    def restore(self, name: str) -> None:
        self.start(name, self.processes[name].argv)
        self.await_listening(name)

    def rotate(self) -> None:
        for node in self.lab.nodes:
            self.agent_api(node, "POST", "/v1/rotate")

    def certificate(self) -> tuple[str, str]:
        """Asked from the client's network namespace, by a program outside the mesh: its dials are captured by nobody."""
        place = Place(self.lab.nodes[self.near].place.cgroup, self["client"].netns)
        return wire.certificate(lambda argv: process.run(place, argv), self[self.shown].address)

    def in_the_clear(self, marker: str, requests: int) -> int:
        return wire.marker_without_mesh(f"{self.lab.name}p", marker, requests)

    def dropped(self) -> float:
        return self.metric(self.near, "pillion_datapath_total", reason="ingress_plaintext")
