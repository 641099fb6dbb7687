"""Resolves a name and makes one request on a new connection, `rate` times a second. argv: url rate seconds; SIGTERM: no more.
Prints "started <unix seconds of the beginning>" after the first success, then JSON: {"ok", "failed", "errors", "slowest_ms",
"statuses"}; errors: up to 500 of [seconds since the beginning when it was asked, and when it failed, text]."""

import http.client
import json
import signal
import sys
import threading
import time
from urllib.parse import urlsplit

url, rate, seconds = urlsplit(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
ok, statuses, errors, slowest = 0, {}, [], 0.0
lock, started = threading.Lock(), threading.Event()
enough: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _: enough.append(number))


def since() -> float:
    return round(time.monotonic() - begin, 2)


def one() -> None:
    global ok, slowest
    began, at = time.monotonic(), since()
    try:
        conn = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=5)
        conn._http_vsn, conn._http_vsn_str = 10, "HTTP/1.0"  # of such a client the server's connection is not kept either
        conn.request("GET", url.path or "/")
        status = conn.getresponse()
        body = status.read()
        conn.close()
        with lock:
            statuses[status.status] = statuses.get(status.status, 0) + 1
            if status.status == 200:
                ok += 1
            elif len(errors) < 500:
                errors.append([at, since(), f"{status.status} {body[:200]!r}"])
    except OSError as failure:
        with lock:
            statuses["error"] = statuses.get("error", 0) + 1
            if len(errors) < 500:
                errors.append([at, since(), repr(failure)])
    with lock:
        slowest = max(slowest, time.monotonic() - began)
    if not started.is_set():
        started.set()
        print("started", wall, flush=True)


threads = []
begin, wall = time.monotonic(), time.time()
for index in range(int(rate * seconds)):
    time.sleep(max(0.0, begin + index / rate - time.monotonic()))
    if enough:
        break
    thread = threading.Thread(target=one)
    thread.start()
    threads.append(thread)
for thread in threads:
    thread.join()
print(
    json.dumps(
        {"ok": ok, "failed": len(threads) - ok, "errors": errors, "slowest_ms": round(slowest * 1000), "statuses": statuses}
    )
)
