"""A listener found among a process's descriptors, while that opens and closes others."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.link import Listener
from nodeagent import takeover
from nodeagent.sockdiag import State

AT = "127.0.0.1"


def asked(listening: socket.socket) -> tuple[Any, Listener]:
    port = listening.getsockname()[1]
    inode = os.fstat(listening.fileno()).st_ino
    found = SimpleNamespace(inode=inode, local=AT, local_port=port, state=State.LISTEN)
    return SimpleNamespace(dump=lambda states, protocols: [found]), Listener("1/outbound/x", "outbound", 1, AT, port)


def test_what_is_closed_meanwhile_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transient = [os.open("/dev/null", os.O_RDONLY)]  # its number is below the listener's
    real = os.readlink

    def readlink(path: str) -> str:
        while transient:
            os.close(transient.pop())
        return real(path)

    with socket.create_server((AT, 0)) as listening:
        monkeypatch.setattr(os, "readlink", readlink)
        taken = takeover.take(*asked(listening), tmp_path)
        assert taken is not None
        assert os.fstat(taken).st_ino == os.fstat(listening.fileno()).st_ino
        os.close(taken)


def test_a_number_that_is_anothers_by_now_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, other = takeover.copy_fd, os.open("/dev/null", os.O_RDONLY)
    with socket.create_server((AT, 0)) as listening:
        monkeypatch.setattr(takeover, "copy_fd", lambda pid, fd: real(pid, other))
        assert takeover.take(*asked(listening), tmp_path) is None
    os.close(other)
