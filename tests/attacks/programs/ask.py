"""Sends raw requests, each on a connection of its own. Reads {"host", "port", "requests": [latin-1 text], "wait_s"} from standard
input, prints [{"status", "reason", "body"}] (status 0: no answer within `wait_s`)."""

import json
import socket
import sys

wanted = json.load(sys.stdin)
WAIT_S = wanted.get("wait_s", 5.0)


def ask(request: str) -> dict[str, object]:
    out = b""
    try:
        with socket.create_connection((wanted["host"], wanted["port"]), timeout=WAIT_S) as conn:
            conn.sendall(request.encode("latin-1"))
            while data := conn.recv(65536):
                out += data
    except OSError:
        pass
    head, _, body = out.partition(b"\r\n\r\n")
    words = head.split()
    reason = next((line.split()[1] for line in head.split(b"\r\n") if line.lower().startswith(b"x-pillion-reason:")), b"")
    status = int(words[1]) if out.startswith(b"HTTP/1.") and len(words) > 1 and words[1].isdigit() else 0
    return {"status": status, "reason": reason.decode(), "body": (body if status else out).decode("latin-1")}


print(json.dumps([ask(request) for request in wanted["requests"]]))
