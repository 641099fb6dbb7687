"""A server whose listener makes no socket for a connection before its first bytes (TCP_DEFER_ACCEPT). argv: PORT. Says
"ready"; answers each connection's first bytes with the address it saw."""

import socket
import sys

with socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    print("ready", flush=True)
    while True:
        conn, who = listener.accept()
        with conn:
            conn.settimeout(3)
            try:
                conn.recv(64)
                conn.sendall(f"served {who[0]}\n".encode())
            except OSError:
                pass
