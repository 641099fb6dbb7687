"""What the CLI says when the other side, or what it was told of it, is not as it should be."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pillion import client
from pillion.client import Client
from pillion.errors import CliError
from tests.pillion.conftest import Cli, Fake

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"
CREDENTIALS = ("PILLION_CA", "PILLION_CERT", "PILLION_KEY")


@contextmanager
def served(path: Path, *parts: bytes, pause_s: float = 0.0) -> Iterator[Client]:
    """One connection is answered with these parts, ``pause_s`` between them, and closed; without parts it never is."""
    over = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            for number, part in enumerate(parts):
                over.wait(pause_s if number else 0.0)
                connection.sendall(part)
            if not parts:
                over.wait(10)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Client(f"unix://{path}")
        over.set()
        thread.join(10)


@pytest.mark.parametrize("missing", CREDENTIALS)
def test_credentials_that_are_not_there_are_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in CREDENTIALS:
        path = tmp_path / name
        monkeypatch.setenv(name, str(path))
        if name != missing:
            path.write_text("")
    done = cli("--controller", "https://127.0.0.1:1", "status")
    assert done.code == 1 and f"{missing}={tmp_path / missing}: No such file" in done.err, done.err
    assert "pillion operator add" in done.err


def test_credentials_that_are_none_are_told(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CREDENTIALS:
        (tmp_path / name).write_text("junk")
        monkeypatch.setenv(name, str(tmp_path / name))
    done = cli("--controller", "https://127.0.0.1:1", "status")
    assert done.code == 1 and "PILLION_CA" in done.err and "pillion operator add" in done.err, done.err


def test_only_the_meshs_roots_are_believed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the machine, where nobody has named any."""
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    done = cli("--controller", "https://127.0.0.1:1", "status")
    assert done.code == 1 and "PILLION_CA is not set" in done.err, done.err


def test_an_answer_that_breaks_off_is_no_traceback(tmp_path: Path) -> None:
    with (
        served(tmp_path / "s", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{") as half,
        pytest.raises(CliError, match="broke off"),
    ):
        half.raw("/v1/state")


def test_a_stream_may_be_silent_for_as_long_as_it_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT_S", 0.2)
    with served(tmp_path / "s", HEAD, b'a\r\n{"n": 1}\n\n\r\n', b"0\r\n\r\n", pause_s=0.4) as quiet:
        assert list(quiet.lines("/v1/flows?follow=1")) == [{"n": 1}]


def test_a_stream_that_never_begins_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT_S", 0.2)
    with served(tmp_path / "s") as dead, pytest.raises(CliError, match="does not answer"):
        list(dead.lines("/v1/flows?follow=1"))


def test_what_the_other_side_says_commands_no_terminal(cli: Cli, controller: Fake) -> None:
    controller.on("GET /v1/status", {"error": "no \x1b[2J\x9b2J\nsecond line; clear\x1bc"}, 400)
    done = cli("--controller", controller.url, "status")
    assert done.code == 1 and not {"\x1b", "\x9b"} & set(done.err), done.err
    assert "second line" in done.err
    controller.on("GET /v1/operators", {"items": [{"name": "\x9b2J", "serial": "\x1b", "not_after": 4e9, "revoked": False}]})
    done = cli("--controller", controller.url, "operator", "list", "-o", "json")
    assert done.json[0]["name"] == "\x9b2J" and not {"\x1b", "\x9b"} & set(done.out)
