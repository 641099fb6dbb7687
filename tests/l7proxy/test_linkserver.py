"""Frames with descriptors from the worker, to an agent that reads slowly."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from mesh import link
from tests.l7proxy.rig import Agent, Mesh, Rig, open_fds, wait_for


class SlowAgent(Agent):
    """Reads only when it is told to."""

    def _read(self) -> None:
        pass


def test_descriptors_ride_with_their_frames(mesh: Mesh, start: Callable[..., Rig]) -> None:
    rig = start(mesh)
    agent = SlowAgent(rig.path)
    wait_for(lambda: rig.worker.agent.connection is not None and rig.agent.sock.recv(1, socket.MSG_PEEK) == b"", "the new link")
    before = open_fds()
    wanted: list[tuple[int, int]] = []

    def send() -> None:
        for number in range(400):
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(number % 3)]
            wanted.append((number, len(fds)))
            assert rig.worker.send(link.Pair(number, "s" * 2000, 80, "c", ()), fds)
            for fd in fds:
                os.close(fd)
            assert rig.worker.send(link.Unpair(number))

    rig.call(send)
    got: list[tuple[int, int]] = []
    unpaired: list[int] = []
    agent.sock.settimeout(5)
    while len(unpaired) < 400:
        data, fds, _, _ = socket.recv_fds(agent.sock, 1 << 16, 253)
        for message, its_fds in agent.decoder.feed(data, fds):
            if isinstance(message, link.Pair):
                got.append((message.session, len(its_fds)))
            elif isinstance(message, link.Unpair):
                unpaired.append(message.session)
            for fd in its_fds:
                assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/null"
                os.close(fd)
    assert got == wanted
    assert unpaired == list(range(400))
    wait_for(lambda: open_fds() <= before, "the duplicates closed")
    agent.close()


def test_what_was_not_sent_is_closed_with_the_link(mesh: Mesh, start: Callable[..., Rig]) -> None:
    rig = start(mesh)
    agent = SlowAgent(rig.path)
    wait_for(lambda: rig.agent.sock.recv(1, socket.MSG_PEEK) == b"", "the new link")

    def send() -> None:
        with open("/dev/null") as null:
            for number in range(400):
                rig.worker.send(link.Pair(number, "s" * 2000, 80, "c", ()), [null.fileno()])

    before = open_fds()
    rig.call(send)
    wait_for(lambda: open_fds() > before + 100, "what waits")
    agent.close()
    wait_for(lambda: open_fds() <= before, "the duplicates closed")
    assert not rig.worker.send(link.Unpair(1))
