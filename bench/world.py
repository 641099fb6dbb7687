"""The two labs a benchmark compares: one with the mesh, its twin without, the same servers in both."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import TracebackType

from bench import envoy
from bench.load import LoadError, Run
from lab import Lab, Workload

NAMESPACE = "bench"
HTTP_PORT, L4_PORT, ASIDE_PORT, REDIS_PORT, IPERF_PORT = 8080, 8081, 8082, 6379, 5201
LARGE_BYTES = 1 << 20
ENVOY_BIN = Path(".venv/bin/envoy").resolve()

NGINX = """
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 3600s; client_body_temp_path {dir}/b;
  proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  sendfile on; default_type text/plain;
  server {{
    listen 0.0.0.0:8080; listen 0.0.0.0:8081; listen 0.0.0.0:8082;
    location / {{ return 200 "hello from nginx\\n"; }}
    location = /large {{ alias {dir}/large; }}
  }}
}}
"""

#: name, node, what it runs
WORKLOADS = (
    ("client", "n1", ""),
    ("noisy", "n1", ""),
    ("noisy-far", "n2", ""),
    ("aside", "n1", "nginx"),
    ("web", "n1", "nginx"),
    ("web-far", "n2", "nginx"),
    ("redis", "n1", "redis"),
    ("stream", "n1", "iperf"),
    ("stream-far", "n2", "iperf"),
    ("few", "n1", "nginx"),
    ("many", "n1", "nginx"),
)


def service(name: str, port: int, protocol: str, express: str = "auto") -> str:
    return f"""---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  express: "{express}"
  selector: {{app: {name.removesuffix("-l4")}}}
  ports: [{{name: main, port: {port}, targetPort: {port}, appProtocol: {protocol}}}]
"""


def allow(name: str, app: str, principal: str, operation: str = "") -> str:
    to = f"\n    to: [{{operation: {operation}}}]" if operation else ""
    return f"""---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  selector: {{matchLabels: {{app: {app}}}}}
  action: ALLOW
  rules:
  - from: [{{source: {{principals: ["{principal}"]}}}}]{to}
"""


READ_WRITE = 'methods: ["GET", "POST"], paths: ["/*"]'


def client_principal(trust_domain: str = "mesh.local") -> str:
    return f"{trust_domain}/ns/{NAMESPACE}/sa/client"


def resources() -> str:
    """Services and policies of every benchmark but the 10,000."""
    text = service("web", HTTP_PORT, "http", express="off") + service("web-far", HTTP_PORT, "http")
    text += service("web-l4", L4_PORT, "tcp") + service("redis", REDIS_PORT, "tcp")
    text += service("stream", IPERF_PORT, "tcp") + service("stream-far", IPERF_PORT, "tcp")
    text += service("few", L4_PORT, "tcp") + service("many", L4_PORT, "tcp")
    for app in ("redis", "stream", "stream-far"):
        text += allow(app, app, client_principal())
    text += allow("web-http", "web", client_principal(), f'{{ports: ["{HTTP_PORT}", "{ASIDE_PORT}"], {READ_WRITE}}}')
    text += service("aside", HTTP_PORT, "http")
    for app in ("aside", "stream-far"):
        text += allow(f"{app}-noisy", app, f"mesh.local/ns/{NAMESPACE}/sa/noisy")
    text += allow("aside-noisy-far", "aside", f"mesh.local/ns/{NAMESPACE}/sa/noisy-far")
    text += allow("web-l4", "web", client_principal(), f'{{ports: ["{L4_PORT}"]}}')
    text += allow("web-far", "web-far", client_principal(), f'{{ports: ["{HTTP_PORT}"], methods: ["GET"], paths: ["/*"]}}')
    return text


def scale_policies(app: str, count: int) -> str:
    """`count` policies that all select `app`; only the last one's principal is the client."""
    others = "".join(allow(f"{app}-{i:05}", app, f"mesh.local/ns/{NAMESPACE}/sa/other-{i}") for i in range(count - 1))
    return others + allow(f"{app}-last", app, client_principal())


class World:
    """One lab with the benchmark's servers running; a context manager that leaves nothing behind."""

    def __init__(self, name: str, mesh: bool) -> None:
        self.lab = Lab(name)
        self.mesh = mesh
        self.workloads: dict[str, Workload] = {}
        self.scratch = Path(tempfile.mkdtemp(prefix=f"pillion-{name}-"))
        self.scratch.chmod(0o755)

    def __enter__(self) -> World:
        try:
            self.lab.up(nodes=2, mesh=self.mesh)
            for name, node, kind in WORKLOADS:
                workload = self.lab.add_workload(
                    node=node, name=name, namespace=NAMESPACE, service_account=name, labels={"app": name}
                )
                self.workloads[name] = workload
                self._serve(workload, kind)
            if self.mesh:
                self.lab.wait(self.lab.apply(resources()))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, _t: type[BaseException] | None, _v: BaseException | None, _tb: TracebackType | None) -> None:
        self.lab.down()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _serve(self, workload: Workload, kind: str) -> None:
        directory = self.scratch / workload.name
        directory.mkdir()
        if kind == "nginx":
            config = directory / "nginx.conf"
            config.write_text(NGINX.format(dir=directory))
            (directory / "large").write_bytes(bytes(LARGE_BYTES))
            workload.start(["nginx", "-c", str(config), "-e", "stderr"], name="nginx")
        elif kind == "redis":
            workload.start(
                ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", str(directory)],
                name="redis",
            )
        elif kind == "iperf":
            workload.start(["iperf3", "-s"], name="iperf")

    def run(self, workload: str = "client") -> Run:
        def run(argv: list[str], timeout: float) -> CompletedProcess[str]:
            return self.workloads[workload].run(argv, timeout=timeout)

        return run

    def address(self, name: str) -> str:
        """Where the client dials: the service's virtual address with the mesh, the server's own without."""
        if not self.mesh:
            return self.workloads[name.removesuffix("-l4")].addresses[0]
        state = self.lab.controller_api("GET", "/v1/state", None)
        return str(state["items"][f"Service/{NAMESPACE}/{name}"]["vips"][0])

    def start_envoys(self) -> dict[str, int]:
        """Envoys beside client and far servers, one worker each; returns where the client dials, by row."""
        envoy.make_certificate(self.scratch)
        tls = self.scratch
        (tls / "key.pem").chmod(0o644)
        near, far, stream = (self.workloads[n].addresses[0] for n in ("web", "web-far", "stream-far"))
        ports = {"http1-same-node": 10001, "http1-cross-node": 10002, "tcp-cross-node-stream": 10003}
        source = envoy.write_config(
            self.scratch / "source.json",
            [
                envoy.listener("same", "127.0.0.1", 10001, envoy.http_filter("near")),
                envoy.listener("cross", "127.0.0.1", 10002, envoy.http_filter("far")),
                envoy.listener("stream", "127.0.0.1", 10003, envoy.tcp_filter("stream")),
            ],
            [
                envoy.cluster("near", near, HTTP_PORT),
                envoy.cluster("far", far, 15008, tls=tls, http2=True),
                envoy.cluster("stream", stream, 15008, tls=tls),
            ],
        )
        self._envoy("client", source)
        http = envoy.listener("in", far, 15008, envoy.http_filter("app", codec="HTTP2"), tls=tls)
        self._envoy("web-far", envoy.write_config(self.scratch / "far.json", [http], [envoy.cluster("app", far, HTTP_PORT)]))
        tcp = envoy.listener("in", stream, 15008, envoy.tcp_filter("app"), tls=tls)
        self._envoy(
            "stream-far", envoy.write_config(self.scratch / "stream.json", [tcp], [envoy.cluster("app", stream, IPERF_PORT)])
        )
        return ports

    def _envoy(self, workload: str, config: Path) -> None:
        argv = [str(ENVOY_BIN), "-c", str(config), "--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
        self.workloads[workload].start(argv, name="envoy")


def until_it_answers(load: Callable[[Run], float], run: Run, deadline_s: float = 20.0) -> None:
    """Warm up: servers may still be starting. Raises the last LoadError past the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        try:
            load(run)
            return
        except LoadError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
