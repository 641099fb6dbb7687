"""What the attacks on express share: a service that the kernel carries, one of two servers, and a client that attacks."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.attacks.actions import PROGRAMS, run
from tests.e2e import express
from tests.e2e.express import NAME, PORT
from tests.e2e.mesh import Mesh, policy, service, until

ROUTE = f"""---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: two, namespace: shop}}
spec:
  parentRefs: [{{kind: Service, group: "", name: {NAME}, port: {PORT}}}]
  rules:
  - matches: [{{path: {{type: PathPrefix, value: /b}}}}]
    backendRefs: [{{name: forger, port: {PORT}}}]
  - matches: [{{path: {{type: PathPrefix, value: /}}}}]
    backendRefs: [{{name: {NAME}, port: {PORT}}}]
"""


@contextmanager
def carried(mesh: Mesh, *accounts: str) -> Iterator[Mesh]:
    """The exact server, and a kernel that is used to it."""
    with express.exact(mesh, accounts=("client", *accounts)):
        express.warm(mesh)
        yield mesh


@contextmanager
def two(mesh: Mesh) -> Iterator[Mesh]:
    """Requests below /b go to a server that speaks out of turn, all others to the exact one."""
    with ExitStack() as stack:
        stack.enter_context(carried(mesh))
        workload = mesh.lab.add_workload("n1", "forger", "shop", "forger", {"app": "forger"})
        mesh.w["forger"] = workload
        stack.callback(lambda: mesh.w.pop("forger").remove())
        workload.start([sys.executable, str(PROGRAMS / "forger.py"), str(PORT)], name="server")
        mesh.listening("forger", PORT)
        mesh.apply(service("forger", "forger", PORT, "http") + policy("forger", "forger") + ROUTE)
        for kind, name in (("Service", "forger"), ("AuthorizationPolicy", "forger"), ("HTTPRoute", "two")):
            stack.callback(mesh.delete, kind, name)
        yield mesh


def attack(
    mesh: Mesh, mode: str, *, who: str = "client", host: str = f"{NAME}.shop.mesh", port: int = PORT, **options: Any
) -> Any:
    """What `programs/paired.py` found."""
    question = json.dumps({"host": host, "port": port, "mode": mode, **options})
    return run(mesh.w[who], "paired.py", question, timeout_s=180)


def on_leg(mesh: Mesh, mode: str, **options: Any) -> Any:
    """The same from the other node, on a connection that goes on with its warming up until it has got a leg."""
    made = express.pairings(mesh, "leg_made", "n2")
    go = mesh.scratch / f"leg-{mode}-{secrets.token_hex(4)}"
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(attack, mesh, mode, who="far-client", until=str(go), **options)
        try:
            until(lambda: found.done() or express.pairings(mesh, "leg_made", "n2") > made, "it gets no leg")
        finally:
            go.touch()
        result = found.result()
    assert express.pairings(mesh, "leg_made", "n2") > made, result
    return result
