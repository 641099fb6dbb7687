"""What operators ask about the whole: is everything applied, who is behind, and why."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from controller.publish import NodeView, Publisher
from controller.registry import Registry

WAIT_S_MAX = 600.0
WAITERS_MAX = 256


@dataclass(frozen=True)
class NodeStatus:
    """One node as the operator sees it. ``acked``: the newest revision it has applied, 0 if unknown."""

    name: str
    connected: bool
    acked: int
    ready: bool
    workloads: int
    cut: bool
    digest_ok: bool
    error: str
    detail: str
    joined: float


class Status:
    def __init__(self, registry: Registry, publisher: Publisher) -> None:
        self._registry, self._publisher = registry, publisher
        self.waiting = 0

    def nodes(self) -> list[NodeStatus]:
        """Every node that joined, has a grant or a workload, by name."""
        registry, views = self._registry, self._publisher.nodes
        workloads = registry.workload_counts()
        names = registry.nodes.keys() | views.keys() | workloads.keys() | registry.granted.nodes()
        return [self._node(name, views.get(name) or NodeView(name), workloads.get(name, 0)) for name in sorted(names)]

    def _node(self, name: str, view: NodeView, workloads: int) -> NodeStatus:
        return NodeStatus(
            name,
            view.connected,
            view.acked,
            view.ready,
            workloads,
            self._registry.is_cut(name),
            view.digest_ok,
            view.error,
            view.detail,
            self._registry.nodes.get(name, 0.0),
        )

    def laggards(self, revision: int) -> list[dict[str, object]]:
        """Connected nodes that have not acknowledged ``revision``, with what they last said."""
        return [
            {"name": view.name, "acked": view.acked, "error": view.error}
            for view in sorted(self._publisher.nodes.values(), key=lambda view: view.name)
            if view.connected and view.acked < revision
        ]

    async def wait(self, revision: int, timeout_s: float) -> list[dict[str, object]]:
        """Until ``revision`` is published and every connected node has it; the laggards when the time is over."""
        publisher = self._publisher
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await publisher.until(lambda: publisher.revision >= revision and not self.laggards(revision))
        except TimeoutError:
            late = self.laggards(revision)
            if publisher.revision < revision:
                late.insert(
                    0, {"name": "controller", "acked": publisher.revision, "error": publisher.error or "not published yet"}
                )
            return late
        finally:
            self.waiting -= 1
        return []
