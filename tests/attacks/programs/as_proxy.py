"""Code that has taken the proxy over: its cgroup, user, seccomp filter and empty netns, with sockets as the agent hands out.

Started as the agent (in its cgroup, in a workload's netns, where it makes the sockets); argv: PROXY_CGROUP, then JSON: a list of
attempts, each [kind, …]; prints a JSON list of what became of each ("passed" or the error's name):
["dial", host, port, caller] with caller "" or "address,port,identity"; ["caller", address]; ["socket", family, type, protocol];
["read", path]. Dials are begun one after the other and answered together.
"""

import errno
import json
import os
import select
import socket
import struct
import sys
import time
from pathlib import Path

from l7proxy.confine import confine
from mesh.link import Hello  # noqa: F401  # as the proxy: all is imported before

proxy, attempts = sys.argv[1], json.loads(sys.argv[2])
LEVEL, CALLER = 0x50494C, 2
ANSWER_S = 1.0
made = {
    number: socket.socket(socket.AF_INET6 if ":" in attempt[1] else socket.AF_INET)
    for number, attempt in enumerate(attempts)
    if attempt[0] in ("dial", "caller")
}
Path(proxy, "cgroup.procs").write_text("0")
confine(65471, 65471)


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address if ":" in address else f"::ffff:{address}")


def caller(sock: socket.socket, text: str) -> None:
    address, port, identity = text.split(",")
    sock.setsockopt(LEVEL, CALLER, packed(address) + struct.pack("=IHH", int(identity), int(port), 0))


BEGUN = "begun"


def answered(sock: socket.socket, until: float) -> str:
    if not select.select([], [sock], [], max(0.0, until - time.monotonic()))[1]:
        return "TimeoutError"
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return type(OSError(code, os.strerror(code))).__name__ if code else "passed"


def attempt(number: int, kind: str, *rest: object) -> str:
    try:
        if kind == "dial":
            host, port, who = str(rest[0]), int(str(rest[1])), str(rest[2])
            sock = made[number]
            sock.setblocking(False)
            if who:
                caller(sock, who)
            if code := sock.connect_ex((host, port)):
                if code == errno.EINPROGRESS:
                    return BEGUN
                raise OSError(code, os.strerror(code))
        elif kind == "caller":
            caller(made[number], str(rest[0]))
        elif kind == "socket":
            socket.socket(*rest)  # type: ignore[arg-type]  # three numbers
        else:
            Path(str(rest[0])).read_bytes()
    except OSError as error:
        return type(error).__name__
    return "passed"


found = [attempt(number, *each) for number, each in enumerate(attempts)]
deadline = time.monotonic() + ANSWER_S
print(json.dumps([answered(made[number], deadline) if each == BEGUN else each for number, each in enumerate(found)]))
