"""Requests one after the other over kept connections: `load.py HOST PATH COUNT|Ns [CONNECTIONS] [BODY] [BEGUN]`.
Makes the file BEGUN when it has its first answer. Prints JSON."""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path

HOST, PATH, AMOUNT = sys.argv[1:4]
CONNECTIONS = int(sys.argv[4]) if len(sys.argv) > 4 else 1
BODY = sys.argv[5] if len(sys.argv) > 5 and sys.argv[5] else None
BEGUN = Path(sys.argv[6]) if len(sys.argv) > 6 else None
SECONDS = float(AMOUNT[:-1]) if AMOUNT.endswith("s") else None
COUNT = 0 if SECONDS else int(AMOUNT)
ERRORS_KEPT = 5

by: Counter[str] = Counter()
errors: list[tuple[float, str]] = []
slowest = 0.0
lock = threading.Lock()
began = time.monotonic()


def worker(count: int) -> None:
    global slowest
    connection = http.client.HTTPConnection(HOST, timeout=10)
    done = 0
    while (time.monotonic() - began < SECONDS) if SECONDS else (done < count):
        start = time.monotonic()
        done += 1
        try:
            connection.request("POST" if BODY else "GET", PATH, BODY)
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise OSError(f"{response.status} {body[:200]!r}")
            name = json.loads(body)["by"]
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            with lock:
                errors.append((round(start - began, 3), f"{type(error).__name__}: {error}"))
            continue
        with lock:
            if BEGUN and not by:
                BEGUN.touch()
            by[name] += 1
            slowest = max(slowest, time.monotonic() - start)


threads = [threading.Thread(target=worker, args=(COUNT // CONNECTIONS,)) for _ in range(CONNECTIONS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
report = {
    "ok": sum(by.values()),
    "errors": len(errors),
    "first_errors": errors[:ERRORS_KEPT],
    "last_error_s": max((at for at, _ in errors), default=0.0),
    "by": dict(by),
    "slowest_ms": round(slowest * 1000, 1),
    "seconds": round(time.monotonic() - began, 2),
}
print(json.dumps(report))
