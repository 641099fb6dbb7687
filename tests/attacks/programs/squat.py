"""Listens on ADDRESS PORT as if it were the proxy (SO_REUSEPORT, SO_REUSEADDR) and says "SQUATTED" to whoever comes. Prints the
error's name, or PASSED; with a third argument it stays."""

import socket
import sys

address, port = sys.argv[1], int(sys.argv[2])
sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    sock.bind((address, port))
    sock.listen()
    print("PASSED", flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
    sys.exit()
while sys.argv[3:]:
    conn, _ = sock.accept()
    conn.sendall(b"SQUATTED")
    conn.close()
