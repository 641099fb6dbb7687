"""What a port without appProtocol speaks, learned from the server's bytes only and without waiting: the first
connections are relayed as they are. A port is HTTP once the server answered a well-formed request with an HTTP
status line; it is TCP once the server spoke first or answered otherwise. What a client sends alone teaches nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mesh.model import Protocol

if TYPE_CHECKING:
    from l7proxy.worker import Worker

PORTS_MAX = 4096
AGREE = 3  # connections in a row that must say the same
LOOK_BYTES = 512

_REQUEST = re.compile(rb"[A-Z]{3,16} [\x21-\x7e]+ HTTP/1\.[01]\r\n")
_RESPONSE = re.compile(rb"HTTP/1\.[01] [1-5][0-9][0-9][ \r]")

PortKey = tuple[str, int]  # service or workload item key, port


class Learned:
    """Ports and what their servers have shown."""

    __slots__ = ("known", "votes")

    def __init__(self) -> None:
        self.known: dict[PortKey, Protocol] = {}
        self.votes: dict[PortKey, tuple[Protocol, int]] = {}

    def vote(self, key: PortKey, protocol: Protocol) -> None:
        """One connection's evidence."""
        if key in self.known:
            return
        before, count = self.votes.get(key, (protocol, 0))
        count = count + 1 if before is protocol else 1
        if count >= AGREE and len(self.known) < PORTS_MAX:
            self.known[key] = protocol
            self.votes.pop(key, None)
        elif key in self.votes or len(self.votes) < PORTS_MAX:
            self.votes[key] = (protocol, count)

    def forget(self, keep: set[str]) -> None:
        """After a new configuration: ports of services and workloads that are gone."""
        for table in (self.known, self.votes):
            for key in [key for key in table if key[0] not in keep]:
                del table[key]


class Learner:
    """Watches the first bytes of one connection."""

    __slots__ = ("client", "key", "worker")

    def __init__(self, worker: Worker, key: PortKey) -> None:
        self.worker, self.key = worker, key
        self.client: bytes = b""

    def client_data(self, data: bytes) -> None:
        if len(self.client) < LOOK_BYTES:
            self.client += data[:LOOK_BYTES]

    def server_data(self, data: bytes) -> None:
        """The server's first bytes decide; later calls do nothing."""
        if self.worker is None:
            return
        worker, self.worker = self.worker, None  # type: ignore[assignment]  # done: lets go
        http = _REQUEST.match(self.client) is not None and _RESPONSE.match(data) is not None
        worker.learned.vote(self.key, Protocol.HTTP if http else Protocol.TCP)
