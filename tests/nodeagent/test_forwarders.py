"""Sockets to resolvers outside, for each worker its own, as real descriptors."""

from __future__ import annotations

import os
import socket

import pytest

from mesh import link
from mesh.dataplane import NODE_NETNS, Dial
from nodeagent.forwarders import FORWARDERS, families_of, supply


class Worker:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.forwards: frozenset[int] = frozenset()
        self.messages: list[tuple[link.Message, list[int]]] = []

    def send(self, message: link.Message, fds: list[int] | None = None, owned: bool = False) -> None:
        assert owned is bool(fds)
        self.messages.append((message, fds or []))


def test_families_are_those_of_the_resolvers() -> None:
    assert families_of([Dial(7, "10.0.0.1", 53), Dial(NODE_NETNS, "192.0.2.53", 53)]) == {socket.AF_INET}
    assert families_of([Dial(NODE_NETNS, "fd00::53", 53)]) == {socket.AF_INET6}
    assert not families_of([])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_worker_gets_them_once_and_loses_them(family: int) -> None:
    worker = Worker()
    supply(worker, frozenset({family}))  # type: ignore[arg-type]  # a stand-in
    supply(worker, frozenset({family}))  # type: ignore[arg-type]  # a stand-in
    assert len(worker.messages) == FORWARDERS
    ports = set()
    for message, fds in worker.messages:
        assert isinstance(message, link.Listener) and message.kind == "dns-forward"
        with socket.socket(fileno=fds[0]) as sock:
            assert (sock.family, sock.type) == (family, socket.SOCK_DGRAM) and not os.get_blocking(fds[0])
            ports.add(sock.getsockname()[1])
    assert len(ports) == FORWARDERS
    opened = {message.id for message, _ in worker.messages if isinstance(message, link.Listener)}
    worker.messages.clear()
    supply(worker, frozenset())  # type: ignore[arg-type]  # a stand-in
    assert {message.id for message, _ in worker.messages if isinstance(message, link.CloseListener)} == opened
