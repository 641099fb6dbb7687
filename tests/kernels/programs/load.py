"""Load of a few kinds, until it is killed; its counts, in a file that is always whole. Standard library only.

    load.py COUNTS-FILE http://NAME tcp://NAME:PORT …

For each address three or two kinds: `keep` asks again and again on one connection, `fresh` opens one for each; `paired` is a
second `keep` of HTTP with requests close upon each other, as a connection must have that the kernel is to carry.
Counts by kind: asked, failed (no answer, or another), lost (the connection ended in the midst of a request), opened, why.
A connection that the other end closes between two requests is opened again: that is no failure.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from urllib.parse import urlsplit

PATIENCE_S = 60.0  # a request that takes longer has failed: far more than a restart of anything takes, in emulation too
PAUSE_S = {"keep": 0.1, "paired": 0.02, "fresh": 0.3}
WRITE_S = 0.5


class Gone(Exception):
    """The connection ended before the whole answer."""


class Asker(threading.Thread):
    def __init__(self, url: str, kind: str) -> None:
        super().__init__(daemon=True)
        parts = urlsplit(url)
        self.http = parts.scheme == "http"
        self.host, self.port = str(parts.hostname), parts.port or 80
        self.kind = f"{parts.scheme} {kind}"
        self.pause_s, self.fresh = PAUSE_S[kind], kind == "fresh"
        self.counts = {"asked": 0, "failed": 0, "lost": 0, "opened": 0}
        self.why: list[str] = []
        self.sock: socket.socket | None = None
        self.seen = 0

    def run(self) -> None:
        while True:
            self.counts["asked"] += 1
            try:
                self.ask()
            except (Gone, ConnectionResetError, ConnectionAbortedError, BrokenPipeError) as error:
                self.counts["lost"] += self.sock is not None
                self.failed(f"{type(error).__name__}: {error}")
            except OSError as error:
                self.failed(f"{type(error).__name__}: {error}")
            if self.fresh:
                self.close()
            time.sleep(self.pause_s)

    def failed(self, why: str) -> None:
        self.counts["failed"] += 1
        self.why = [*self.why[-9:], f"{time.strftime('%H:%M:%S')} {why}"]
        self.close()

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def connection(self) -> socket.socket:
        if self.sock is not None and select.select([self.sock], [], [], 0)[0]:  # closed at rest
            self.close()
        if self.sock is None:
            self.sock = socket.create_connection((self.host, self.port), PATIENCE_S)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.counts["opened"] += 1
        return self.sock

    def ask(self) -> None:
        sock = self.connection()
        self.seen += 1
        if not self.http:
            said = f"{self.seen:08d}\n".encode()
            sock.sendall(said)
            if (got := self.read(sock, len(said))) != said:
                raise OSError(f"{got!r} for {said!r}")
            return
        last = b"Connection: close\r\n" if self.fresh else b""
        sock.sendall(b"GET / HTTP/1.1\r\nHost: " + self.host.encode() + b"\r\n" + last + b"\r\n")
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := sock.recv(65536)):
                raise Gone(f"after {len(head)} bytes of the head")
            head += data
        head, _, body = head.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        missing = int(fields.get(b"content-length", b"0")) - len(body)
        if missing > 0:
            body += self.read(sock, missing)
        if fields.get(b"connection") == b"close":
            self.close()
        status = head.split(b" ", 2)[1]
        if status != b"200":
            raise OSError(f"{status.decode()} {body[:80]!r}")

    def read(self, sock: socket.socket, size: int) -> bytes:
        got = b""
        while len(got) < size:
            if not (data := sock.recv(size - len(got))):
                raise Gone(f"{len(got)} of {size} bytes")
            got += data
        return got


def main() -> None:
    place, *urls = sys.argv[1:]
    kinds = [(url, kind) for url in urls for kind in ("keep", "paired", "fresh") if kind != "paired" or url.startswith("http:")]
    askers = [Asker(*each) for each in kinds]
    for each in askers:
        each.start()
    while True:
        told = {each.kind: {**each.counts, "why": each.why} for each in askers}
        with open(f"{place}.new", "w") as file:
            json.dump(told, file)
        os.rename(f"{place}.new", place)
        time.sleep(WRITE_S)


if __name__ == "__main__":
    main()
