"""Asks for a WebSocket, sends 300 kB of frames-to-be and reads them back. argv: host, port. Prints JSON {"start", "same"}."""

import json
import os
import socket
import sys
import threading

host, port = sys.argv[1], int(sys.argv[2])
payload = os.urandom(300_000)
with socket.create_connection((host, port), timeout=5) as conn:
    conn.sendall(
        f"GET /chat HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    answers = conn.makefile("rb")
    start = answers.readline().decode().strip()
    while answers.readline().strip():
        pass
    same = False
    if " 101 " in start:
        threading.Thread(target=conn.sendall, args=(payload,), daemon=True).start()
        same = answers.read(len(payload)) == payload
print(json.dumps({"start": start, "same": same}))
