"""The shop: who is in it, and the questions the scenes ask of it, wherever it runs."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lab.capture import Capture
from mesh.model import VIP4, VIP6

HERE = Path(__file__).parent
SERVICES = HERE / "services"
NAMESPACE = "shop"
# Which node's each is (`near`: the client's), version, port. Those of one node may share its address
CATALOGS = {"catalog-v1a": ("near", "v1", 8000), "catalog-v1b": ("far", "v1", 8000), "catalog-v2": ("far", "v2", 8001)}
PORTS = {"front": 8080, **{name: port for name, (_, _, port) in CATALOGS.items()}, "redis": 6379, "mariadb": 3306}


class NotSeen(Exception):
    """A scene did not show what it should; the message says what was observed instead."""


class Member(Protocol):
    """One workload of the shop."""

    @property
    def addresses(self) -> Sequence[str]: ...

    @property
    def address(self) -> str: ...

    def run(self, argv: Sequence[str], *, timeout: float | None = 90.0) -> subprocess.CompletedProcess[str]:
        """Where it is in the mesh."""


class Shop(ABC):
    """`near`: the node of client, front, redis and catalog-v1a; `far`: of the others."""

    near: str
    far: str
    names: tuple[str, ...]  # by which the client finds the catalog
    shown: str  # whose certificate is renewed before everybody's eyes,
    shown_as: tuple[str, str]  # its node and its workload there
    stranger: tuple[str, str]  # a node, and whom a program outside the mesh dials from there

    @abstractmethod
    def __getitem__(self, name: str) -> Member: ...

    @abstractmethod
    def agent_api(self, node: str, method: str, path: str) -> Any:
        """Of `near`, and of `far` where that can be asked."""

    @abstractmethod
    def outside(self, node: str, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run on a node, outside the mesh."""

    @abstractmethod
    def capture(self, node: str) -> Capture:
        """Frames between the nodes, as `node` sees them."""

    @abstractmethod
    def why(self, *question: str) -> dict[str, Any] | None:
        """`pillion policy why … -o json`; None where nobody can ask the controller."""

    @abstractmethod
    def kill(self, name: str) -> None:
        """With SIGKILL; it stays away until `restore`."""

    @abstractmethod
    def restore(self, name: str) -> None:
        """Until it listens."""

    @abstractmethod
    def rotate(self) -> None:
        """New certificates for all workloads, on each node that can be asked."""

    @abstractmethod
    def certificate(self) -> tuple[str, str]:
        """(serial, URI) of the certificate that `shown` shows on :15008 to anyone who asks."""

    @abstractmethod
    def in_the_clear(self, marker: str, requests: int) -> int:
        """In how many frames the capture finds the marker when it is sent without the mesh."""

    @abstractmethod
    def dropped(self) -> float | None:
        """Packets that the agent of the one dialled by `stranger` dropped as plaintext; None where that cannot be asked."""

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

    def load(
        self, source: str, host: str, path: str, amount: str, connections: int = 1, body: str = "", *, begun: Path | None = None
    ) -> dict[str, Any]:
        """Runs services/load.py to its end; it makes the file `begun` with its first answer."""
        argv = [sys.executable, str(SERVICES / "load.py"), host, path, amount, str(connections), body]
        argv += [str(begun)] if begun else []
        done = self[source].run(argv, timeout=120)
        if done.returncode != 0:
            raise NotSeen(f"the load from {source} failed: {done.stderr[-400:]}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def metric(self, node: str, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels, from the node's agent."""
        total = 0.0
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in str(self.agent_api(node, "GET", "/metrics")).splitlines():
            if line.split("{")[0].split(" ")[0] == name and all(want in line for want in wanted):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def serial(self, node: str, name: str) -> str:
        """Of a workload's certificate, from its node's agent."""
        workloads = self.agent_api(node, "GET", "/v1/status")["workloads"]
        return next((str((each.get("svid") or {}).get("serial")) for each in workloads if each["name"] == name), "")

    def flows(self, node: str, limit: int = 500) -> list[dict[str, Any]]:
        answer = self.agent_api(node, "GET", f"/v1/flows?limit={limit}")
        if isinstance(answer, dict):
            return [answer]
        return [json.loads(line) for line in str(answer or "").splitlines()]


def is_virtual(address: str) -> bool:
    """Whether an address is of the mesh's virtual ranges."""
    ip = ipaddress.ip_address(address)
    return ip in (VIP4 if ip.version == 4 else VIP6)
