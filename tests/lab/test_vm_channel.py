"""The two ends of a VM's command channel, here without a VM between them."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.vm import guest
from lab.vm.channel import Channel

PATIENCE_S = 30.0


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    """To a guest that serves one session after the other."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(Channel.socket_path(tmp_path, 0)))
    server.listen()

    def serve() -> None:
        while True:
            try:
                port, _ = server.accept()
            except OSError:
                return
            port.setblocking(False)
            guest.Session(port.fileno(), b"").run()
            port.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield Channel(tmp_path, "one", tmp_path / "console.log")
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(PATIENCE_S)


@contextmanager
def silent() -> Iterator[tuple[Any, threading.Event]]:
    """An input that stays open and gives nothing, as a terminal's; when it was given up, to end the test."""
    reader, writer = os.pipe()
    given_up = threading.Event()

    def end() -> None:
        given_up.set()
        os.close(writer)

    timer = threading.Timer(PATIENCE_S, end)
    timer.start()
    with os.fdopen(reader, "rb") as source:
        yield source, given_up
    timer.cancel()
    timer.join()
    if not given_up.is_set():
        os.close(writer)


def test_a_program_that_ends_is_not_kept_by_its_input(channel: Channel) -> None:
    output = io.BytesIO()
    with silent() as (source, given_up):
        assert channel.run(["echo", "done"], input=source, timeout_s=2 * PATIENCE_S, stdout=output) == 0
        assert not given_up.is_set()
    assert output.getvalue() == b"done\n"


def test_what_is_given_arrives_whole(channel: Channel, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "given").write_bytes(data)
    for source in (data, (tmp_path / "given").open("rb")):
        output = io.BytesIO()
        assert channel.run(["cat"], input=source, timeout_s=2 * PATIENCE_S, stdout=output) == 0
        assert output.getvalue() == data


def test_the_next_host_has_an_input_of_its_own() -> None:
    """Whatever the one before it, whose end was not seen, had said of his."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    session = guest.Session(theirs.fileno(), b"")
    first, second = b"first123", b"second12"
    ours.sendall(guest.frame(first, guest.HELLO) + guest.frame(first, guest.STDIN_END))
    ours.sendall(guest.frame(second, guest.HELLO) + guest.frame(second, guest.RUN, b'{"argv": ["cat"]}'))
    thread = threading.Thread(target=session.run, daemon=True)
    thread.start()
    parser, said = guest.Parser(), b""
    ours.settimeout(PATIENCE_S)
    while b'"boot_id"' not in said:  # it has taken all that was said so far, and the program runs
        said += ours.recv(65536)
    ours.sendall(guest.frame(second, guest.STDIN, b"hello") + guest.frame(second, guest.STDIN_END))
    found = parser.feed(said)
    while not (found and found[-1][1] == guest.EXIT):
        found += parser.feed(ours.recv(65536))
    assert b"".join(payload for nonce, kind, payload in found if (nonce, kind) == (second, guest.STDOUT)) == b"hello"
    thread.join(PATIENCE_S)
    ours.close()
    theirs.close()
