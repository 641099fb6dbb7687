"""What the CLI says when the other side, or what it was told of it, is not as it should be."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

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


def tls_server(tmp_path: Path, name: str) -> tuple[Path, Path]:
    """A certificate that is its own root, for ``name``, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    certificate, private = tmp_path / f"{name}.crt", tmp_path / f"{name}.key"
    certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, private


@pytest.mark.parametrize(
    ("roots", "named", "said", "remedy"),
    [
        ("localhost", "localhost", "hung up", "PILLION_CERT"),  # as a controller does that does not take the certificate
        ("localhost", "127.0.0.1", "not valid for '127.0.0.1'", "as `pillion operator add` prints it"),
        ("other", "localhost", "self-signed certificate", "PILLION_CA"),
    ],
)
def test_who_is_at_fault_when_a_controller_is_not_talked_to(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roots: str, named: str, said: str, remedy: str
) -> None:
    made = {name: tls_server(tmp_path, name) for name in ("localhost", "other")}
    monkeypatch.setenv("PILLION_CA", str(made[roots][0]))
    monkeypatch.setenv("PILLION_CERT", str(made["other"][0]))
    monkeypatch.setenv("PILLION_KEY", str(made["other"][1]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*made["localhost"])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                tls.recv(65536)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        done = cli("--controller", f"https://{named}:{listener.getsockname()[1]}", "status")
        thread.join(10)
    what, what_to_do = done.err.splitlines()
    assert done.code == 1 and said in what and remedy in what_to_do, done.err


def test_half_of_the_credentials_is_told(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tls_server(tmp_path, "localhost")
    monkeypatch.setenv("PILLION_CA", str(certificate))
    monkeypatch.delenv("PILLION_CERT", raising=False)
    monkeypatch.setenv("PILLION_KEY", str(key))
    done = cli("--controller", "https://127.0.0.1:1", "status")
    assert done.code == 1 and "PILLION_CERT is not set" in done.err, done.err
    monkeypatch.setenv("PILLION_CERT", str(certificate))
    monkeypatch.delenv("PILLION_KEY")
    done = cli("--controller", "https://127.0.0.1:1", "status")
    assert done.code == 1 and "PILLION_KEY is not set" in done.err and "_ssl.c" not in done.err, done.err


def test_an_operator_whose_certificate_is_over_needs_another(cli: Cli, controller: Fake) -> None:
    """What a node would do, join again, is not for him."""
    answer = {"error": "certificate ab is revoked; join again with a new token", "reason": "certificate_revoked"}
    controller.on("GET /v1/status", answer, 403)
    done = cli("--controller", controller.url, "status")
    assert done.code == 1 and "certificate ab is revoked" in done.err and "token" not in done.err
    assert "pillion operator add NAME" in done.err


def test_a_controller_elsewhere_that_does_not_answer(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in zip(("PILLION_CERT", "PILLION_KEY"), tls_server(tmp_path, "localhost"), strict=True):
        monkeypatch.setenv(name, str(path))
    monkeypatch.setenv("PILLION_CA", str(tmp_path / "localhost.crt"))
    done = cli("--controller", "https://127.0.0.1:1", "status")
    assert done.code == 1 and "Connection refused" in done.err and "is the address right" in done.err
