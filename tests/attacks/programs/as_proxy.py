"""Code that has taken the proxy over: its cgroup, user, seccomp filter and empty netns, with sockets as the agent hands out.

Started as the agent (in its cgroup, in a workload's netns, where it makes the sockets); argv: PROXY_CGROUP, then JSON: a list of
attempts, each [kind, …]; prints a JSON list of what became of each ("passed" or the error's name):
["dial", host, port, caller] with caller "" or "address,port,identity"; ["caller", address]; ["socket", family, type, protocol];
["read", path].
"""

import json
import socket
import struct
import sys
from pathlib import Path

from l7proxy.confine import confine
from mesh.link import Hello  # noqa: F401  # as the proxy: all is imported before

proxy, attempts = sys.argv[1], json.loads(sys.argv[2])
LEVEL, CALLER = 0x50494C, 2
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


def attempt(number: int, kind: str, *rest: object) -> str:
    try:
        if kind == "dial":
            host, port, who = str(rest[0]), int(str(rest[1])), str(rest[2])
            sock = made[number]
            sock.settimeout(1)
            if who:
                caller(sock, who)
            sock.connect((host, port))
        elif kind == "caller":
            caller(made[number], str(rest[0]))
        elif kind == "socket":
            socket.socket(*rest)  # type: ignore[arg-type]  # three numbers
        else:
            Path(str(rest[0])).read_bytes()
    except OSError as error:
        return type(error).__name__
    return "passed"


print(json.dumps([attempt(number, *each) for number, each in enumerate(attempts)]))
