"""The shop's catalog: `catalog.py NAME VERSION PORT`. Answers who it is and who it thinks is calling."""

from __future__ import annotations

import json
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME, VERSION, PORT = sys.argv[1], sys.argv[2], int(sys.argv[3])
BODY_BYTES_MAX = 1 << 20


def count_visit() -> str:
    """How often /visits was asked, counted in redis, which is reached by its name."""
    with socket.create_connection(("redis.shop.mesh", 6379), 5.0) as redis:
        redis.sendall(b"INCR visits\r\n")
        return redis.recv(64).decode().strip().lstrip(":")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def answer(self, status: int, **fields: Any) -> None:
        address = self.client_address[0].removeprefix("::ffff:")
        body = json.dumps({"by": NAME, "version": VERSION, "caller": address, "path": self.path, **fields}).encode() + b"\n"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/visits":
            self.answer(200, visits=count_visit())
        else:
            self.answer(200, items=["saddle", "bridle", "pillion"])

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", "0"))
        if length > BODY_BYTES_MAX:
            self.send_error(413)
            return
        self.answer(200, received=len(self.rfile.read(length)))

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the mesh has an access log."""


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 128
    daemon_threads = True


print(f"catalog {VERSION} on {PORT}", flush=True)
Server(("::", PORT), Handler).serve_forever()
