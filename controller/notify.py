"""The way to the service manager, see `mesh.notify`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from mesh import notify


class Notify(notify.Notify):
    def __init__(self) -> None:
        super().__init__(os.environ, _connect)


def _connect(address: str) -> Callable[[bytes], int]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock.send
