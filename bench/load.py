"""Load generators anyone can install, and how to read what they print."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from subprocess import CompletedProcess

Run = Callable[[list[str], float], "CompletedProcess[str]"]  # argv, timeout in seconds; inside the client's workload


class LoadError(RuntimeError):
    """The load tool failed or saw errors: such a round says nothing about speed."""


@dataclass(frozen=True)
class Wrk:
    """Requests a second over keep-alive connections, or one connection a request when `close`."""

    url: str
    seconds: int = 3
    connections: int = 32
    close: bool = False

    def __call__(self, run: Run) -> float:
        argv = ["wrk", "-t1", f"-c{self.connections}", f"-d{self.seconds}s"]
        argv += ["-H", "Connection: close"] if self.close else []
        out = run([*argv, self.url], self.seconds + 20).stdout
        if match := re.search(r"Non-2xx or 3xx responses: (\d+)", out):
            raise LoadError(f"{self.url}: {match[1]} responses were errors")
        if (errors := re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", out)) and (
            int(errors[1]) or int(errors[3]) or int(errors[4]) or (int(errors[2]) and not self.close)
        ):
            raise LoadError(f"{self.url}: {errors[0]}")
        if not (match := re.search(r"Requests/sec:\s+([\d.]+)", out)) or float(match[1]) == 0:
            raise LoadError(f"{self.url}: wrk says\n{out}")
        return float(match[1])


@dataclass(frozen=True)
class RedisPing:
    """Round trips a second on opaque TCP: redis-benchmark's PING on 32 connections."""

    host: str
    port: int = 6379
    requests: int = 200_000

    def __call__(self, run: Run) -> float:
        argv = ["redis-benchmark", "-h", self.host, "-p", str(self.port), "-c", "32", "-n", str(self.requests)]
        out = run([*argv, "-t", "ping_inline", "--csv"], 60).stdout
        if not (match := re.search(r'"PING_INLINE","([\d.]+)"', out)):
            raise LoadError(f"{self.host}: redis-benchmark says\n{out[-500:]}")
        return float(match[1])


@dataclass(frozen=True)
class Iperf:
    """Gbit/s of one TCP stream from client to server."""

    host: str
    port: int = 5201
    seconds: int = 3

    def __call__(self, run: Run) -> float:
        out = run(["iperf3", "-c", self.host, "-p", str(self.port), "-t", str(self.seconds), "-J"], self.seconds + 20).stdout
        report = json.loads(out or "{}")
        try:
            return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9
        except KeyError:
            raise LoadError(f"{self.host}: iperf3 says {report.get('error', out[-300:])}") from None
