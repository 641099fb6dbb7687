"""What applications do with sockets, on a connection that the kernel carries. argv: JSON {host, port}. Prints {way: "right" or
what was wrong} for FIONREAD, MSG_PEEK, poll, select, epoll (level, edge), non-blocking reads, recvmsg, a blocking read without
a timeout, one byte at a time, SO_RCVTIMEO, half-close; and MSG_WAITALL and splice, for the record."""

import array
import fcntl
import json
import os
import select
import socket
import struct
import sys
import termios
import threading
import time

ask = json.loads(sys.argv[1])
HOST, PORT = ask["host"], ask["port"]
ADDRESS = socket.getaddrinfo(HOST, PORT, type=socket.SOCK_STREAM)[0]
SIZE, WAIT_S = 3000, 5.0
said: dict[str, str] = {}


def request(tag: str, kind: str = "slow/3") -> bytes:
    return f"GET /{kind}/{tag} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


def connection() -> socket.socket:
    sock = socket.socket(ADDRESS[0], socket.SOCK_STREAM)
    sock.connect(ADDRESS[4])
    for turn in range(50):
        sock.sendall(request(f"{os.getpid()}-{turn}", "size/10"))
        whole(sock, b"")
        time.sleep(0.004)
    return sock


def whole(sock: socket.socket, got: bytes) -> bytes:
    """The answer's head and body, blocking, from what was read on."""
    sock.settimeout(WAIT_S)
    while b"\r\n\r\n" not in got or len(got) < got.index(b"\r\n\r\n") + 4 + int(
        got.lower().split(b"content-length:")[1].split()[0]
    ):
        data = sock.recv(65536)
        if not data:
            raise EOFError("ended")
        got += data
    return got


def waiting(sock: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return count[0]


def until(done) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > end:
            raise TimeoutError("nothing came")
        time.sleep(0.001)


def fionread(sock, tag):
    until(lambda: waiting(sock))
    count = waiting(sock)
    got = whole(sock, b"")
    assert len(got) == count, f"FIONREAD said {count}, {len(got)} were there"
    return got


def peek(sock, tag):
    seen = sock.recv(65536, socket.MSG_PEEK)
    again = sock.recv(10, socket.MSG_PEEK)
    got = whole(sock, b"")
    assert got.startswith(seen) and seen.startswith(again), "other bytes than peeked"
    return got


def by_poll(sock, tag):
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    assert poll.poll(WAIT_S * 1000), "poll saw nothing"
    return whole(sock, b"")


def by_select(sock, tag):
    assert select.select([sock], [], [], WAIT_S)[0], "select saw nothing"
    return whole(sock, b"")


def by_epoll(sock, tag, flags=0):
    with select.epoll() as epoll:
        epoll.register(sock, select.EPOLLIN | flags)
        assert any(event & select.EPOLLIN for _ in range(3) for _, event in epoll.poll(WAIT_S)), "epoll saw nothing"
    return whole(sock, b"")


def by_edge(sock, tag):
    return by_epoll(sock, tag, select.EPOLLET)


def non_blocking(sock, tag):
    sock.setblocking(False)
    got = b""
    end = time.monotonic() + WAIT_S
    while b"\r\n\r\n" not in got and time.monotonic() < end:
        try:
            got += sock.recv(7)
        except BlockingIOError:
            time.sleep(0.0005)
    return whole(sock, got)


def pieces(sock, tag):
    sock.settimeout(WAIT_S)
    buffers = [bytearray(5), bytearray(50), bytearray(60000)]
    count = sock.recvmsg_into(buffers)[0]
    return whole(sock, b"".join(bytes(buffer) for buffer in buffers)[:count])


def blocking(sock, tag):
    """In the kernel, not in Python's poll."""
    sock.settimeout(None)
    got = []
    thread = threading.Thread(target=lambda: got.append(sock.recv(65536)), daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert got, "the reader sleeps"
    return whole(sock, got[0])


def byte_by_byte(sock, tag):
    sock.settimeout(WAIT_S)
    got = b""
    while b"\r\n\r\n" not in got:
        got += sock.recv(1)
    return whole(sock, got)


def receive_timeout(sock, tag):
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(WAIT_S), 0))
    got = sock.recv(65536)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
    return whole(sock, got)


def half_close(sock, tag):
    sock.shutdown(socket.SHUT_WR)
    got = whole(sock, b"")
    assert sock.recv(1) == b"", "no end after the answer"
    return got


def low_water(sock, tag):
    """The socket leaves the pair; what it asks is answered as ever."""
    got = whole(sock, b"")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 40)
    for turn in range(30):
        sock.sendall(request(f"{tag}-{turn}", "size/100"))
        whole(sock, b"")
    return got


WAYS = {
    "FIONREAD": fionread, "MSG_PEEK": peek, "poll": by_poll, "select": by_select, "epoll": by_epoll, "epoll edge": by_edge,
    "non-blocking": non_blocking, "recvmsg": pieces, "blocking": blocking, "byte by byte": byte_by_byte,
    "SO_RCVTIMEO": receive_timeout, "SO_RCVLOWAT": low_water, "half-close": half_close,
}  # fmt: skip
sock = connection()
for name, way in WAYS.items():
    tag = f"{os.getpid()}-{name.replace(' ', '-')}"
    try:
        sock.sendall(request(tag))
        got = way(sock, tag)
        right = got.startswith(b"HTTP/1.1 200") and f"X-Tag: {tag}\r\n".encode() in got
        said[name] = "right" if right else f"another answer: {got[:100]!r}"
    except (OSError, EOFError, AssertionError, ValueError) as error:
        said[name] = f"{type(error).__name__} {error}"
    if said[name] != "right":
        sock = connection()


def for_the_record(name: str, read) -> None:
    fresh = connection()
    fresh.sendall(request(f"{os.getpid()}-{name}", "size/1000"))
    got = []
    thread = threading.Thread(target=lambda: got.append(read(fresh)), daemon=True)
    thread.start()
    thread.join(1.0)
    said[name] = f"{got[0]} bytes" if got else "sleeps"


def splice(fresh: socket.socket) -> int:
    fresh.setblocking(True)
    _reading, writing = os.pipe()
    try:
        return os.splice(fresh.fileno(), writing, 1000)
    except (AttributeError, OSError) as error:
        return f"{type(error).__name__}"


for_the_record("MSG_WAITALL", lambda fresh: (fresh.settimeout(None), len(fresh.recv(1000, socket.MSG_WAITALL)))[1])
for_the_record("splice", splice)
print(json.dumps(said), flush=True)
os._exit(0)
