"""What a neighbour's flood costs a client that asks at a steady rate: its p99 with the flood, and alone (`self`).

The question is what they share: the proxy. Whose program gets a processor first is the node's scheduler's affair, with a mesh
and without; so the victim and its server never wait for one (SCHED_FIFO), and the flood and its servers have all but one of
them, as a limit of the node's would leave them, alone as well as beside the flood. The proxy has no processor to itself: it has
the weight that its unit gives it (deploy/systemd/pillion-proxy.slice), and waits as others do.

Each row also holds, or it fails: the victim's worker stays below what one identity's budget allows; what the flood was refused is
counted, once each; and what an identity was refused for its budget is what was denied for that reason. Its line says how much.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
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
CONNECTIONS = {"requests": 32, "connections": 401, "sleepers": 200}  # that flood.py holds; of the others' none stays
#: what one identity may make a worker keep: docs/budgets.md; and what a worker itself grows by
HELD_BYTES, CONNECTION_BYTES, OWN_BYTES = 64 << 20, 400 << 10, 24 << 20
#: the kernel's reasons that are no denials
ADMISSIONS = frozenset(
    {"native_allowed", "captured", "outbound_allowed", "ingress_allowed", "proxy_dial", "events_sampled", "events_lost"}
)
#: what the flood hears of, by reason; of the others, of every denial. One that hears its server's resets, too, hears no fewer
HEARD = {"denials": {"policy_denied"}, "rapid-reset": {"hbone_error"}, "continuation": {"hbone_error"}}
ENDS_S = 40.0
HEARS_MORE = frozenset({"handshakes"})
COUNTED_S = 3.0  # until the last denial is counted
FORGET_PEAK = "5"  # to /proc/<pid>/clear_refs
PROXY_NICE = -10  # nine times the usual weight; the unit's CPUWeight= is ten times
AUTOGROUPS = Path("/proc/sys/kernel/sched_autogroup_enabled")
PREFIX = "noisy-neighbour-"
NAMES = tuple(PREFIX + flood for flood in (*FLOODS, *FRAMES))


def processors() -> list[int]:
    """Those of the flood."""
    all_of_them = sorted(os.sched_getaffinity(0))
    return all_of_them[1:] or all_of_them


def place(world: World) -> None:
    """The victim's server goes before everybody (the client by its command line), the flood's keep to their processors."""
    for pid in world.workloads["web"].pids():
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
    theirs = [pid for target, _port in FLOODS.values() for pid in world.workloads[target].pids()]
    for pid in (*theirs, *world.lab.pids("n2", "proxy-worker")):  # the other node would have processors of its own
        os.sched_setaffinity(pid, processors())
    (worker,) = world.lab.pids("n1", "proxy-worker")
    autogroup = Path(f"/proc/{worker}/autogroup")
    if autogroup.exists() and AUTOGROUPS.read_text().strip() == "1":  # each session is a group then, and nice counts inside of it
        autogroup.write_text(str(PROXY_NICE))
    else:
        os.setpriority(os.PRIO_PROCESS, worker, PROXY_NICE)


def p99_ms(world: World) -> float:
    argv = [sys.executable, str(HERE / "pace.py"), world.address("web"), str(HTTP_PORT), str(RATE), str(SECONDS)]
    done = world.run()(["chrt", "--fifo", "1", *argv], SECONDS + 30)
    if done.returncode or not done.stdout.strip():
        raise LoadError(f"the steady client says {done.stderr.strip()[-300:]}")
    return float(done.stdout)


def tell_agent(flood: str, world: World, number: int) -> None:
    """The agent of a node that was taken over does not put back what was taken out there."""
    if flood in FRAMES:
        for pid in world.lab.pids("n2", "agent"):
            os.kill(pid, number)


def begin(flood: str, world: World) -> Process:
    """The flood, with the mesh's default budgets."""
    there = ("taskset", "-c", ",".join(map(str, processors())))
    if flood in FLOODS:
        target, port = FLOODS[flood]
        argv = [*there, sys.executable, str(HERE / "flood.py"), flood, world.address(target), str(port)]
        return world.workloads["noisy"].start(argv, name="flood")
    peer, at = world.workloads["noisy-far"], world.workloads["aside"].addresses[0]
    argv = [
        *there,
        *(sys.executable, str(HERE / "flood_peer.py"), flood, str(peer.netns), peer.pod.veth),
        *(str(world.lab.paths.agent_state("n2")), f"{NAMESPACE}/noisy-far", at, f"{at}:{HTTP_PORT}"),
        *(f"aside.{NAMESPACE}.mesh.local", f'for="{peer.addresses[0]}:4242"'),
    ]
    return world.lab.nodes["n2"].start(argv, name="flood")


class Held:
    """The victim's worker, and what its node denied, from now on."""

    def __init__(self, world: World) -> None:
        self._world = world
        (self._worker,) = world.lab.pids("n1", "proxy-worker")
        Path(f"/proc/{self._worker}/clear_refs").write_text(FORGET_PEAK)
        self._bytes, (self._denied, self._refused) = self._memory("VmRSS"), self._counted()

    def _memory(self, field: str) -> int:
        lines = Path(f"/proc/{self._worker}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))

    def _counted(self) -> tuple[Counter[str], Counter[str]]:
        """By reason: denials of kernel and proxy, and refusals over an identity's budget."""
        denied: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        for family in text_string_to_metric_families(self._world.lab.agent_api("n1", "GET", "/metrics")):
            for sample in family.samples:
                if sample.name in ("pillion_datapath_total", "pillion_denied_total"):
                    denied[sample.labels["reason"]] += int(sample.value)
                elif sample.name == "pillion_budget_refused_total":
                    refused[sample.labels["reason"]] += int(sample.value)
        return denied, refused

    def _since(self) -> tuple[dict[str, int], dict[str, int]]:
        denied, refused = self._counted()
        new = {reason: count for reason, count in (denied - self._denied).items() if reason not in ADMISSIONS}
        return new, dict(refused - self._refused)

    def judge(self, flood: str, heard: int) -> str:
        """One line about it. ``heard``: how often the flood says it was refused. Raises LoadError."""
        grown = self._memory("VmHWM") - self._bytes
        most = HELD_BYTES + CONNECTION_BYTES * CONNECTIONS.get(flood, 0) + OWN_BYTES
        if grown > most:
            raise LoadError(f"the worker grew by {grown >> 20} MiB, {most >> 20} MiB are allowed")
        end = time.monotonic() + COUNTED_S
        while True:
            denied, refused = self._since()
            counted = sum(count for reason, count in denied.items() if reason in HEARD.get(flood, denied))
            told = counted == heard or (flood in HEARS_MORE and counted < heard)
            if told and all(denied.get(reason, 0) == count for reason, count in refused.items()):
                return f"memory +{grown >> 20} of {most >> 20} MiB; refused {heard}; denied {denied or 'nothing'}"
            if time.monotonic() > end:
                raise LoadError(f"the flood was refused {heard} times; counted are {denied}, for budgets {refused}")
            time.sleep(0.1)


def end(noise: Process) -> int:
    """How often the flood was refused, as it says itself. Raises LoadError."""
    noise.signal(signal.SIGTERM)
    noise.wait(ENDS_S)
    try:
        return int(json.loads(noise.output().splitlines()[-1])["refused"])
    except (LookupError, ValueError) as error:
        raise LoadError(f"the flood does not say how often it was refused: {noise.output()[-300:]}") from error


def measure(name: str, world: World, rounds: int, console: Console) -> report.Row:
    """Rounds alternate: alone, beside the flood."""
    flood = name.removeprefix(PREFIX)
    samples: dict[str, list[float]] = {"self": [], "pillion": []}
    said = ""
    with console.status(name):
        place(world)
        p99_ms(world)  # warm
        for _ in range(rounds):
            samples["self"].append(p99_ms(world))
            held = Held(world)
            tell_agent(flood, world, signal.SIGSTOP)
            noise = begin(flood, world)
            try:
                time.sleep(SETTLE_S)
                if not noise.alive:
                    raise LoadError(f"the flood ended: {noise.output()[-300:]}")
                samples["pillion"].append(p99_ms(world))
                said = held.judge(flood, end(noise))
            finally:
                noise.kill()
                tell_agent(flood, world, signal.SIGCONT)
            time.sleep(SETTLE_S)
    console.print(f"{name}: {said}")
    return report.row(name, "ms p99", samples)
