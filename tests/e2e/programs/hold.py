"""Holds one echo connection for argv[3] seconds, a round trip every 20 ms, or until SIGTERM, but then for 51 of them at
least; with argv[4] "idle" it only waits for the end. Prints "open <ip as the server saw>" once, then JSON: {"rounds",
"gap_ms", "error", "at": monotonic seconds of the end}."""

import json
import signal
import socket
import sys
import time


class Enough(Exception):
    pass


def enough(*_: object) -> None:
    global over
    over = True
    if idle:
        raise Enough


ROUNDS_MIN = 51
signal.signal(signal.SIGTERM, enough)
host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
idle = sys.argv[4:] == ["idle"]
rounds, gap, error, over = 0, 0.0, "", False
try:
    with socket.create_connection((host, port), timeout=10) as conn:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print("open", conn.makefile("rb", buffering=0).readline().decode().strip(), flush=True)
        conn.settimeout(seconds if idle else 10)
        end = time.monotonic() + seconds
        while rounds < ROUNDS_MIN if over else time.monotonic() < end:
            began = time.monotonic()
            if idle:
                if conn.recv(1) == b"":
                    error = "closed"
                break
            conn.sendall(b"x" * 64)
            got = 0
            while got < 64:
                data = conn.recv(64)
                if not data:
                    raise ConnectionError("closed")
                got += len(data)
            rounds += 1
            gap = max(gap, time.monotonic() - began)
            time.sleep(0.02)
except Enough:
    pass
except TimeoutError as failure:
    error = "" if idle else repr(failure)
except OSError as failure:
    error = repr(failure)
print(json.dumps({"rounds": rounds, "gap_ms": round(gap * 1000), "error": error, "at": time.monotonic()}), flush=True)
