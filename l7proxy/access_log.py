"""One JSON line for each exchange, off by default. Lines wait in a bounded buffer and are written once a second;
what a slow reader has no room for is dropped and counted, never waited for."""

from __future__ import annotations

import os
import select
from collections import deque

import msgspec

LINES_MAX = 16384
WRITE_BYTES_MAX = 4096  # PIPE_BUF: such a write is whole or not at all, and does not block once poll says so
WRITES_MAX = 64  # for each flush

_encode = msgspec.json.Encoder().encode  # escapes control bytes


class AccessLog:
    def __init__(self, fd: int = 1) -> None:
        self.fd = fd
        self.dropped = 0
        self._lines: deque[bytes] = deque()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, record: dict[str, str | int | float]) -> None:
        """Text from requests is cut at 1,024 characters."""
        if len(self._lines) >= LINES_MAX:
            self.dropped += 1
            return
        self._lines.append(_encode({k: v[:1024] if isinstance(v, str) else v for k, v in record.items()}) + b"\n")

    def flush(self) -> None:
        """Once a second."""
        for _ in range(WRITES_MAX):
            if not self._lines or not self._poll.poll(0):
                return
            chunk = self._lines.popleft()
            while self._lines and len(chunk) + len(self._lines[0]) <= WRITE_BYTES_MAX:
                chunk += self._lines.popleft()
            try:
                os.write(self.fd, chunk)
            except OSError:
                self.dropped += 1
                return
