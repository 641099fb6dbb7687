"""The worker's end of the link: accepts the agent, reads and writes frames with their descriptors."""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from l7proxy.accept import Acceptor
from mesh import link

if TYPE_CHECKING:
    from l7proxy.worker import Worker

READ_BYTES = 1 << 18
FDS_PER_READ = 253  # what the kernel puts into one message
UNSENT_BYTES_MAX = 8 << 20  # an agent that does not read is dropped; it dials again


class LinkServer:
    """One agent at a time: a new one replaces the old, whose end may not have been noticed."""

    def __init__(self, worker: Worker, listen: socket.socket) -> None:
        self.worker, self.listen = worker, listen
        self._acceptor: Acceptor | None = None
        self.connection: socket.socket | None = None
        self.decoder = link.Decoder()
        self.unsent: deque[tuple[bytearray, list[int]]] = deque()  # descriptors ride with the first byte of theirs
        self.unsent_bytes = 0
        self.writing = False

    def start(self) -> None:
        self._acceptor = Acceptor(self.worker, self.listen, "link", self._begin)

    def close(self) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
        self._drop()

    def send(self, message: link.Message, fds: Sequence[int] = ()) -> bool:
        """False: dropped, there is no agent. Of ``fds`` duplicates are sent. Raises OSError when there can be none."""
        if self.connection is None:
            return False
        data, own = link.encode(message, len(fds)), _duplicates(fds)
        if own or not self.unsent:
            self.unsent.append((bytearray(data), own))
        else:
            self.unsent[-1][0].extend(data)
        self.unsent_bytes += len(data)
        if self.unsent_bytes > UNSENT_BYTES_MAX:
            self.worker.log.warning("the agent does not read; dropped")
            self._drop()
        elif not self.writing:
            self.writing = True
            self.worker.loop.call_soon(self._flush)
        return self.connection is not None

    def _begin(self, connection: socket.socket, _address: str) -> None:
        if not self.worker.kernel.check_agent(connection):
            self.worker.log.warning("the link was dialled by another user than root; refused")
            connection.close()
            return
        self._drop()
        self.connection, self.decoder = connection, link.Decoder()
        self.worker.loop.add_reader(connection.fileno(), self._read)
        self.worker.linked()

    def _read(self) -> None:
        connection = self.connection
        if connection is None:
            return
        try:
            data, fds, flags, _ = socket.recv_fds(connection, READ_BYTES, FDS_PER_READ, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop()
            return
        if not data or flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            self._drop()
            return
        try:
            messages = self.decoder.feed(data, fds)
        except link.LinkError as error:
            self.worker.log.error("the agent broke the link's framing; dropped", error=str(error))
            self._drop()
            return
        for message, its_fds in messages:
            try:
                self.worker.handle(message, its_fds)
            except Exception:  # one message must not end the link, and with it every later one
                self.worker.log.exception("a message of the agent failed", message=type(message).__name__)
                self.worker.metrics.count("link_message_failed")

    def _flush(self) -> None:
        connection = self.connection
        if connection is None:
            self.writing = False
            return
        while self.unsent:
            data, fds = self.unsent[0]
            try:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = connection.sendmsg([data], rights)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self._drop()
                return
            while fds:
                os.close(fds.pop())
            self.unsent_bytes -= sent
            if sent < len(data):
                del data[:sent]
            else:
                self.unsent.popleft()
        if self.unsent:
            self.worker.loop.add_writer(connection.fileno(), self._flush)
        else:
            self.writing = False
            self.worker.loop.remove_writer(connection.fileno())

    def _drop(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            self.worker.loop.remove_reader(connection.fileno())
            self.worker.loop.remove_writer(connection.fileno())
            connection.close()
        for fd in self.decoder.take_fds():
            os.close(fd)
        for _, fds in self.unsent:
            for fd in fds:
                os.close(fd)
        self.unsent.clear()
        self.unsent_bytes = 0
        self.writing = False


def _duplicates(fds: Sequence[int]) -> list[int]:
    """They may be closed before their frame leaves."""
    own: list[int] = []
    try:
        own += (os.dup(fd) for fd in fds)
    except OSError:
        for fd in own:
            os.close(fd)
        raise
    return own
