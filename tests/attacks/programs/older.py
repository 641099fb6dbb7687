"""A connection made outside the mesh; then this process joins CGROUP, says "ready", and after a line of input writes on it.

argv: CGROUP HOST PORT. Prints {"error"}: "" when the connection still carries an echo.
"""

import json
import socket
import sys

cgroup, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
    client = socket.create_connection((host, port), timeout=5)
    server, _ = listener.accept()
with open(f"{cgroup}/cgroup.procs", "w") as file:
    file.write("0")
print("ready", flush=True)
sys.stdin.readline()
try:
    client.sendall(b"x")
    server.settimeout(3)
    error = "" if server.recv(1) else "closed"
except OSError as failure:
    error = type(failure).__name__
print(json.dumps({"error": error}))
