"""Sockets inside another netns."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from mesh.ports import RESERVED_PORTS
from nodeagent import netns
from nodeagent.datapath_live import Datapath
from nodeagent.loader import source
from nodeagent.loading import SOURCES
from tests.nodeagent.kernel_world import world


@pytest.fixture(scope="module")
def space() -> Iterator[int]:
    with world() as made:
        fd = netns.open_netns(made.a.path)
        yield fd
        os.close(fd)


def test_ports_are_those_of_the_programs() -> None:
    constants = source.constants((SOURCES / "types.h").read_text())
    assert tuple(constants[f"PL_PORT_{name}"] for name in ("OUTBOUND", "HBONE", "DNS")) == RESERVED_PORTS


def test_only_the_throwaway_thread_is_elsewhere(space: int) -> None:
    here = netns.cookie_here()
    assert netns.cookie(space) not in (0, here)
    assert netns.cookie_here() == here
    assert not [thread for thread in threading.enumerate() if thread.name == "netns"]


def test_what_fails_there_fails_here(space: int) -> None:
    with pytest.raises(ZeroDivisionError):
        netns.run_in(space, lambda: 1 // 0)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.99.7.1", "fd99:7::1"])
def test_nobody_joins_a_listener(space: int, address: str) -> None:
    with netns.run_in(space, lambda: netns.listen_tcp(address, 15001)) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
        assert not os.get_blocking(listener.fileno())
        with pytest.raises(OSError, match="15001"):
            netns.run_in(space, lambda: netns.listen_tcp(address, 15001))
        if ":" in address:
            assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_both_families_have_the_port(space: int) -> None:
    made = [netns.run_in(space, partial(netns.bind_udp, at, 15053)) for at in ("127.0.0.1", "::1")]
    for sock in made:
        sock.close()


def test_stock_that_cannot_be_made_leaves_nothing_open(space: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):  # noqa: PT011  # any: the family does not exist
        netns.run_in(space, lambda: netns.client_sockets(200, 3))
    assert len(os.listdir("/proc/self/fd")) == before


def test_sockets_are_of_their_netns_though_that_is_let_go_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptor's number may be another netns's by then."""
    datapath = Datapath(tmp_path, tmp_path, tmp_path)
    place, run_in = datapath.adopt(None), netns.run_in

    def late(fd: int, call: Callable[[], list[int]]) -> list[int]:
        datapath.forget(place)
        return run_in(fd, call)

    monkeypatch.setattr(netns, "run_in", late)
    for fd in datapath.make_stock(place, socket.AF_INET, 2):
        os.close(fd)
