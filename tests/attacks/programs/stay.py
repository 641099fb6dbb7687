"""Keeps a connection. argv: HOST PORT. For each line of its input: says "stay", prints the answer's line, or the error's name."""

import socket
import sys

conn = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3)
print("open", flush=True)
for _ in sys.stdin:
    try:
        conn.sendall(b"stay\n")
        print(conn.recv(4096).decode().strip() or "closed", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
