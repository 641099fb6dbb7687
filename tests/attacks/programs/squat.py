"""Takes PORT of ADDRESS as if it were the proxy (SO_REUSEPORT, SO_REUSEADDR) and says "SQUATTED" to whoever comes. PORT is of
TCP, or "…/udp". Prints the error's name, or PASSED; with a third argument it stays."""

import socket
import sys

address, (port, _, protocol) = sys.argv[1], sys.argv[2].partition("/")
kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    sock.bind((address, int(port)))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    print("PASSED", flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
    sys.exit()
while sys.argv[3:]:
    if kind == socket.SOCK_DGRAM:
        sock.sendto(b"SQUATTED", sock.recvfrom(4096)[1])
        continue
    conn, _ = sock.accept()
    conn.sendall(b"SQUATTED")
    conn.close()
