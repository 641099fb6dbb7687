"""The shop on hosts where deploy/shop.sh put it as systemd services, asked from the one where its client runs."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab import api
from lab.capture import Capture
from lab.demo import wire
from lab.demo.shop import CATALOGS, NAMESPACE, PORTS, NotSeen, Shop
from lab.pace import SLOW

AGENT = Path("/run/pillion/agent.sock")
NETNS = Path("/proc/self/ns/net")
LISTEN_TIMEOUT_S = 60.0
DISCARD_PORT = 9
STARTS_S = 20.0  # of `pillion run`, until what it runs is enforced
UNIT_S = 120.0


def systemctl(*arguments: str) -> None:
    """To its end, which for an enrolled unit may be long: it waits for its agent. Raises NotSeen."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=UNIT_S * SLOW, check=False)
    if done.returncode != 0:
        raise NotSeen(f"systemctl {' '.join(arguments)}: {done.stderr.strip()[-300:]}")


class Hosted:
    """A workload of one of the hosts, whose address it has. Programs run as such on this host alone."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address, self.addresses = name, address, (address,)

    def run(self, argv: Sequence[str], *, timeout: float | None = 90.0) -> subprocess.CompletedProcess[str]:
        pillion = [sys.executable, "-P", "-m", "pillion", "run", "--service", self.name, "--namespace", NAMESPACE, "--", *argv]
        timeout = timeout and (timeout + STARTS_S) * SLOW
        done = subprocess.run(pillion, capture_output=True, text=True, timeout=timeout, check=False)
        said = [line for line in done.stderr.splitlines() if not line.startswith("pillion: ")]
        return subprocess.CompletedProcess(argv, done.returncode, done.stdout, "\n".join(said))


class HostShop(Shop):
    """`hosts`: node -> IPv4 address, this host first. The controller is another machine, whose operator is not asked."""

    names = ("catalog.shop.mesh",)  # a host has its own resolv.conf, without the mesh's search list
    shown = "catalog-v1a"

    def __init__(self, hosts: Mapping[str, str]) -> None:
        self.near, self.far = hosts
        self.addresses = dict(hosts)
        self.stranger = (self.near, "catalog-v1b")
        self.shown_as = (self.near, f"shop-{self.shown}-{self.near}")

    def __getitem__(self, name: str) -> Hosted:
        far = name == "mariadb" or CATALOGS.get(name, ("near",))[0] == "far"
        return Hosted(name, self.addresses[self.far if far else self.near])

    def agent_api(self, node: str, method: str, path: str) -> Any:
        if node != self.near:
            raise NotSeen(f"nobody asks {node}'s agent from {self.near}")
        return api.call(AGENT, method, path)

    def outside(self, node: str, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if node != self.near:
            raise NotSeen(f"nobody runs anything on {node} from {self.near}")
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)

    def capture(self, node: str) -> Capture:  # noqa: ARG002  # the other end of the same wire
        own = self.addresses[self.near]
        links = json.loads(subprocess.run(["ip", "-json", "address"], capture_output=True, text=True, check=True).stdout)
        for link in links:
            if any(each["local"] == own for each in link["addr_info"]):
                return Capture(NETNS, link["ifname"])
        raise NotSeen(f"no interface of this host has {own}")

    def why(self, *question: str) -> None:  # noqa: ARG002
        return None

    def kill(self, name: str) -> None:
        systemctl("kill", "--signal=KILL", f"shop-{name}.service")
        systemctl("stop", f"shop-{name}.service")  # or systemd starts it again at once

    def restore(self, name: str) -> None:
        systemctl("start", f"shop-{name}.service")
        deadline = time.monotonic() + LISTEN_TIMEOUT_S
        while not self.outside(self.near, ["ss", "-Htln", f"sport = :{PORTS[name]}"]).stdout.strip():
            if time.monotonic() > deadline:
                raise NotSeen(f"{name} does not listen on port {PORTS[name]}; see: journalctl -u shop-{name}")
            time.sleep(0.1)

    def rotate(self) -> None:
        self.agent_api(self.near, "POST", "/v1/rotate")

    def certificate(self) -> tuple[str, str]:
        return wire.certificate(lambda argv: self.outside(self.near, argv), self[self.shown].address)

    def in_the_clear(self, marker: str, requests: int) -> int:
        """As datagrams to where nobody listens."""
        with self.capture(self.near) as seen, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(requests):
                sock.sendto(marker.encode(), (self.addresses[self.far], DISCARD_PORT))
        return seen.contains(marker.encode())

    def dropped(self) -> None:
        return None
