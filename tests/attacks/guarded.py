"""Static sites with a part that a policy closes: nginx and Python's http.server as they are on this node, Node on the other."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.attacks.actions import PROGRAMS
from tests.e2e.mesh import Mesh, policy, service

PORT = 8081
HEADER = "x-role"
SERVERS = ("web", "echo", "far")  # nginx, Python, Node on the other node
OPEN, SECRET = "OPEN", "SECRET"

NGINX = """daemon off; user root; worker_processes 1; pid {dir}/guarded.pid; error_log /dev/null;
events {{ worker_connections 256; }}
http {{ access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
 uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
 server {{ listen [::]:8081 ipv6only=off; root {site}; underscores_in_headers on; }} }}
"""
CLOSED = f'{{ports: ["{PORT}"], paths: ["/admin", "/admin/*"]}}'
BY_HEADER = f'{{ports: ["{PORT}"], headers: [{{name: {HEADER}, value: root}}]}}'


@dataclass(frozen=True)
class Answer:
    status: int
    reason: str
    body: str


def ask(
    mesh: Mesh, server: str, requests: Sequence[str], *, family: int = 0, wait_s: float = 5.0, who: str = "client"
) -> list[Answer]:
    """The answers, each request on a connection of its own."""
    question = {"host": mesh.w[server].addresses[family], "port": PORT, "requests": requests, "wait_s": wait_s}
    done = mesh.w[who].run([sys.executable, str(PROGRAMS / "ask.py")], input=json.dumps(question), timeout=60)
    assert done.stdout, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return [Answer(**each) for each in answers]


@contextmanager
def guarded(mesh: Mesh, protocol: str = "http") -> Iterator[Mesh]:
    """The sites stand, /admin is denied to everyone, and who says `x-role: root` is denied. `protocol` "": it is not told."""
    site = mesh.scratch / "site"
    (site / "admin").mkdir(parents=True, exist_ok=True)
    (site / "index.html").write_text(OPEN)
    (site / "admin" / "index.html").write_text(SECRET)
    for each in (site, site / "admin", *site.rglob("*.html")):
        each.chmod(0o755)  # nginx's worker is not root
    config = mesh.scratch / "guarded.conf"
    started = []
    for name in SERVERS:
        directory = mesh.scratch / f"guarded-{name}"
        directory.mkdir(exist_ok=True)
        config = directory / "nginx.conf"
        config.write_text(NGINX.format(dir=directory, site=site))
        nginx = ["nginx", "-c", str(config), "-e", "stderr"]
        python = [sys.executable, "-m", "http.server", str(PORT), "--bind", "::", "--directory", str(site)]
        node = [shutil.which("node") or "nodejs", str(PROGRAMS / "site.mjs"), str(PORT), str(site)]
        started.append(mesh.w[name].start({"echo": python, "far": node}.get(name, nginx), name="guarded"))
        mesh.listening(name, PORT)
    resources = {"Service": "", "AuthorizationPolicy": ""}
    for name in SERVERS:
        declared = service(f"guarded-{name}", name, PORT, "http")
        resources["Service"] += declared if protocol else declared.replace(", appProtocol: http", "")
        for number, operation in enumerate((CLOSED, BY_HEADER)):
            text = policy(f"guarded-{name}-{number}", name, action="DENY", who="*", operation=operation)
            resources["AuthorizationPolicy"] += text
    mesh.apply("".join(resources.values()))
    try:
        yield mesh
    finally:
        for process in started:
            process.stop()
        for name in SERVERS:
            mesh.delete("Service", f"guarded-{name}")
            for number in (0, 1):
                mesh.delete("AuthorizationPolicy", f"guarded-{name}-{number}")
