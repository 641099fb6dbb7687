"""COUNT clients that connect to HOST PORT and never say a word; every tenth says something that is no HTTP. Prints {"opened"}."""

import json
import socket
import sys

host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
opened = 0
for number in range(count):
    try:
        with socket.create_connection((host, port), timeout=5) as conn:
            opened += 1
            if number % 10 == 0:
                conn.sendall(b"\x16\x03\x01\x00\x00")
    except OSError:
        pass
print(json.dumps({"opened": opened}))
