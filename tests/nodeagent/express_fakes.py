"""A kernel that remembers what the agent told it, and a destination with a caller on one node."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mesh.express.dfa import Table
from mesh.link import Pair as Ask
from mesh.link import PairEnd
from mesh.model import Action, Config, Item, State
from nodeagent.express_path import Enrolment, Verdict
from nodeagent.express_programs import View
from tests.mesh.build import identity, service, state, workload
from tests.mesh.express.build import CALLER, CART, KEY, WEB

NETNS = {CART: 71, WEB: 72}
ADDRESS = "127.0.0.1"
VIP = "240.0.0.1"


class Kernel:
    """What was written, in order; ``refuse``: side -> result of its enrolments, ``moved``: what CHECK answers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.programs: dict[int, dict[str, Any]] = {}
        self.verdicts: dict[int, dict[tuple[int, int], Verdict]] = {}
        self.installed: list[Table] = []
        self.released: list[int] = []
        self.records: dict[int, tuple[int, int]] = {}
        self.legs: list[int] = []
        self.legs_ever = 0
        self.enrolled: list[tuple[int, Enrolment]] = []
        self.refuse: dict[str, str] = {}
        self.standing = "ok"

    def install(self, table: Table) -> int:
        self.installed.append(table)
        return 2 + 1000 * len(self.installed)

    def release(self, base: int) -> None:
        self.released.append(base)

    def put_program(
        self, index: int, *, generation: int, root: int, response: int, service: int, endpoints: Sequence[int], **more: int
    ) -> None:
        self.calls.append(("put", index))
        put = {"generation": generation, "root": root, "response": response, "endpoints": list(endpoints)}
        self.programs[index] = put | more

    def drop_program(self, index: int) -> None:
        self.calls.append(("drop", index))
        self.programs.pop(index, None)

    def set_verdicts(self, index: int, verdicts: Mapping[tuple[int, int], Verdict]) -> None:
        self.calls.append(("verdicts", index))
        self.verdicts[index] = dict(verdicts)

    def create_record(self, program: int, identity: int) -> int:
        record = 900 + len(self.records)
        self.records[record] = program, identity
        return record

    def forget_record(self, record: int) -> None:
        del self.records[record]

    def set_program(self, record: int, program: int) -> str:
        self.records[record] = program, self.records[record][1]
        return "ok"

    def enrol_all(self, items: Sequence[tuple[int, Enrolment]]) -> list[tuple[str, int]]:
        self.enrolled += [(place_of(netns_fd), enrolment) for netns_fd, enrolment in items]
        return [(self.refuse.get(enrolment.side, "ok"), 1) for _, enrolment in items]

    def create_leg(self) -> int:
        self.legs_ever += 1
        self.legs.append(7000 + self.legs_ever)
        return self.legs[-1]

    def forget_leg(self, leg: int) -> None:
        self.legs.remove(leg)

    def enrol(self, netns_fd: int, enrolment: Enrolment) -> tuple[str, int]:
        return self.enrol_all([(netns_fd, enrolment)])[0]

    def check(self, netns_fd: int, enrolment: Enrolment) -> str:
        assert place_of(netns_fd)
        return self.standing


class Sockets:
    """The data path's knowledge: one origin for every socket that was captured."""

    def __init__(self) -> None:
        self.value: dict[str, Any] | None = {
            "identity": 400,
            "workload": 400,
            "service": 500,
            "dst": bytes(10) + b"\xff\xff" + socket.inet_aton(VIP),
            "dst_port": 80,
            "netns": NETNS[CART],
            "client": bytes(10) + b"\xff\xff" + socket.inet_aton("10.77.1.151"),
            "client_port": 4711,
        }

    def origin(self, sock: socket.socket) -> dict[str, Any] | None:
        return self.value

    def netns_fd(self, netns: int) -> int:
        if netns not in NETNS.values():
            raise KeyError(netns)
        return os.memfd_create(f"netns {netns}")


def place_of(fd: int) -> int:
    """The netns of which `Sockets` gave this descriptor."""
    return int(os.readlink(f"/proc/self/fd/{fd}").split()[1])


def world(*items: Item, endpoints: tuple[str, ...] = (WEB,), default: Action | None = None, **config: Any) -> State:
    """A service "web" whose endpoint listens at the loopback address, and who calls it."""
    base: tuple[Item, ...] = (
        workload(addresses=(ADDRESS,)),
        service("web", endpoints=endpoints, vips=(VIP,)),
        identity("shop", "cart", 400),
        CALLER,
    )
    found = state(*base, *items)
    mesh = found["Config//mesh"]
    assert isinstance(mesh, Config)
    found["Config//mesh"] = Config(trust_domain=mesh.trust_domain, default_action=default or Action.ALLOW, **config)
    return found


def view(known: State, generation: int = 7, **more: int) -> View:
    return View(known, generation, {**NETNS, **more})


@contextmanager
def connection(port: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(client's end, server's end) over loopback, the server at ``port``."""
    with socket.create_server((ADDRESS, port)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with client, server:
        yield client, server


@contextmanager
def asked(session: int = 1, at: int = 8080, **more: Any) -> Iterator[tuple[Ask, list[int]]]:
    """What a worker would send: its accepted socket and one to the endpoint; descriptors are the callee's."""
    with connection() as (_, accepted), connection(at) as (upstream, _far):
        values: dict[str, Any] = {"service": KEY, "port": 80, "caller": CART, "endpoints": (PairEnd(WEB, at),)}
        yield Ask(session, **{**values, **more}), [os.dup(accepted.fileno()), os.dup(upstream.fileno())]
