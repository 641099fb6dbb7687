"""Many clients that ask at a steady rate, whatever the answers take. argv: host port requests/s seconds connections.
Prints the 99th percentile in ms, from when a request was due (so a stall counts against everyone it delayed). The first answers
of each connection, through whatever it goes, do not count: it is kept for long."""

import gc
import heapq
import select
import socket
import sys
import time

host, port, rate, seconds, count = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
WARM = 64  # of each connection
ASK = b"GET / HTTP/1.1\r\nHost: express-web\r\nX-Pad: " + b"p" * 80 + b"\r\n\r\n"
gc.disable()
poll = select.epoll()
socks: dict[int, socket.socket] = {}
for _ in range(count):
    sock = socket.create_connection((host, port), 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(WARM):
        sock.sendall(ASK)
        if not sock.recv(65536).startswith(b"HTTP/1.1 200"):
            sys.exit("one of the first answers was no 200")
    sock.setblocking(False)
    poll.register(sock, select.EPOLLIN)
    socks[sock.fileno()] = sock

every = count / rate  # seconds between two requests of one connection
begin = time.perf_counter() + 0.05
due = [(begin + index / rate, fd) for index, fd in enumerate(socks)]
heapq.heapify(due)
asked: dict[int, float] = {}
late: dict[int, float] = {}  # due while the former answer was outstanding
took: list[float] = []
end = begin + seconds
while due or asked:
    now = time.perf_counter()
    while due and due[0][0] <= now:
        when, fd = heapq.heappop(due)
        if when >= end:
            continue
        heapq.heappush(due, (when + every, fd))
        if fd in asked:
            late.setdefault(fd, when)
        else:
            asked[fd] = when
            socks[fd].send(ASK)
    wait = max(0.0, due[0][0] - time.perf_counter()) if due else 1.0
    for fd, _ in poll.poll(min(wait, 0.001) if wait > 0.00005 else 0):
        data = socks[fd].recv(65536)
        if not data.startswith(b"HTTP/1.1 200"):
            sys.exit(f"not a whole 200: {data[:60]!r}")
        took.append(time.perf_counter() - asked.pop(fd))
        if fd in late:
            asked[fd] = late.pop(fd)
            socks[fd].send(ASK)
if len(took) < rate * seconds * 0.9:
    sys.exit(f"only {len(took)} of {rate * seconds:.0f} requests could be asked")
print(sorted(took)[int(len(took) * 0.99)] * 1000)
