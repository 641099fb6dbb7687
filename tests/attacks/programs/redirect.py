"""A NAT rule in one's own namespace sends connections to PORT to the proxy's listener; then dials PORT. Prints {"error"}.

argv: HOST PORT LISTENER TIMEOUT (s)
For such a connection conntrack answers SO_ORIGINAL_DST with an address that no hook allowed.
"""

import json
import socket
import sys

from netfilter import BEFORE_ROUTING, OUTPUT, add_nat, attribute, delete, expression, nest, number, to_port

host, port, listener, timeout_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
add_nat(
    "lie",
    OUTPUT,
    BEFORE_ROUTING,
    *to_port(port),
    expression("immediate", attribute(1, 1), nest(2, attribute(1, number(listener)))),
    expression("redir", attribute(1, 1), attribute(3, 2)),
)
try:
    with socket.create_connection((host, port), timeout=timeout_s) as conn:
        conn.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        error = "" if conn.recv(1) else "closed"
except OSError as failure:
    error = type(failure).__name__
finally:
    delete("lie")
print(json.dumps({"error": error}))
