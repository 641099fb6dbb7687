"""A process in a cgroup and a netns that runs what tests tell it: ``python actor.py CGROUP NETNS FD``.

Messages on the socket FD are a pickled (code, name) with at most one descriptor: with a name, the descriptor becomes a
socket of that name; else the code is evaluated (or executed) and the result, or the exception, pickled back. A result
that is a socket travels as a descriptor.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import socket
import struct
import sys
from pathlib import Path
from typing import Any

CLONE_NEWNET = 0x40000000
MESSAGE_BYTES_MAX = 1 << 18


def main(cgroup: str, netns: str, control: socket.socket) -> None:
    """Serve until the other end closes."""
    if cgroup:
        (Path(cgroup) / "cgroup.procs").write_text(str(os.getpid()))
    if netns:
        with open(netns) as place:
            if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {netns}")
    names: dict[str, Any] = {"socket": socket, "os": os, "struct": struct}

    def tidy() -> None:
        for value in names.values():
            if isinstance(value, socket.socket):
                value.close()

    names["tidy"] = tidy
    while True:
        data, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES_MAX, 1)
        if not data:
            return
        code, name = pickle.loads(data)
        reply: tuple[bool, Any]
        sent: list[int] = []
        try:
            if name:
                names[name] = socket.socket(fileno=fds[0])
                reply = (True, None)
            else:
                try:
                    compiled = compile(code, "<test>", "eval")
                except SyntaxError:
                    exec(compile(code, "<test>", "exec"), names)
                    reply = (True, None)
                else:
                    result = eval(compiled, names)
                    if isinstance(result, socket.socket):
                        sent, result = [result.fileno()], None
                    reply = (True, result)
        except Exception as error:
            reply = (False, error)
        try:
            data = pickle.dumps(reply)
        except Exception as error:  # a value that cannot travel: say so, live on
            data = pickle.dumps((False, TypeError(f"{code}: {error}")))
        socket.send_fds(control, [data], sent)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], socket.socket(fileno=int(sys.argv[3])))
