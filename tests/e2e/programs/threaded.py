"""A server with a thread for each connection, on blocking sockets. argv: port. /file/<n>/<tag> by sendfile, /parts/<n>/<tag> by
writev of head and pieces; any other as Go's and Java's here."""

import os
import socketserver
import sys
import tempfile
from http.server import BaseHTTPRequestHandler

FILE = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as it serves
FILE.write(b"x" * 400_000)
FILE.flush()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, asked: bytes) -> None:
        kind, number, tag = self.path.strip("/").split("/")[0], self.path.split("/")[2], self.path.split("/")[-1]
        size = len(str(len(asked))) if asked else int(number)
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nX-Tag: {tag}\r\n\r\n".encode()
        sock = self.connection
        if kind == "file":
            sock.sendall(head)
            at = 0
            while at < size:
                at += os.sendfile(sock.fileno(), FILE.fileno(), at, size - at)
        elif kind == "parts":
            pieces = [head, *(b"x" * min(1000, size - at) for at in range(0, size, 1000))]
            sent = os.writev(sock.fileno(), pieces)
            sock.sendall(b"".join(pieces)[sent:])
        else:
            sock.sendall(head + (str(len(asked)).encode() if asked else b"x" * size))

    def log_message(self, *_: object) -> None: ...


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 64
    address_family = 10


Server(("::", int(sys.argv[1])), Handler).serve_forever()
