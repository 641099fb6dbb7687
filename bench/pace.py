"""A client that asks at a steady rate on one kept connection, whatever the answers take. argv: host port requests/s seconds.
Prints the 99th percentile in ms, from when a request was due; an error or another status than 200 ends it with 1."""

import socket
import sys
import time

host, port, rate, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
ask = b"GET / HTTP/1.1\r\nHost: pace\r\n\r\n"
sock = socket.create_connection((host, port), 5)
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
took = []
begin = time.perf_counter() + 0.01
for index in range(int(rate * seconds)):
    due = begin + index / rate
    time.sleep(max(0.0, due - time.perf_counter()))
    sock.sendall(ask)
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            sys.exit("the connection ended")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        sys.exit(head.split(b"\r\n")[0].decode())
    length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += sock.recv(65536)
    took.append(time.perf_counter() - due)
print(sorted(took)[int(len(took) * 0.99)] * 1000)
