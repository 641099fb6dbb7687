"""Begins COUNT connections to port 8080 of each HOST in turn, and lets none of them get anywhere: a rule in its own namespace
drops all that leaves. Prints {"begun", "refused"} and keeps them for SECONDS, or until it is ended.

argv: COUNT SECONDS HOST … It stops when 100 in a row are refused.
"""

import json
import resource
import signal
import socket
import sys
import time

from netfilter import OUTPUT, add_closed, delete

count, seconds, hosts = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 64, max(count + 64, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
held, refused, row = [], 0, 0
signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the rule goes, too
add_closed("stuck", OUTPUT)
try:
    for number in range(count):
        host = hosts[number % len(hosts)]
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock.setblocking(False)
        try:
            sock.connect((host, 8080))
        except BlockingIOError:
            held.append(sock)
            row = 0
        except PermissionError:
            sock.close()
            refused, row = refused + 1, row + 1
            if row == 100:
                break
    print(json.dumps({"begun": len(held), "refused": refused}), flush=True)
    time.sleep(seconds)
finally:
    for sock in held:
        sock.close()
    delete("stuck")
