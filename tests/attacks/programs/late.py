"""Connects, says "open", and after a line of input asks. argv: HOST PORT. Prints {"answer"}: "" when there is none."""

import json
import socket
import sys

with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3) as conn:
    print("open", flush=True)
    sys.stdin.readline()
    conn.settimeout(1.2)
    try:
        conn.sendall(b"x")
        answer = conn.recv(64).decode()
    except OSError:
        answer = ""
print(json.dumps({"answer": answer}))
