"""nginx as a reader: a real one behind a unix socket, asked in keep-alive batches, that says what it understood."""

from __future__ import annotations

import re
import select
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote_to_bytes

from fuzz.target import Disagreement
from l7proxy.http1.head import RequestHead

BATCH = 128  # requests pipelined on one connection
START_S = 10.0
REPLY_S = 5.0
_CONFIG = """
daemon off; master_process off; pid {folder}/pid; error_log /dev/null;
events {{ worker_connections 256; }}
http {{
  access_log off; keepalive_requests 100000000; client_max_body_size 0; server_tokens off; client_header_buffer_size 64k;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c; uwsgi_temp_path {folder}/d;
  scgi_temp_path {folder}/e;
  map $uri $plain {{ "~[\\x00-\\x1f]" "-"; default $uri; }}
  server {{
    listen unix:{folder}/socket;
    add_header X-Read "$request_method $request_uri $http_host $host $content_length $http_transfer_encoding." always;
    add_header X-Uri "$plain" always;
    return 204;
  }}
}}
"""
_REPLY = re.compile(rb"HTTP/1\.1 ([0-9]{3})[^\r]*\r\n((?:[^\r\n]*\r\n)*?)\r\n")
_LENGTH = re.compile(rb"(?im)^content-length: ([0-9]+)\r$")
_READ = re.compile(rb"(?m)^X-Read: (.*)\.\r$")
_URI = re.compile(rb"(?m)^X-Uri: (.*)\r$")
_ABSOLUTE = re.compile(rb"(?i)\Ahttp://[^/?]*")


class Nginx:
    """The server; a context manager. ``folder`` must exist and be short enough for a socket's path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = str(folder / "socket")

    def __enter__(self) -> Self:
        config = self.folder / "nginx.conf"
        config.write_text(_CONFIG.format(folder=self.folder))
        argv = ["setpriv", "--pdeathsig", "KILL", "nginx", "-p", str(self.folder), "-c", str(config), "-e", "/dev/null"]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while True:
            try:
                connect(self.path).close()
                return self
            except OSError as error:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.__exit__(None, None, None)
                    raise RuntimeError(f"nginx did not start in {self.folder}; is it installed?") from error
                time.sleep(0.02)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()


def connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(REPLY_S)
    connection.connect(path)
    return connection


class Echo:
    """Requests collected and asked about together. Each answer must be what Pillion understood, and so must the
    sentinel's after them: a request that ended elsewhere shifts all that follow."""

    def __init__(self, nginx: Nginx) -> None:
        self.path = nginx.path
        self.waiting: list[tuple[bytes, RequestHead, bytes]] = []
        self.asked = self.refused = 0
        self.marks = 0

    def add(self, case: bytes, head: RequestHead, sent: bytes) -> None:
        self.waiting.append((case, head, sent))

    def close(self) -> None:
        self.waiting.clear()

    def run(self) -> list[tuple[bytes, Disagreement]]:
        waiting, self.waiting = self.waiting, []
        found: list[tuple[bytes, Disagreement]] = []
        at = 0
        while at < len(waiting):
            batch = waiting[at : at + BATCH]
            read, wrong = self._ask(batch)
            if wrong is None:
                at += read
                continue
            # which of them? one at a time, up to where the answers went wrong
            for one in batch[: read + 1]:
                _, alone = self._ask([one])
                if alone is not None:
                    found.append((one[0], alone))
                    break
            else:
                found.append((batch[read][0], wrong))
            at += read + 1
        return found

    def _ask(self, batch: list[tuple[bytes, RequestHead, bytes]]) -> tuple[int, Disagreement | None]:
        """(how many were dealt with, what was wrong with the one after them). A refusal ends a connection."""
        self.marks += 1
        mark = b"/mark-%d" % self.marks
        data = b"".join(sent for _, _, sent in batch) + b"GET " + mark + b" HTTP/1.1\r\nHost: mark\r\n\r\n"
        with connect(self.path) as connection:
            connection.setblocking(False)
            replies = _Replies(connection, data)
            for index, (_, head, sent) in enumerate(batch):
                reply = replies.next(head.method == "HEAD")
                if reply is None:
                    return (index, Disagreement("nginx", "no answer", repr(sent[-200:])))
                status, fields = reply
                self.asked += 1
                closes = b"\r\nConnection: close" in b"\r\n" + fields
                if status != 204:  # refused, or TRACE, which nginx reads and answers in its own way
                    self.refused += 1
                else:
                    try:
                        _compare(head, fields)
                    except Disagreement as error:
                        return (index, error)
                if closes:
                    return (index + 1, None)
            reply = replies.next(False)
            if reply is None or not (found := _READ.search(reply[1])) or found[1].split(b" ")[1] != mark:
                return (len(batch) - 1, Disagreement("nginx", "another end", repr(batch[-1][2][-200:])))
            if replies.more():
                return (len(batch) - 1, Disagreement("nginx", "more requests", repr(batch[-1][2][-200:])))
        return (len(batch), None)


class _Replies:
    """Sends while it reads: neither side waits for the other."""

    def __init__(self, connection: socket.socket, data: bytes) -> None:
        self.connection, self.out, self.buffer = connection, memoryview(data), b""
        self.ended = False

    def _fill(self) -> bool:
        """Get more bytes; False at the end."""
        while not self.ended:
            readable, writable, _ = select.select([self.connection], [self.connection] if self.out else [], [], REPLY_S)
            if not readable and not writable:
                return False
            try:
                if writable:
                    self.out = self.out[self.connection.send(self.out) :]
                if readable:
                    data = self.connection.recv(262144)
                    if not data:
                        self.ended = True
                    self.buffer += data
                    return not self.ended
            except BlockingIOError:
                continue
            except OSError:
                self.out = memoryview(b"")
                if not readable:
                    continue
                self.ended = True
        return False

    def next(self, head_only: bool) -> tuple[int, bytes] | None:
        while True:
            match = _REPLY.match(self.buffer)
            if match is None:
                if not self._fill():
                    return None
                continue
            status = int(match[1])
            if status < 200:
                self.buffer = self.buffer[match.end() :]
                continue
            length = _LENGTH.search(match[2])
            end = match.end() + (int(length[1]) if length and not head_only else 0)
            while len(self.buffer) < end:
                if not self._fill():
                    return None
            self.buffer = self.buffer[end:]
            return status, match[2]

    def more(self) -> bool:
        return bool(self.buffer)


def _compare(head: RequestHead, fields: bytes) -> None:
    """What nginx says it read against what Pillion read. Raises Disagreement."""
    found = _READ.search(fields)
    if found is None:
        raise Disagreement("nginx", "an answer without its reading", repr(fields[:300]))
    values = dict(head.fields)
    host = values.get(b"host", b"")
    expected = [
        head.method.encode(),
        _ABSOLUTE.sub(b"", head.target) or b"/",
        host,
        values.get(b"content-length", b""),
        values.get(b"transfer-encoding", b"").lower(),
    ]
    method, target, raw_host, own_host, *framing = found[1].split(b" ")
    framing[1] = framing[1].lower()
    if framing[1:] == [b"chunked"]:
        framing[0] = b""  # nginx sets it to what it has discarded
    for what, ours, theirs in (
        ("another method", expected[:1], [method]),
        ("another target", expected[1:2], [target]),
        ("another host field", expected[2:3], [raw_host]),
        ("another framing", expected[3:], framing),
        ("another host", [head.host.encode()] if host else [own_host], [own_host]),
    ):
        if ours != theirs:
            raise Disagreement("nginx", what, f"{theirs!r}, Pillion {ours!r}")
    uri = _URI.search(fields)
    if uri is not None and not head.path_fault and head.path != "*" and uri[1] != unquote_to_bytes(head.path):
        raise Disagreement("nginx", "another path", f"{uri[1]!r}, Pillion {head.path!r}")
