"""Two services over the same server: one that user space carries, one that the kernel may. The same exchanges through both, and
what client, server and counters make of them."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from mesh.express.program import Program, Refusal, compile_program
from mesh.model import Item, Workload
from mesh.policy import Peer, PolicySet
from mesh.routing import RouteTable
from tests.e2e.answers import Plans
from tests.e2e.exchanges import Sent
from tests.e2e.mesh import NS, PROGRAMS, TRUST_DOMAIN, Mesh, until

CLIENT, SERVER, PORT = "xd-client", "xd-server", 80
SIDES = (("xd-slow", "off", 8090), ("xd-fast", "auto", 8092))  # and the port behind: their other backend
BODY_BYTES_MAX = 64 << 10  # of a request that the kernel carries
CONNECTIONS, PART = 24, 10_000
WARM_SHARE, WARM_S = 0.7, 60.0  # of what is asked; all connections but one would carry less

SERVICE = """---
apiVersion: v1
kind: Service
metadata: {{name: {name}{suffix}, namespace: shop}}
spec:
  express: "{express}"
  selector: {{app: xd-server}}
  ports: [{{name: main, port: 80, targetPort: {port}, appProtocol: http}}]
"""
ROUTE = """---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: shop}}
spec:
  parentRefs: [{{kind: Service, group: "", name: {name}, port: 80}}]
  rules:
  - matches:
    - {{path: {{type: PathPrefix, value: /a}}, headers: [{{name: x-variant, value: b}}]}}
    - {{path: {{type: PathPrefix, value: /b}}, headers: [{{name: x-variant, value: b}}]}}
    backendRefs: [{{name: {name}-aside, port: 80}}]
  - matches: [{{path: {{type: PathPrefix, value: /only}}}}]
    backendRefs: [{{name: {name}, port: 80}}]
  - matches: [{{path: {{type: Exact, value: /none}}}}]
    backendRefs: []
  - matches: [{{path: {{type: PathPrefix, value: /a}}}}, {{path: {{type: PathPrefix, value: /b}}}}]
    backendRefs: [{{name: {name}, port: 80, weight: 70}}, {{name: {name}-aside, port: 80, weight: 30}}]
"""
POLICY = f"""---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: xd, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: xd-server}}}}
  rules:
  - from: [{{source: {{principals: ["{TRUST_DOMAIN}/ns/{NS}/sa/{CLIENT}"]}}}}]
    to: [{{operation: {{methods: [GET, HEAD, POST, PUT, DELETE], paths: ["/*"]}}}}]
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: xd-not, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: xd-server}}}}
  action: DENY
  rules:
  - to:
    - operation: {{paths: ["/a/private*", "/b/secret"]}}
    - operation: {{hosts: [bad.example]}}
    - operation: {{headers: [{{name: x-deny, value: "1"}}]}}
"""
NAMES = ("xd", "xd-not")


class _State(msgspec.Struct):
    revision: int
    items: dict[str, Item]


@dataclass
class Found:
    """Of one run. ``wrong``: what differs, in sentences; nothing else may be wrong with it."""

    exchanges: int = 0
    expressible: int = 0
    carried: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    connections: tuple[int, int] = (0, 0)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        slow, fast = self.seconds
        return (
            f"{self.exchanges:,} exchanges over {self.connections[1]:,} connections: {self.expressible:,} expressible, "
            f"{self.carried:,} carried by the kernel; "
            f"{slow:.1f} s in user space, {fast:.1f} s with it; {len(self.wrong)} kinds of differences"
        )


class Twins:
    """The two services, their server, and their client."""

    def __init__(self, mesh: Mesh, plans: Plans) -> None:
        self.mesh, self.lab, self.plans = mesh, mesh.lab, plans
        self.files = mesh.scratch / "differential"

    @contextmanager
    def up(self) -> Iterator[Twins]:
        self.files.mkdir(exist_ok=True)
        (self.files / "plans").write_bytes(pickle.dumps(self.plans.all))
        specs = ({"node": "n1", "name": n, "namespace": NS, "service_account": n, "labels": {"app": n}} for n in (CLIENT, SERVER))
        made = self.lab.add_workloads(specs)  # type: ignore[arg-type]  # a TypedDict's literal
        self.client, self.host = made
        try:
            places = [f"{port + more}:{name}/{more}" for name, _, port in SIDES for more in (0, 1)]
            program = str(PROGRAMS / "differential_server.py")
            argv = [sys.executable, program, str(self.files / "plans"), str(self.files / "seen.json"), *places]
            self.server = self.host.start(argv, name="differential-server")
            text = POLICY
            for name, express, port in SIDES:
                text += SERVICE.format(name=name, suffix="", express=express, port=port)
                text += SERVICE.format(name=name, suffix="-aside", express=express, port=port + 1) + ROUTE.format(name=name)
            self.mesh.apply(text)
            yield self
        finally:
            for name in NAMES:
                self.mesh.delete("AuthorizationPolicy", name)
            for name, _, _ in SIDES:
                self.mesh.delete("HTTPRoute", name)
                self.mesh.delete("Service", name)
                self.mesh.delete("Service", f"{name}-aside")
            for workload in made:
                workload.remove()

    def program(self) -> Program:
        """What the compiler makes of the fast one, for this client."""
        raw = json.dumps(self.lab.controller_api("GET", "/v1/state", None))
        state = msgspec.json.decode(raw, type=_State).items
        caller = state[f"Workload/{NS}/{CLIENT}"]
        assert isinstance(caller, Workload)
        local = {key for key, item in state.items() if isinstance(item, Workload) and item.node == "n1"}
        peer = Peer(f"spiffe://{TRUST_DOMAIN}/ns/{NS}/sa/{CLIENT}", caller.identity, "")
        key = f"Service/{NS}/{SIDES[1][0]}"
        found = compile_program(state, RouteTable(state), PolicySet(state), peer=peer, service_key=key, port=PORT, local=local)
        assert not isinstance(found, Refusal), found
        return found

    def address(self, name: str) -> tuple[str, int]:
        state = self.lab.controller_api("GET", "/v1/state", None)
        return str(state["items"][f"Service/{NS}/{name}"]["vips"][0]), PORT

    @contextmanager
    def client_program(self, connections: int = CONNECTIONS) -> Iterator[Client]:
        """It keeps its connections from run to run."""
        addresses = [self.address(name) for name, _, _ in SIDES]
        client = Client(self, {"names": [name for name, _, _ in SIDES], "addresses": addresses, "connections": connections})
        try:
            yield client
        finally:
            client.close()

    def run(
        self,
        exchanges: list[Sent],
        count: int,
        *,
        connections: int = CONNECTIONS,
        part: int = PART,
        between: Any = None,
        counted_s: float = 3.0,
        warm: Sequence[Sent] = (),
    ) -> Found:
        """The list, then over and over what is not `once`, until `count`. ``between``: called after the first part;
        ``counted_s``: how long to wait for counts that are missing; ``warm``: asked first, until the kernel carries most."""
        order = list(range(len(exchanges)))
        again = [place for place, sent in enumerate(exchanges) if not sent.once]
        while len(order) < count:
            order += again[: count - len(order)]
        program = self.program()
        flags = [expressible(program, sent) for sent in exchanges]
        before = Counts.read(self.mesh)
        with self.client_program(connections) as client:
            first = self._warmed(client, list(warm)) if warm else []
            found, last = client.run(exchanges, order, part, between)
        codes = [dict(sum((Counter(one[side]) for one in (*first, last)), Counter())) for side in range(len(SIDES))]
        found.exchanges = sum(len(exchanges[place].heads) for place in order)
        found.expressible = sum(flags[place] for place in order)
        self._compare(found, codes, before, counted_s)
        return found

    def _warmed(self, client: Client, exchanges: list[Sent]) -> list[list[dict[str, int]]]:
        """A connection is paired when it lasts, and when node and agent have found the time: until then, however long that is
        on a busy machine. The codes of each turn."""
        turns: list[list[dict[str, int]]] = []

        def carries() -> bool:
            before = Counts.read(self.mesh).express["carried"]
            found, codes = client.run(exchanges, list(range(len(exchanges))))
            assert not found.wrong, found.wrong
            turns.append(codes)
            return Counts.read(self.mesh).express["carried"] - before >= WARM_SHARE * len(exchanges)

        until(carries, "the kernel carries too little", WARM_S)
        return turns

    def seen(self) -> list[str]:
        """What the server says of one part."""
        path = self.files / "seen.json"
        path.unlink(missing_ok=True)
        self.server.signal(signal.SIGUSR1)
        until(path.exists, "the server does not report", every_s=0.001)
        report = json.loads(path.read_text())
        if not report["differing"]:
            return []
        return [f"the server saw {report['differing']} differences, among them {json.dumps(report['differences'], indent=1)}"]

    def _compare(self, found: Found, codes: list[dict[str, int]], before: Counts, counted_s: float) -> None:
        """Of the counters. The proxy's come with its next scrape: what is still missing is waited for."""
        asked = sum(sum(side.values()) for side in codes)

        def settled() -> Counts | None:
            now = Counts.read(self.mesh) - before
            return now if sum(now.requests.values()) >= asked else None

        try:
            counts = until(settled, "not all requests are counted", counted_s)
        except AssertionError:
            counts = Counts.read(self.mesh) - before
        found.carried = counts.express["carried"]
        expected: Counter[str] = Counter()
        for side in codes:
            expected.update(side)
        by_code: Counter[str] = Counter()
        for (_, _, code, _), number in counts.requests.items():
            by_code[code] += number
        by_code.pop("0", None)  # cut off: the client counts none
        if +by_code != +expected:
            found.wrong.append(f"counted by code {sorted((+by_code).items())}, seen by the client {sorted((+expected).items())}")
        kernel = sum(number for (_, _, _, kind), number in counts.requests.items() if kind == "express")
        if kernel != counts.express["answered"]:
            found.wrong.append(
                f"{kernel} requests in pillion_requests_total by the kernel, which answered {counts.express['answered']}"
            )
        if sum(counts.seconds.values()) != sum(counts.requests.values()):
            found.wrong.append(f"durations of {sum(counts.seconds.values())} requests, counts of {sum(counts.requests.values())}")
        found.wrong += _sides(codes)


class Client:
    """The program, which asks both services."""

    def __init__(self, twins: Twins, job: dict[str, Any]) -> None:
        self.twins, self.job = twins, job
        argv = twins.client.place.argv([sys.executable, str(PROGRAMS / "differential_client.py")])
        self.popen = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )

    def _tell(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self.popen.stdout is not None
        return dict(json.loads(self.popen.stdout.readline()))

    def run(
        self, exchanges: list[Sent], order: list[int], part: int = PART, between: Any = None
    ) -> tuple[Found, list[dict[str, int]]]:
        """What client and server saw, and the answers' codes by service."""
        path = self.twins.files / "job"
        path.write_bytes(pickle.dumps({**self.job, "exchanges": exchanges, "order": order, "part": part}))
        found = Found()
        self._tell(str(path))
        while "done" in (said := self._hear()):
            found.wrong += self.twins.seen()
            if between is not None:
                between()
                between = None
            self._tell("on")
        found.seconds, found.connections = tuple(said["seconds"]), tuple(said["made"])
        if said["differing"] or said["silent"]:
            heading = f"the client saw {said['differing']} differences and {said['silent']} silences"
            found.wrong.append(f"{heading}, among them {json.dumps(said['differences'], indent=1)}")
        return found, said["codes"]

    def close(self) -> None:
        self.popen.kill()
        self.popen.communicate()


def _sides(codes: list[dict[str, int]]) -> list[str]:
    first, second = codes
    return [] if first == second else [f"codes of user space {first}, with the kernel {second}"]


def expressible(program: Program, sent: Sent) -> bool:
    """Whether the compiler calls it so: the kernel's, when it comes first on a connection at rest."""
    first = sent.first
    found = program.read(first)
    return found is not None and found[0].length <= BODY_BYTES_MAX and len(first) <= found[0].end + found[0].length


@dataclass
class Counts:
    """Of node n1's metrics, by (source, destination, code, path); by (source, destination); by event; bytes by direction."""

    requests: Counter[tuple[str, str, str, str]]
    seconds: Counter[tuple[str, str]]
    express: Counter[str]
    moved: Counter[str]

    @classmethod
    def read(cls, mesh: Mesh) -> Counts:
        found = cls(Counter(), Counter(), Counter(), Counter())
        for family in text_string_to_metric_families(mesh.lab.agent_api("n1", "GET", "/metrics")):
            for sample in family.samples:
                of, value = sample.labels, int(sample.value)
                if sample.name == "pillion_requests_total":
                    found.requests[of["source"], of["destination"], of["code"], of["path_kind"]] += value
                elif sample.name == "pillion_request_seconds_count":
                    found.seconds[of["source"], of["destination"]] += value
                elif sample.name == "pillion_express_total":
                    found.express[of["event"]] += value
                elif sample.name == "pillion_express_bytes_total":
                    found.moved[of["direction"]] += value
        return found

    def __sub__(self, other: Counts) -> Counts:
        def less(a: Counter[Any], b: Counter[Any]) -> Counter[Any]:
            return Counter({key: number - b[key] for key, number in a.items() if number != b[key]})

        return Counts(
            less(self.requests, other.requests),
            less(self.seconds, other.seconds),
            less(self.express, other.express),
            less(self.moved, other.moved),
        )
