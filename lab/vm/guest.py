"""The guest's end of the command channel. Runs on the VM's own Python with the standard library alone: it is copied in
by the initramfs, so a disk holds nothing of it. `--init`: as PID 1 of a VM without systemd.

Each virtio-serial port `pillion.N` carries one command at a time, as frames::

    magic 4 | nonce 8 | type 1 | length 4 | payload

The host opens a session with zeros (they fill up whatever a session before left half-sent) and HELLO with a nonce of
its own; frames of another nonce are of a dead session and skipped by either side. When the host goes, the command dies.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MAGIC = b"PLvm"
HEADER = struct.Struct(">4s8scI")
PAYLOAD_BYTES_MAX = 32768
PADDING = bytes(PAYLOAD_BYTES_MAX + HEADER.size)
HELLO, RUN, STDIN, STDIN_END, STDOUT, STDERR, EXIT = b"H", b"R", b"I", b"Z", b"O", b"E", b"X"
PENDING_BYTES_MAX = 1 << 18
READS_MAX = 32
IDLE_S = 0.1
FAILED_TO_START = 127
FILES_MAX = 65536


def frame(nonce: bytes, kind: bytes, payload: bytes = b"") -> bytes:
    return HEADER.pack(MAGIC, nonce, kind, len(payload)) + payload


class Parser:
    """Bytes in, whole frames out; skips what is no frame."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes, bytes]]:
        """(nonce, type, payload) of each frame that is complete."""
        self._data += data
        found: list[tuple[bytes, bytes, bytes]] = []
        while True:
            start = self._data.find(MAGIC)
            if start < 0:
                del self._data[: max(0, len(self._data) - len(MAGIC) + 1)]
                return found
            del self._data[:start]
            if len(self._data) < HEADER.size:
                return found
            _, nonce, kind, length = HEADER.unpack_from(self._data)
            if length > PAYLOAD_BYTES_MAX:
                del self._data[:1]
                continue
            if len(self._data) < HEADER.size + length:
                return found
            found.append((nonce, kind, bytes(self._data[HEADER.size : HEADER.size + length])))
            del self._data[: HEADER.size + length]


class Session:
    """One command, from HELLO to EXIT, on a port that is open and not blocking."""

    def __init__(self, port: int, first: bytes) -> None:
        self._port = port
        self._parser = Parser()
        self._out = bytearray()
        self._input = bytearray()
        self._input_ended = False
        self._nonce = b""
        self._child: subprocess.Popen[bytes] | None = None
        self._over = False
        self._take(first)

    def run(self) -> None:
        try:
            while not self._over or self._out:
                self._turn()
        except (ConnectionError, OSError):
            pass
        finally:
            if self._child is not None and self._child.poll() is None:
                os.killpg(self._child.pid, signal.SIGKILL)
                self._child.wait()

    def _turn(self) -> None:
        child, poll = self._child, select.poll()
        wanted = select.POLLIN if len(self._input) < PENDING_BYTES_MAX else 0
        poll.register(self._port, wanted | (select.POLLOUT if self._out else 0))
        streams = {}
        if child is not None:
            for kind, stream in ((STDOUT, child.stdout), (STDERR, child.stderr)):
                if stream is not None and not stream.closed and len(self._out) < PENDING_BYTES_MAX:
                    streams[stream.fileno()] = (kind, stream)
                    poll.register(stream.fileno(), select.POLLIN)
            if child.stdin is not None and not child.stdin.closed:
                if self._input:
                    poll.register(child.stdin.fileno(), select.POLLOUT)
                elif self._input_ended:
                    child.stdin.close()
        for fd, events in poll.poll(IDLE_S * 1000 if child is not None else 10_000):
            if fd == self._port:
                self._port_ready(events)
            elif fd in streams:
                self._child_said(*streams[fd])
            elif child is not None and child.stdin is not None:
                self._give_input(child.stdin)
        if child is not None and self._child is child:
            self._reap(child)

    def _port_ready(self, events: int) -> None:
        if events & select.POLLOUT:
            del self._out[: os.write(self._port, self._out[:PAYLOAD_BYTES_MAX])]
        if events & select.POLLIN:
            self._take(self._received())
        elif events & (select.POLLHUP | select.POLLERR):
            raise ConnectionError

    def _received(self) -> bytes:
        """What is there; the driver gives a page at a time."""
        parts = []
        for _ in range(READS_MAX):
            try:
                parts.append(os.read(self._port, 1 << 16))
            except BlockingIOError:
                break
            if not parts[-1]:
                raise ConnectionError
        return b"".join(parts)

    def _take(self, data: bytes) -> None:
        for nonce, kind, payload in self._parser.feed(data):
            if kind == HELLO:
                if nonce != self._nonce:
                    if self._child is not None:  # another host, and we did not see the first one go
                        os.killpg(self._child.pid, signal.SIGKILL)
                    self._nonce, self._out, self._input, self._child = nonce, bytearray(), bytearray(), None
                    self._input_ended = self._over = False
                self._send(HELLO, json.dumps({"boot_id": boot_id(), "release": os.uname().release}).encode())
            elif nonce != self._nonce:
                continue
            elif kind == RUN:
                self._start(json.loads(payload))
            elif kind == STDIN:
                self._input += payload
            elif kind == STDIN_END:
                self._input_ended = True

    def _send(self, kind: bytes, payload: bytes = b"") -> None:
        self._out += frame(self._nonce, kind, payload)

    def _start(self, wish: dict[str, Any]) -> None:
        try:
            self._child = subprocess.Popen(
                wish["argv"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=wish.get("cwd") or "/",
                env=environment(wish.get("env") or {}),
                start_new_session=True,
            )
            for stream in (self._child.stdin, self._child.stdout, self._child.stderr):
                os.set_blocking(stream.fileno(), False)  # type: ignore[union-attr]  # all three are pipes
        except (OSError, ValueError) as error:
            self._send(EXIT, json.dumps({"code": FAILED_TO_START, "error": str(error)}).encode())
            self._over = True

    def _child_said(self, kind: bytes, stream: Any) -> None:
        data = stream.read(PAYLOAD_BYTES_MAX)
        if data:
            self._send(kind, data)
        elif data is not None:
            stream.close()

    def _give_input(self, stdin: Any) -> None:
        try:
            del self._input[: stdin.write(self._input[:65536]) or 0]
        except BrokenPipeError:
            self._input.clear()
            stdin.close()

    def _reap(self, child: subprocess.Popen[bytes]) -> None:
        """After its exit, once what it wrote is read: daemons it left may hold the pipes open, nobody waits for those."""
        code = child.poll()
        if code is None or len(self._out) >= PENDING_BYTES_MAX:
            return
        for kind, stream in ((STDOUT, child.stdout), (STDERR, child.stderr)):
            while stream is not None and not stream.closed and len(self._out) < PENDING_BYTES_MAX:
                data = stream.read(PAYLOAD_BYTES_MAX)
                if not data:
                    stream.close()
                else:
                    self._send(kind, data)
        if all(stream is None or stream.closed for stream in (child.stdout, child.stderr)):
            self._send(EXIT, json.dumps({"code": code, "error": ""}).encode())
            self._child, self._over = None, True


def environment(extra: dict[str, str]) -> dict[str, str]:
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    # systemctl gives up on a manager after 25 s, which in emulation is busy for longer after a daemon-reload
    return {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb", "SYSTEMD_BUS_TIMEOUT": "300", **extra}


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def ports() -> list[Path]:
    """The devices of the channel, by their names in sysfs (no udev needed)."""
    names = sorted(Path("/sys/class/virtio-ports").glob("vport*/name"))
    return [Path("/dev") / path.parent.name for path in names if path.read_text().startswith("pillion.")]


def serve() -> None:
    """One look at each idle port every IDLE_S; a thread for each that speaks."""
    waiting: list[int] = []
    while not waiting:
        waiting = [os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) for path in ports()]
        time.sleep(0.0 if waiting else IDLE_S)
    lock = threading.Lock()

    def session(fd: int, first: bytes) -> None:
        try:
            Session(fd, first).run()
        finally:
            with lock:
                waiting.append(fd)

    while True:
        with lock:
            idle = list(waiting)
        for fd in idle:
            try:
                first = os.read(fd, 1 << 16)
            except BlockingIOError:
                continue
            if first:
                with lock:
                    waiting.remove(fd)
                threading.Thread(target=session, args=(fd, first), daemon=True).start()
        time.sleep(IDLE_S)


def main() -> None:
    if "--init" in sys.argv:  # the kernel's own limit is 1024: a service manager would have set more
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES_MAX, FILES_MAX))
    if "--init" in sys.argv and os.fork() != 0:
        while True:  # PID 1 buries orphans and never ends
            try:
                os.wait()
            except ChildProcessError:
                time.sleep(1)
    serve()


if __name__ == "__main__":
    main()
