"""`make bench [ONLY=name,name]`: a table, and bench/results/latest.json."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench import express, neighbour, picture, report
from bench.load import Iperf, LoadError, RedisPing, Run, Wrk
from bench.world import HTTP_PORT, L4_PORT, World, scale_policies, until_it_answers

RESULTS = Path(__file__).parent / "results" / "latest.json"
PICTURE = Path(__file__).parents[1] / "docs" / "bench.svg"
UNITS = {
    "http1-same-node": "requests/s",
    "http1-cross-node": "requests/s",
    "tcp-same-node-rr": "round trips/s",
    "tcp-same-node-stream": "Gbit/s",
    "tcp-cross-node-stream": "Gbit/s",
    "connect-rate": "connections/s",
    "policy-scale": "connections/s",
}
NAMES = (*UNITS, *express.NAMES, *neighbour.NAMES)
POLICIES_MANY, POLICIES_FEW = 10_000, 10

Load = Callable[[Run], float]


def parties(name: str, mesh: World, bare: World, envoys: dict[str, int]) -> dict[str, tuple[Load, Run]]:
    """Who takes part in a row, and with which load."""

    def http(address: str, port: int = HTTP_PORT, close: bool = False) -> Wrk:
        return Wrk(f"http://{address}:{port}/", close=close)

    makers: dict[str, Callable[[World], Load]] = {
        "http1-same-node": lambda w: http(w.address("web")),
        "http1-cross-node": lambda w: http(w.address("web-far")),
        "tcp-same-node-rr": lambda w: RedisPing(w.address("redis")),
        "tcp-same-node-stream": lambda w: Iperf(w.address("stream")),
        "tcp-cross-node-stream": lambda w: Iperf(w.address("stream-far")),
        "connect-rate": lambda w: http(w.address("web-l4"), L4_PORT, close=True),
        "policy-scale": lambda w: http(w.address("many"), L4_PORT, close=True),
    }
    out: dict[str, tuple[Load, Run]] = {"pillion": (makers[name](mesh), mesh.run())}
    if name == "policy-scale":
        return out | {"self": (http(mesh.address("few"), L4_PORT, close=True), mesh.run())}
    out["direct"] = (makers[name](bare), bare.run())
    if port := envoys.get(name):
        out["envoy"] = (Iperf("127.0.0.1", port) if "stream" in name else http("127.0.0.1", port), bare.run())
    return out


def measure(name: str, sides: dict[str, tuple[Load, Run]], rounds: int, console: Console) -> report.Row:
    samples: dict[str, list[float]] = {party: [] for party in sides}
    with console.status(name) as status:
        for load, run in sides.values():
            warm = dataclasses.replace(load, seconds=1) if dataclasses.is_dataclass(load) and hasattr(load, "seconds") else load
            until_it_answers(warm, run)
        for index in range(rounds):
            for party, (load, run) in sides.items():
                status.update(f"{name}: round {index + 1} of {rounds}, {party}")
                samples[party].append(load(run))
    return report.row(name, UNITS[name], samples)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", help=f"comma-separated names of {', '.join(NAMES)}; noisy-neighbour: all of these")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    asked = arguments.only.split(",") if arguments.only else list(NAMES)
    names = [name for each in asked for name in (neighbour.NAMES if each == "noisy-neighbour" else (each,))]
    if unknown := set(names) - set(NAMES):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    console = Console(stderr=True)
    rows, failed = [], False
    with World("bench", mesh=True) as mesh, World("bare", mesh=False) as bare:
        envoys = bare.start_envoys()
        if any(name in express.NAMES for name in names):
            mesh.lab.wait(mesh.lab.apply(express.service()))
        if "policy-scale" in names:
            with console.status(f"applying {POLICIES_MANY:,} policies"):
                for app, count in (("few", POLICIES_FEW), ("many", POLICIES_MANY)):
                    revision = mesh.lab.apply(scale_policies(app, count))
                mesh.lab.wait(revision)
        for name in names:
            try:
                if name in neighbour.NAMES:
                    rows.append(neighbour.measure(name, mesh, arguments.rounds, console))
                    continue
                if name in express.NAMES:
                    rows.append(express.measure(name, mesh, bare, envoys["http1-same-node"], arguments.rounds, console))
                    continue
                rows.append(measure(name, parties(name, mesh, bare, envoys), arguments.rounds, console))
            except LoadError as error:
                failed = True
                console.print(f"[red]{name}[/]: {error}")
    report.show(rows, console)
    report.write(rows, RESULTS)
    picture.write(json.loads(RESULTS.read_text()), PICTURE)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
