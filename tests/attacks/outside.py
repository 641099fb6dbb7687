"""What the rows about names and egress share: somebody outside the mesh, on n2's host, with the resolver that the mesh asks; it
is the attacker's. And a workload's questions."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lab.process import Process
from tests.attacks.actions import PROGRAMS, run
from tests.e2e.mesh import Mesh, until

NODE = "n2"
PORT = 5300
SERVERS = {
    "v4": "10.0.0.53",
    "v6": "fd00::53",
    "mapped": "::ffff:10.0.0.53",
}  # nobody is there: whichever a workload asks, the mesh answers
RIGHT, FORGED = "93.184.215.14", "192.88.99.66"

CONFIG = """---
apiVersion: mesh.pillion.dev/v1alpha1
kind: MeshConfig
metadata: {{name: mesh}}
spec:
  dnsUpstreams: ["{v4}:{port}", "[{v6}]:{port}"]
  dnsForward: {forward}
"""


@contextmanager
def asking_outside(
    mesh: Mesh, forward: str, *resources: str, beside: dict[str, tuple[object, ...]] | None = None
) -> Iterator[Process]:
    """The resolver, which may be asked for `forward` (YAML) meanwhile; what else is applied its user takes away. `beside`: other
    programs on that host, by name, with their arguments; each says when it is ready."""
    host = mesh.lab.nodes[NODE]
    v4, v6 = host.addresses[:2]
    programs = {"resolver": ("resolver.py", PORT, v4, v6), **(beside or {})}
    running = []
    try:
        for name, (program, *arguments) in programs.items():
            running.append(host.start([sys.executable, str(PROGRAMS / str(program)), *map(str, arguments)], name=name))
        for process in running:
            until(lambda process=process: "ready" in process.output(), f"{process.name} is not ready")  # type: ignore[misc]  # bound early
        mesh.apply(CONFIG.format(v4=v4, v6=v6, port=PORT, forward=forward) + "".join(resources))
        yield running[0]
        mesh.lab.wait(mesh.lab.delete("MeshConfig", "", "mesh"))
    finally:
        for process in running:
            process.kill()


@dataclass
class Answer:
    rcode: str
    answer: list[str]
    error: str


def look_up(mesh: Mesh, who: str, *names: str, kind: str = "A", family: str = "v4", by: str = "udp") -> Answer:
    return Answer(**run(mesh.w[who], "lookup.py", SERVERS[family], 53, by, kind, *names))


def packed(address: str) -> str:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address).hex()
