"""The sockets from which the proxy asks resolvers outside the mesh (`MeshConfig.dnsUpstreams`): of the node's own netns,
bound to ports of the kernel's choice. Each worker has its own, as an answer on a shared one could reach another worker."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

import structlog

from mesh import link
from mesh.dataplane import NODE_NETNS, Dial
from nodeagent.netns import bind_udp

if TYPE_CHECKING:
    from nodeagent.worker_link import WorkerLink

log = structlog.get_logger()

FORWARDERS = 16  # of each family: a forger must guess which one was asked from, too
_ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # only what the upstream sent is believed


def families_of(dials: Iterable[Dial]) -> frozenset[int]:
    """The socket families that a plan's resolvers are asked over."""
    return frozenset(
        int(socket.AF_INET6 if ":" in dial.address else socket.AF_INET) for dial in dials if dial.netns == NODE_NETNS
    )


def supply(worker: WorkerLink, families: frozenset[int]) -> None:
    """Bring a worker's sockets to what these families need."""
    for family in worker.forwards - families:
        for number in range(FORWARDERS):
            worker.send(link.CloseListener(_id(family, number)))
    for family in families - worker.forwards:
        for number in range(FORWARDERS):
            try:
                sock = bind_udp(_ANY[socket.AddressFamily(family)], 0)
            except OSError as error:  # the worker answers SERVFAIL if it has none
                log.error("forwarder_failed", error=str(error))
                break
            frame = link.Listener(_id(family, number), "dns-forward", NODE_NETNS, *sock.getsockname()[:2])
            worker.send(frame, [sock.detach()], owned=True)
    worker.forwards = families


def _id(family: int, number: int) -> str:
    return f"forward/{family}/{number}"
