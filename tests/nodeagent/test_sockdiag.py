"""The kernel's sockets by netlink, in a netns of the test's own."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from nodeagent import netns as spaces
from nodeagent.sockdiag import OPEN_STATES, SockDiag, State, attribute, attributes, destroy_where
from tests.nodeagent.kernel_world import World, world

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@pytest.fixture(scope="module")
def made() -> Iterator[World]:
    with world() as one:
        yield one


@pytest.fixture
def space(made: World) -> Iterator[int]:
    fd = spaces.open_netns(made.a.path)
    yield fd
    import os

    os.close(fd)


@pytest.fixture
def diag(space: int) -> Iterator[SockDiag]:
    one = spaces.run_in(space, SockDiag)
    yield one
    one.close()


def pair(space: int, family: int, listen: str = "") -> tuple[socket.socket, socket.socket, socket.socket]:
    """(listener, client, accepted) in the netns."""

    def connect() -> tuple[socket.socket, socket.socket, socket.socket]:
        address = LOOPBACK[socket.AddressFamily(family)]
        listener = socket.create_server(
            (listen or address, 0),
            family=socket.AF_INET6 if ":" in (listen or address) else socket.AF_INET,
            dualstack_ipv6=listen == "::",
        )
        client = socket.create_connection((address, listener.getsockname()[1]))
        return listener, client, listener.accept()[0]

    return spaces.run_in(space, connect)


@pytest.mark.parametrize(("family", "listen"), [(socket.AF_INET, ""), (socket.AF_INET6, ""), (socket.AF_INET, "::")])
def test_destroying_one_end_ends_both(space: int, diag: SockDiag, family: int, listen: str) -> None:
    listener, client, accepted = pair(space, family, listen)
    port = listener.getsockname()[1]
    try:
        found = diag.dump(OPEN_STATES)
        ours = [sock for sock in found if port in (sock.local_port, sock.remote_port)]
        assert len(ours) == 2
        assert {sock.local for sock in ours} == {LOOPBACK[socket.AddressFamily(family)]}  # also for a v4-mapped socket
        server = next(sock for sock in ours if sock.local_port == port)
        assert destroy_where(diag, ours, lambda sock: sock.id == server.id) == [server]
        assert not diag.destroy(server)
        with pytest.raises(ConnectionAbortedError):
            accepted.recv(1)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    finally:
        for sock in (listener, client, accepted):
            sock.close()


def test_listeners_and_datagram_sockets_are_listed(space: int, diag: SockDiag) -> None:
    with (
        spaces.run_in(space, lambda: spaces.listen_tcp("::1", 18080)),
        spaces.run_in(space, lambda: spaces.bind_udp("127.0.0.1", 18081)),
    ):
        found = diag.dump(protocols=(socket.IPPROTO_TCP, socket.IPPROTO_UDP))
    assert ("::1", 18080, State.LISTEN) in {(sock.local, sock.local_port, sock.state) for sock in found}
    udp = next(sock for sock in found if sock.local_port == 18081)
    assert str(udp) == "udp 127.0.0.1:18081 -> 0.0.0.0:0 (close)"
    assert udp.inode and udp.cgroup


def test_many_sockets_come_in_many_messages(space: int, diag: SockDiag) -> None:
    fds = [spaces.run_in(space, lambda: [spaces.bind_udp("127.0.0.1", 20_000 + n) for n in range(1500)])]
    try:
        assert len([sock for sock in diag.dump(protocols=(socket.IPPROTO_UDP,)) if 20_000 <= sock.local_port < 21_500]) == 1500
    finally:
        for sock in fds[0]:
            sock.close()


def test_attributes_are_padded_and_end_at_nonsense() -> None:
    data = attribute(1, b"abc") + attribute(2 | 0x8000, b"12345678")
    assert [(kind, bytes(value)) for kind, value in attributes(memoryview(data))] == [(1, b"abc"), (2, b"12345678")]
    assert list(attributes(memoryview(b"\xff\xff\x01\x00abc"))) == []
