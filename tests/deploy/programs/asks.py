"""Load of several kinds until it is killed, its counts in a file that is always whole. Standard library only.

    asks.py COUNTS '{"kind": {"url": "http://web.shop.mesh/", "keep": true, "connections": 4, "pause_s": 0.01}, …}'

`keep`: again and again on one connection; else each request has its own. Counts: asked, failed (no whole answer, or a wrong one),
lost (of these, because the connection ended), opened, and the last few reasons. An HTTP connection the other end closes at rest
is opened again, which is no failure. `patience_s`, 30 if not given: what takes longer has failed."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import sys
import time
from urllib.parse import urlsplit

WRITE_S = 0.1
AFTER_FAILURE_S = 0.02


class Wrong(Exception):
    """Not the answer."""


class Kind:
    def __init__(self, url: str, keep: bool, connections: int, pause_s: float, patience_s: float = 30.0) -> None:
        parts = urlsplit(url)
        self.http, self.host, self.port = parts.scheme == "http", str(parts.hostname), parts.port or 80
        self.keep, self.connections, self.pause_s, self.patience_s = keep, connections, pause_s, patience_s
        self.counts = {"asked": 0, "failed": 0, "lost": 0, "opened": 0}
        self.why: collections.deque[str] = collections.deque(maxlen=8)

    async def run(self) -> None:
        await asyncio.gather(*(self.one(number) for number in range(self.connections)))

    async def one(self, number: int) -> None:
        reader, writer, seen = None, None, 0
        while True:
            ended = writer is not None and reader.at_eof()
            if ended and self.http:
                writer.transport.abort()
                writer, ended = None, False
            self.counts["asked"] += 1
            seen += 1
            try:
                async with asyncio.timeout(self.patience_s):
                    if ended:
                        raise EOFError("ended at rest")
                    if writer is None:
                        reader, writer = await asyncio.open_connection(self.host, self.port)
                        self.counts["opened"] += 1
                    last = await (self.request(reader, writer) if self.http else self.echo(reader, writer, f"{number} {seen}\n"))
            except (OSError, EOFError, TimeoutError, Wrong) as error:
                self.counts["failed"] += 1
                self.counts["lost"] += writer is not None and isinstance(error, EOFError | ConnectionError)
                self.why.append(f"{time.strftime('%H:%M:%S')} {type(error).__name__} {error}"[:200])
                last = True
                await asyncio.sleep(AFTER_FAILURE_S)
            if writer is not None and (last or not self.keep):
                writer.transport.abort()
                writer = None
            await asyncio.sleep(self.pause_s)

    async def request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the server said that it was the last on this connection."""
        more = "" if self.keep else "Connection: close\r\n"
        writer.write(f"GET / HTTP/1.1\r\nHost: {self.host}\r\n{more}\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise Wrong(repr(head[:40] + body[:100]))
        return fields.get(b"connection") == b"close"

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: str) -> bool:
        writer.write(said.encode())
        got = await reader.readexactly(len(said))
        if got != said.encode():
            raise Wrong(repr(got))
        return False


def tell(place: str, kinds: dict[str, Kind]) -> None:
    with open(f"{place}.new", "w") as file:
        json.dump({name: {**kind.counts, "why": list(kind.why)} for name, kind in kinds.items()}, file)
    os.rename(f"{place}.new", place)


async def main() -> None:
    place, kinds = sys.argv[1], {name: Kind(**given) for name, given in json.loads(sys.argv[2]).items()}
    running = [asyncio.create_task(kind.run()) for kind in kinds.values()]
    while not any(task.done() for task in running):
        tell(place, kinds)
        await asyncio.sleep(WRITE_S)
    await asyncio.gather(*running)


asyncio.run(main())
