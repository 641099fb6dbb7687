"""What a neighbour's flood costs a client that asks at a steady rate: its p99 with the flood, and alone (`self`)."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from bench import report
from bench.load import LoadError
from bench.world import HTTP_PORT, IPERF_PORT, REDIS_PORT, World

HERE = Path(__file__).parent
RATE, SECONDS = 200, 4
#: flood -> what it is aimed at: never the server of who is measured, whose queue is its own affair
FLOODS = {
    "requests": ("aside", HTTP_PORT),
    "connections": ("aside", HTTP_PORT),
    "sleepers": ("aside", HTTP_PORT),
    "handshakes": ("stream-far", IPERF_PORT),
    "denials": ("redis", REDIS_PORT),
}
PREFIX = "noisy-neighbour-"
NAMES = tuple(PREFIX + flood for flood in FLOODS)


def p99_ms(world: World) -> float:
    argv = [sys.executable, str(HERE / "pace.py"), world.address("web"), str(HTTP_PORT), str(RATE), str(SECONDS)]
    done = world.run()(argv, SECONDS + 30)
    if done.returncode or not done.stdout.strip():
        raise LoadError(f"the steady client says {done.stderr.strip()[-300:]}")
    return float(done.stdout)


def measure(name: str, world: World, rounds: int, console: Console) -> report.Row:
    """Rounds alternate; the flood runs with the mesh's default budgets."""
    flood = name.removeprefix(PREFIX)
    target, port = FLOODS[flood]
    argv = [sys.executable, str(HERE / "flood.py"), flood, world.address(target), str(port)]
    samples: dict[str, list[float]] = {"self": [], "pillion": []}
    with console.status(name):
        p99_ms(world)  # warm
        for _ in range(rounds):
            samples["self"].append(p99_ms(world))
            noise = world.workloads["noisy"].start(argv, name="flood")
            try:
                samples["pillion"].append(p99_ms(world))
            finally:
                noise.kill()
    return report.row(name, "ms p99", samples)
