"""The data path without a kernel: what was asked is kept in memory and can be looked at. Sockets are real, but
bound to free ports of the process's own netns."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mesh.dataplane import NodePlan
from mesh.link import Flow, Grant, Listener
from nodeagent.datapath_api import DatapathError, DeniedBy, EnrolReport, MapFull, Member, OpenListener
from nodeagent.express_path import ExpressPath

PROGRAMS = ("connect4", "connect6", "sockops", "ingress", "egress")
_STOP = Flow(time=0.0, verdict="", reason="")


class FakeDatapath:
    """A `datapath_api.DatapathApi`. `entries_max` makes `apply` fail as a full map does."""

    def __init__(self, entries_max: int | None = None) -> None:
        self.entries_max = entries_max
        self.members: tuple[Member, ...] = ()
        self.plan: NodePlan | None = None
        self.generation = 0
        self.lease_until_ns = 0
        self.guarded: dict[str, tuple[tuple[str, ...], bool]] = {}
        self.enrolled: list[int] = []
        self.ended = 0
        self.granted: list[Grant] = []
        self.grant_refused = ""
        self.repairs = 0
        self.lacking: dict[str, str] = {}
        self._netns: dict[Path | None, int] = {}
        self._open: dict[str, tuple[OpenListener, socket.socket]] = {}
        self._flows: asyncio.Queue[Flow] = asyncio.Queue(maxsize=4096)

    def load(self) -> dict[str, bool]:
        return dict.fromkeys(PROGRAMS, True)

    def off(self) -> dict[str, str]:
        return dict(self.lacking)

    def adopt(self, netns: Path | None) -> int:
        return self._netns.setdefault(netns, 4096 + len(self._netns))

    def forget(self, netns: int) -> None:
        for path, cookie in list(self._netns.items()):
            if cookie == netns:
                del self._netns[path]
        for key, (listener, sock) in list(self._open.items()):
            if listener.frame.netns == netns:
                sock.close()
                del self._open[key]

    def set_members(self, members: Iterable[Member]) -> None:
        self.members = tuple(sorted(members, key=lambda member: member.cgroup))

    def set_names(
        self,
        identities: Mapping[int, str],
        workloads: Mapping[int, str],
        services: Mapping[int, str] = {},
        denied_by: DeniedBy | None = None,
    ) -> None:
        self.names, self.denied_by = (identities, workloads, services), denied_by

    def set_revision(self, node: str, revision: int) -> None:
        self.node, self.revision = node, revision

    def extend_lease(self, until_ns: int) -> None:
        self.lease_until_ns = until_ns

    def leased_until_ns(self) -> int:
        return self.lease_until_ns

    def apply(self, plan: NodePlan, generation: int) -> str:
        size = _entries(plan)
        if self.entries_max is not None and size > self.entries_max:
            raise MapFull(f"the plan has {size} entries, the maps hold {self.entries_max}; the former content stays in force")
        self.plan, self.generation = plan, generation
        return self.observed_digest()

    def observed_digest(self) -> str:
        return hashlib.sha256(repr(self.plan).encode()).hexdigest()

    def repair(self) -> int:
        return self.repairs

    def grant(self, asked: Grant) -> str:
        self.granted.append(asked)
        return self.grant_refused

    def end_denied(self, plan: NodePlan) -> int:  # noqa: ARG002  # as the API has it
        return self.ended

    def enrol(self, netns: int, cgroup: Path | None = None) -> EnrolReport:  # noqa: ARG002  # as the API has it
        self.enrolled.append(netns)
        return EnrolReport()

    def guard_veth(self, veth: str, addresses: Sequence[str], permissive: bool = False) -> None:
        self.guarded[veth] = (tuple(addresses), permissive)

    def set_unguarded(self, addresses: Sequence[str]) -> None:
        pass

    def unguard_veth(self, veth: str) -> None:
        self.guarded.pop(veth, None)

    def open_listeners(self, netns: int, addresses: Sequence[str], hbone: bool = True) -> list[OpenListener]:
        wanted = {
            f"{netns}/{kind}/{address}": (kind, address)
            for kind, where in (
                ("outbound", ("127.0.0.1",)),
                ("dns-udp", ("127.0.0.1",)),
                ("dns-tcp", ("127.0.0.1",)),
                ("hbone", addresses if hbone else ()),
            )
            for address in where
        }
        for key in [k for k, (listener, _) in self._open.items() if listener.frame.netns == netns and k not in wanted]:
            self._open.pop(key)[1].close()
        for key, (kind, address) in wanted.items():
            if key not in self._open:
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "dns-udp" else socket.SOCK_STREAM)
                sock.setblocking(False)
                sock.bind(("127.0.0.1", 0))
                if sock.type == socket.SOCK_STREAM:
                    sock.listen(16)
                frame = Listener(key, kind, netns, address, sock.getsockname()[1])
                self._open[key] = (OpenListener(frame, sock.fileno()), sock)
        return [self._open[key][0] for key in wanted]

    def make_stock(self, netns: int, family: int, count: int) -> list[int]:
        if netns not in self._netns.values():
            raise KeyError(netns)
        return [socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK).detach() for _ in range(count)]

    def tell(self, flow: Flow) -> None:
        """Test's side of `flows`."""
        self._flows.put_nowait(flow)

    def express(self) -> ExpressPath:
        raise DatapathError("there is no kernel")

    def origin(self, sock: socket.socket) -> dict[str, Any] | None:  # noqa: ARG002  # the API's
        return None

    def netns_fd(self, netns: int) -> int:
        raise KeyError(netns)

    async def flows(self) -> AsyncIterator[Flow]:
        while (flow := await self._flows.get()) is not _STOP:
            yield flow

    def metrics_text(self) -> str:
        return ""

    def hello_layouts(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        return {"pl_origin": ("", ()), "pl_caller": ("", ())}

    def close(self) -> None:
        for _, sock in self._open.values():
            sock.close()
        self._open.clear()
        self._flows.put_nowait(_STOP)


def _entries(plan: NodePlan) -> int:
    return sum(len(table) for table in (plan.dests, plan.backends, plan.policy, plan.egress, plan.dials))
