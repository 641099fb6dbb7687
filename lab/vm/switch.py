"""The network between VMs: a learning switch on a unix socket, one connection for each network card.

`python -m lab.vm.switch SOCKET [PCAP]`: QEMU's `stream` netdev sends each frame with its length before it. With PCAP, all
frames are written there too. Ends when it is killed.
"""

from __future__ import annotations

import selectors
import socket
import struct
import sys
import time
from pathlib import Path
from typing import BinaryIO

LENGTH = struct.Struct(">I")
FRAME_BYTES_MAX = 1 << 17
PENDING_BYTES_MAX = 4 << 20  # a card that does not take its frames loses them, as in any switch
PCAP_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)


class Port:
    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.received, self.pending = sock, bytearray(), bytearray()

    def frames(self) -> list[bytes]:
        """Whole frames received so far. Raises ValueError on a length no frame has."""
        found, data = [], self.received
        while len(data) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(data)
            if length > FRAME_BYTES_MAX:
                raise ValueError(length)
            if len(data) < LENGTH.size + length:
                break
            found.append(bytes(data[LENGTH.size : LENGTH.size + length]))
            del data[: LENGTH.size + length]
        return found

    def queue(self, frame: bytes) -> None:
        if len(self.pending) < PENDING_BYTES_MAX:
            self.pending += LENGTH.pack(len(frame)) + frame


class Switch:
    def __init__(self, listener: socket.socket, pcap: BinaryIO | None) -> None:
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._listener, self._pcap = listener, pcap
        self._ports: dict[socket.socket, Port] = {}
        self._learned: dict[bytes, Port] = {}

    def turn(self, timeout_s: float | None = None) -> None:
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                self._ports[sock] = Port(sock)
                self._selector.register(sock, selectors.EVENT_READ)
                continue
            port = self._ports[key.fileobj]  # type: ignore[index]  # sockets are all that is registered
            try:
                if events & selectors.EVENT_WRITE:
                    del port.pending[: port.sock.send(port.pending[: 1 << 18])]
                if events & selectors.EVENT_READ:
                    data = port.sock.recv(1 << 18)
                    if not data:
                        raise ConnectionResetError
                    port.received += data
                    for frame in port.frames():
                        self._forward(port, frame)
            except BlockingIOError:
                pass
            except (OSError, ValueError):
                self._forget(port)
        for port in self._ports.values():
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if port.pending else 0)
            self._selector.modify(port.sock, wanted)

    def _forward(self, source: Port, frame: bytes) -> None:
        if self._pcap is not None:
            now = time.time()
            self._pcap.write(struct.pack("<IIII", int(now), int(now % 1 * 1e6), len(frame), len(frame)) + frame)
        destination, sender = frame[:6], frame[6:12]
        self._learned[sender] = source
        known = None if destination[:1] and destination[0] & 1 else self._learned.get(destination)
        for port in [known] if known is not None else list(self._ports.values()):
            if port is not source:
                port.queue(frame)

    def _forget(self, port: Port) -> None:
        self._selector.unregister(port.sock)
        port.sock.close()
        del self._ports[port.sock]
        self._learned = {address: other for address, other in self._learned.items() if other is not port}


def main(path: str, pcap: str | None = None) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    Path(path).unlink(missing_ok=True)
    listener.bind(path)
    listener.listen()
    file = None if pcap is None else open(pcap, "wb", buffering=0)  # noqa: SIM115  # for as long as we live
    if file is not None:
        file.write(PCAP_HEADER)
    switch = Switch(listener, file)
    while True:
        switch.turn()


if __name__ == "__main__":
    main(*sys.argv[1:3])
