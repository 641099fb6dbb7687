"""The host's end of the command channel: run a program in a VM as if it were here, with input, output and exit code.

QEMU listens on one unix socket for each port; a file lock beside it says who uses the port, so several processes can
work with one VM at the same time.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import secrets
import select
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lab.machine import Sink
from lab.state import LabError
from lab.vm import guest

PORTS = 4
HELLO_AGAIN_S = 5.0


class ChannelLost(LabError):
    """The VM went away, or never came."""


@dataclass(frozen=True)
class Peer:
    """What the guest says of itself."""

    boot_id: str
    release: str


class Channel:
    def __init__(self, folder: Path, name: str, log: Path) -> None:
        self._folder, self._name, self._log = folder, name, log

    @staticmethod
    def socket_path(folder: Path, number: int) -> Path:
        return folder / f"port{number}.sock"

    def hello(self, timeout_s: float) -> Peer:
        """Who is there. Waits for the guest to come up."""
        with self._session(time.monotonic() + timeout_s) as session:
            return session.peer

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | BinaryIO | None = None,
        timeout_s: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> int:
        """The exit code (negative: signal). Raises subprocess.TimeoutExpired; the program in the VM is then killed."""
        deadline = time.monotonic() + timeout_s
        with self._session(deadline) as session:
            session.send(guest.RUN, json.dumps({"argv": list(argv), "cwd": cwd, "env": dict(env or {})}).encode())
            source: BinaryIO = io.BytesIO(input or b"") if isinstance(input, bytes | None) else input
            code = session.talk(source, {guest.STDOUT: stdout, guest.STDERR: stderr}, deadline)
        if code is None:
            raise subprocess.TimeoutExpired(list(argv), timeout_s)
        return code

    def _session(self, deadline: float) -> _Session:
        while True:
            for number in range(PORTS):
                lock = os.open(self._folder / f"port{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(lock)
                    continue
                try:
                    return _Session(self.socket_path(self._folder, number), lock, self._name, self._log, deadline)
                except BaseException:
                    os.close(lock)
                    raise
            if time.monotonic() > deadline:
                raise ChannelLost(f"all {PORTS} ports of the VM {self._name} are in use", "wait for what runs in it")
            time.sleep(0.05)


def ending(folder: Path, patience_s: float = 2.0) -> str:
    """How QEMU ended. What it says of that comes a moment after its sockets are closed."""
    deadline, found = time.monotonic() + patience_s, folder / "exit"
    while not (found.exists() and (code := found.read_text().strip())):
        if time.monotonic() > deadline:
            return "from outside, with all that belonged to it"  # as VmLab.down does
        time.sleep(0.05)
    return {"0": "its kernel went down", "137": "its time was over, or QEMU was killed"}.get(code, f"QEMU's exit code is {code}")


class _Session:
    def __init__(self, path: Path, lock: int, name: str, log: Path, deadline: float) -> None:
        self._lock, self._name, self._log, self._folder = lock, name, log, path.parent
        self._nonce = secrets.token_bytes(8)
        self._parser = guest.Parser()
        self._out = bytearray()
        self._ready: list[tuple[bytes, bytes]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(path, deadline)
            self.peer = self._greet(deadline)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        os.close(self._lock)

    def _lost(self, what: str) -> ChannelLost:
        tail = self._log.read_text(errors="replace")[-600:] if self._log.exists() else ""
        return ChannelLost(f"VM {self._name}: {what}", f"its console ({self._log}) ends with:\n{tail}")

    def _connect(self, path: Path, deadline: float) -> None:
        while True:
            try:
                self._socket.connect(str(path))
                self._socket.setblocking(False)
                return
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() > deadline or path.parent.joinpath("exit").exists():
                    raise self._lost("QEMU does not run") from error
                time.sleep(0.05)

    def _greet(self, deadline: float) -> Peer:
        again = 0.0
        while True:
            if time.monotonic() > deadline:
                raise self._lost("no answer from the guest")
            if time.monotonic() > again and not self._out:
                self._out += guest.PADDING + guest.frame(self._nonce, guest.HELLO)
                again = time.monotonic() + HELLO_AGAIN_S
            self._exchange(min(deadline, again))
            for kind, payload in self._take():
                if kind == guest.HELLO:
                    found = json.loads(payload)
                    return Peer(found["boot_id"], found["release"])

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        self._out += guest.frame(self._nonce, kind, payload)

    def talk(self, source: BinaryIO, sinks: Mapping[bytes, Sink | None], deadline: float) -> int | None:
        """Until EXIT; None at the deadline."""
        given, ended = _descriptor(source), False
        while time.monotonic() < deadline:
            while not ended and len(self._out) < guest.PENDING_BYTES_MAX and _has(given):
                size = guest.PAYLOAD_BYTES_MAX
                data = source.read(size) if given is None else os.read(given, size)
                self.send(guest.STDIN if data else guest.STDIN_END, data)
                ended = not data
            waits = given is not None and not ended and len(self._out) < guest.PENDING_BYTES_MAX
            self._exchange(deadline, given if waits else None)
            for kind, payload in self._take():
                if kind == guest.EXIT:
                    end = json.loads(payload)
                    sink = sinks.get(guest.STDERR)
                    if end["error"] and sink is not None:
                        sink.write(f"{end['error']}\n".encode())
                    return int(end["code"])
                if (sink := sinks.get(kind)) is not None:
                    sink.write(payload)
        return None

    def _exchange(self, until: float, given: int | None = None) -> None:
        """Send and receive what goes now; wait for something to go, or to be given, until then, a second at most."""
        wait = max(0.0, min(1.0, until - time.monotonic()))
        sources: list[socket.socket | int] = [self._socket] if given is None else [self._socket, given]
        readable, writable, _ = select.select(sources, [self._socket] if self._out else [], [], wait)
        try:
            if writable:
                del self._out[: self._socket.send(self._out[: 1 << 16])]
            if self._socket in readable:
                data = self._socket.recv(1 << 16)
                if not data:
                    raise ConnectionResetError
                found = self._parser.feed(data)
                self._ready += [(kind, payload) for nonce, kind, payload in found if nonce == self._nonce]
        except BlockingIOError:
            return
        except ConnectionError as error:
            raise self._lost(f"it ended while a command ran; {ending(self._folder)}") from error

    def _take(self) -> list[tuple[bytes, bytes]]:
        taken, self._ready = self._ready, []
        return taken


def _descriptor(source: BinaryIO) -> int | None:
    """None: it is memory, and never waits."""
    try:
        return source.fileno()
    except io.UnsupportedOperation:
        return None


def _has(given: int | None) -> bool:
    """Whether a read would not wait: a terminal or a pipe may stay silent while its program has long ended."""
    return given is None or bool(select.select([given], [], [], 0)[0])
