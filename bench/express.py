"""HTTP between workloads of one node with the kernel carrying it: beside no mesh, beside Envoy, and (`self`) beside this
proxy without the kernel's help."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench import report
from bench.load import LoadError, Run
from bench.world import ASIDE_PORT, HTTP_PORT, NAMESPACE, World, until_it_answers

HERE = Path(__file__).parent
CONNECTIONS, SECONDS = 32, 3
KEPT_SECONDS = 6  # of connections that are kept: to pair 32 of them takes a tenth of a second of CPU time
RATE = 10_000
CARRIED_SHARE_MIN = 0.9  # of a row's requests; else it is no row about express


@dataclass(frozen=True)
class Load:
    """wrk with requests of one shape."""

    head: int = 130  # bytes
    body: int = 0
    close_every: int = 0
    path: str = "/"
    seconds: int = SECONDS

    def __call__(self, run: Run, host: str, port: int) -> float:
        argv = [
            "wrk",
            "-t1",
            f"-c{CONNECTIONS}",
            f"-d{self.seconds}s",
            "-s",
            str(HERE / "wrk_express.lua"),
            f"http://{host}:{port}",
        ]
        argv += ["--", str(self.head), str(self.body), str(self.close_every), self.path]
        out = run(argv, self.seconds + 20).stdout
        errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", out)
        if re.search(r"Non-2xx", out) or (errors and (int(errors[1]) or int(errors[2]) or int(errors[4]))):
            raise LoadError(f"{host}:{port}: wrk says\n{out}")
        if not (match := re.search(r"Requests/sec:\s+([\d.]+)", out)) or float(match[1]) == 0:
            raise LoadError(f"{host}:{port}: wrk says\n{out}")
        return float(match[1])


@dataclass(frozen=True)
class Steady:
    """p99 in ms at a fixed rate."""

    seconds: int = SECONDS

    def __call__(self, run: Run, host: str, port: int) -> float:
        argv = [sys.executable, str(HERE / "steady.py"), host, str(port), str(RATE), str(self.seconds), str(CONNECTIONS)]
        done = run(argv, self.seconds + 30)
        if done.returncode or not done.stdout.strip():
            raise LoadError(f"the steady clients say {done.stderr.strip()[-300:]}")
        return float(done.stdout)


#: name -> unit, load, whether it is compared with itself without express
ROWS: dict[str, tuple[str, Load | Steady, bool]] = {
    "express-http1": ("requests/s", Load(seconds=KEPT_SECONDS), False),
    "express-http1-head600": ("requests/s", Load(head=600, seconds=KEPT_SECONDS), False),
    "express-post-1k": ("requests/s", Load(body=1024), False),
    "express-p99-10k": ("ms p99", Steady(), False),
    "express-churn": ("requests/s", Load(close_every=10), False),
    "express-large": ("requests/s", Load(path="/large"), True),
}
NAMES = tuple(ROWS)


def carried(world: World) -> tuple[int, int]:
    """Requests that the kernel and the proxy ended so far, by the agent's metrics."""
    text = str(world.lab.agent_api("n1", "GET", "/metrics"))
    found = [0, 0]
    for line in text.splitlines():
        if line.startswith("pillion_requests_total{"):
            found[0 if 'path_kind="express"' in line else 1] += int(float(line.rsplit(" ", 1)[1]))
    return found[0], found[1]


def _without_run(ask: Callable[[], float]) -> Callable[[Run], float]:
    return lambda _run: ask()


def measure(name: str, mesh: World, bare: World, envoy_port: int, rounds: int, console: Console) -> report.Row:
    """The parties take turns. Raises LoadError, also when the kernel did not carry what the row is about."""
    unit, load, with_self = ROWS[name]
    web = mesh.address("express-web"), HTTP_PORT
    parties: dict[str, Callable[[], float]] = {
        "pillion": lambda: load(mesh.run(), *web),
        "direct": lambda: load(bare.run(), bare.workloads["web"].addresses[0], HTTP_PORT),
        "envoy": lambda: load(bare.run(), "127.0.0.1", envoy_port),
    }
    if with_self:
        parties["self"] = lambda: load(mesh.run(), mesh.address("web"), HTTP_PORT)
    samples: dict[str, list[float]] = {party: [] for party in parties}
    with console.status(name) as status:
        for ask in parties.values():
            until_it_answers(_without_run(ask), mesh.run())
        for index in range(rounds):
            for party, ask in parties.items():
                status.update(f"{name}: round {index + 1} of {rounds}, {party}")
                before = carried(mesh) if party == "pillion" else (0, 0)
                samples[party].append(ask())
                if party == "pillion":
                    after = carried(mesh)
                    kernel, proxy = after[0] - before[0], after[1] - before[1]
                    console.print(f"{name}: {kernel:,} requests by the kernel, {proxy:,} by the proxy", style="dim")
                    if name in ("express-http1", "express-http1-head600") and kernel < CARRIED_SHARE_MIN * (kernel + proxy):
                        raise LoadError(f"the kernel carried {kernel:,} of {kernel + proxy:,} requests; is express on?")
    return report.row(name, unit, samples)


def service() -> str:
    """`express-web` leads to the server of `web` on two ports by a weighted route, so that a split is drawn for each
    request; `web` itself stays in user space."""
    return f"""---
apiVersion: v1
kind: Service
metadata: {{name: express-web, namespace: {NAMESPACE}}}
spec:
  selector: {{app: web}}
  ports: [{{name: main, port: {HTTP_PORT}, targetPort: {HTTP_PORT}, appProtocol: http}}]
---
apiVersion: v1
kind: Service
metadata: {{name: express-aside, namespace: {NAMESPACE}}}
spec:
  selector: {{app: web}}
  ports: [{{name: main, port: {HTTP_PORT}, targetPort: {ASIDE_PORT}, appProtocol: http}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: express, namespace: {NAMESPACE}}}
spec:
  parentRefs: [{{kind: Service, group: "", name: express-web, port: {HTTP_PORT}}}]
  rules:
  - matches: [{{path: {{type: PathPrefix, value: /}}}}]
    backendRefs: [{{name: express-web, port: {HTTP_PORT}, weight: 90}}, {{name: express-aside, port: {HTTP_PORT}, weight: 10}}]
"""
