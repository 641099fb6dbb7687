"""What crosses an interface of a namespace: frames, kept in memory with a limit, for scapy or plain search."""

from __future__ import annotations

import select
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from lab import netns

FRAMES_BYTES_MAX = 256 << 20
ETH_P_ALL = 3
SO_RCVBUFFORCE = 33


class Capture:
    """`with Capture(path, "eth0") as seen: …` then `seen.frames`, `seen.packets()` (scapy), `seen.contains(b"…")`.

    Listening has begun when the block is entered. At FRAMES_BYTES_MAX it stops and says so in `full`.
    """

    def __init__(self, path: Path, interface: str = "eth0") -> None:
        self._path, self._interface = path, interface
        self.frames: list[bytes] = []
        self.full = False
        self._stop = threading.Event()

    def _open(self) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        sock.bind((self._interface, ETH_P_ALL))
        return sock

    def __enter__(self) -> Capture:
        self._socket = netns.run_inside(self._path, self._open)
        self._thread = threading.Thread(target=self._read, name="capture", daemon=True)
        self._thread.start()
        return self

    def _read(self) -> None:
        total = 0
        while True:
            ready, _, _ = select.select([self._socket], [], [], 0.05)
            if not ready:
                if self._stop.is_set():
                    return
                continue
            frame = self._socket.recv(1 << 17)
            total += len(frame)
            if total > FRAMES_BYTES_MAX:
                self.full = True
                return
            self.frames.append(frame)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(10.0)
        self._socket.close()

    def contains(self, marker: bytes) -> int:
        """In how many frames the bytes appear."""
        return sum(marker in frame for frame in self.frames)

    def packets(self) -> list[Any]:
        """The frames as scapy packets."""
        from scapy.layers.l2 import Ether  # scapy takes a second to import

        return [Ether(frame) for frame in self.frames]
