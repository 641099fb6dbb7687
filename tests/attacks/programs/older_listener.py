"""A listener made outside the mesh; then this process joins CGROUP, says "ready", and after a line of input takes who came.

argv: CGROUP HOST PORT. Prints {"error"}: "" when somebody was let in.
"""

import json
import socket
import sys

cgroup, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
with open(f"{cgroup}/cgroup.procs", "w") as file:
    file.write("0")
print("ready", flush=True)
sys.stdin.readline()
try:
    listener.settimeout(0.2)
    caller, _ = listener.accept()
    caller.settimeout(1)
    error = "" if caller.recv(1) else "closed"
except OSError as failure:
    error = type(failure).__name__
print(json.dumps({"error": error}))
