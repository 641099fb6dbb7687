"""What a neighbour's flood costs a client that asks at a steady rate: its p99 with the flood, and alone (`self`).

The question is what they share: the proxy. Whose program gets a processor first is the node's scheduler's affair, with a mesh
and without; so the victim and its server never wait for one (SCHED_FIFO), alone as well as beside the flood. The proxy does.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rich.console import Console

from bench import report
from bench.load import LoadError
from bench.world import HTTP_PORT, IPERF_PORT, NAMESPACE, REDIS_PORT, World
from lab.process import Process

HERE = Path(__file__).parent
RATE, SECONDS = 200, 4
SETTLE_S = 1.0  # until a flood flows, or has ebbed away
#: flood -> what it is aimed at: never the server of who is measured, whose queue is its own affair
FLOODS = {
    "requests": ("aside", HTTP_PORT),
    "connections": ("aside", HTTP_PORT),
    "sleepers": ("aside", HTTP_PORT),
    "handshakes": ("stream-far", IPERF_PORT),
    "denials": ("redis", REDIS_PORT),
}
FRAMES = ("rapid-reset", "continuation")  # of the other node, at the tunnel's end
PREFIX = "noisy-neighbour-"
NAMES = tuple(PREFIX + flood for flood in (*FLOODS, *FRAMES))


def first(world: World) -> None:
    """The victim's server goes before everybody; the client by its command line."""
    for pid in world.workloads["web"].pids():
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))


def p99_ms(world: World) -> float:
    argv = [sys.executable, str(HERE / "pace.py"), world.address("web"), str(HTTP_PORT), str(RATE), str(SECONDS)]
    done = world.run()(["chrt", "--fifo", "1", *argv], SECONDS + 30)
    if done.returncode or not done.stdout.strip():
        raise LoadError(f"the steady client says {done.stderr.strip()[-300:]}")
    return float(done.stdout)


def begin(flood: str, world: World) -> Process:
    """The flood, with the mesh's default budgets."""
    if flood in FLOODS:
        target, port = FLOODS[flood]
        argv = [sys.executable, str(HERE / "flood.py"), flood, world.address(target), str(port)]
        return world.workloads["noisy"].start(argv, name="flood")
    peer, at = world.workloads["noisy-far"], world.workloads["aside"].addresses[0]
    argv = [
        *(sys.executable, str(HERE / "flood_peer.py"), flood, str(peer.netns), peer.pod.veth),
        *(str(world.lab.paths.agent_state("n2")), f"{NAMESPACE}/noisy-far", at, f"{at}:{HTTP_PORT}"),
        *(f"aside.{NAMESPACE}.mesh.local", f'for="{peer.addresses[0]}:4242"'),
    ]
    return world.lab.nodes["n2"].start(argv, name="flood")


def measure(name: str, world: World, rounds: int, console: Console) -> report.Row:
    """Rounds alternate: alone, beside the flood."""
    flood = name.removeprefix(PREFIX)
    samples: dict[str, list[float]] = {"self": [], "pillion": []}
    with console.status(name):
        first(world)
        p99_ms(world)  # warm
        for _ in range(rounds):
            samples["self"].append(p99_ms(world))
            noise = begin(flood, world)
            try:
                time.sleep(SETTLE_S)
                if not noise.alive:
                    raise LoadError(f"the flood ended: {noise.output()[-300:]}")
                samples["pillion"].append(p99_ms(world))
            finally:
                noise.kill()
            time.sleep(SETTLE_S)
    return report.row(name, "ms p99", samples)
