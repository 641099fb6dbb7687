"""Makes a socket here, passes it (SCM_RIGHTS) to a child that has joined CGROUP, which connects it. Prints {"error"}.

argv: CGROUP HOST PORT.
"""

import json
import os
import socket
import sys

cgroup, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
here, there = socket.socketpair()
child = os.fork()
if child == 0:
    with open(f"{cgroup}/cgroup.procs", "w") as file:
        file.write("0")
    fds = socket.recv_fds(there, 1, 1)[1]
    try:
        with socket.socket(fileno=fds[0]) as passed:
            passed.settimeout(5)
            passed.connect((host, port))
        error = ""
    except OSError as failure:
        error = type(failure).__name__
    print(json.dumps({"error": error}), flush=True)
    os._exit(0)
with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as made:
    socket.send_fds(here, [b"x"], [made.fileno()])
    os.waitpid(child, 0)
