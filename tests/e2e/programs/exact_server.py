"""An HTTP/1.1 server whose every answer can be checked: argv: port. By path: /size/<bytes>/<tag>, /chunks/<bytes>/<tag>,
/reset/<tag> (no answer, RST), /half/<bytes>/<tag> (half of the answer, then RST), /slow/<ms>/<tag>, /close/<tag>, /saw/<tag> (how
often it was asked for); POST to any: the digest of its body. Each answer says how often its tag was asked for."""

import asyncio
import hashlib
import json
import socket
import struct
import sys

from exact_body import PERIOD, body_of

LONG_BYTES = 1 << 20  # longer ones are written as fast as they are read
seen: dict[str, int] = {}
open_now: set["Server"] = set()


class Server(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer, self.room = transport, b"", asyncio.Event()
        self.room.set()
        self.busy = False
        open_now.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        open_now.discard(self)
        self.room.set()

    def pause_writing(self) -> None:
        self.room.clear()

    def resume_writing(self) -> None:
        self.room.set()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.busy:
            self.next()

    def next(self) -> None:
        while not self.busy and (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].decode("latin-1")
            lines = head.split("\r\n")
            fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            length = int(fields.get("content-length", "0"))
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            method, path, _ = lines[0].split(" ")
            self.answer(method, path, body)

    def answer(self, method: str, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        tag = parts[-1]
        if parts[0] == "saw":
            text = str(seen.get(tag, 0)).encode()
            self.transport.write(self.head(len(text), tag, 1) + text)
            return
        seen[tag] = count = seen.get(tag, 0) + 1
        if len(seen) > 2_000_000:
            seen.clear()
        kind = parts[0]
        if kind == "reset":
            self.reset()
        elif kind == "half":
            size = int(parts[1])
            self.transport.write(self.head(size, tag, count) + body_of(tag, size // 2))
            self.reset()
        elif kind in ("slow", "chunks") or (kind == "size" and int(parts[1]) > LONG_BYTES):
            self.busy = True
            task = asyncio.get_running_loop().create_task(self.long(kind, int(parts[1]), tag, count))
            task.add_done_callback(lambda _task: None)
        elif kind == "close":
            self.transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()
        elif method == "POST":
            text = hashlib.sha1(body).hexdigest().encode()
            self.transport.write(self.head(len(text), tag, count) + text)
        else:
            size = int(parts[1]) if kind == "size" else 2
            self.transport.write(self.head(size, tag, count) + body_of(tag, size))

    def head(self, size: int, tag: str, count: int) -> bytes:
        return f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nX-Tag: {tag}\r\nX-Count: {count}\r\n\r\n".encode()

    def reset(self) -> None:
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def long(self, kind: str, number: int, tag: str, count: int) -> None:
        if kind == "slow":
            await asyncio.sleep(number / 1000)
            self.transport.write(self.head(2, tag, count) + body_of(tag, 2))
        elif kind == "chunks":
            self.transport.write(
                f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Tag: {tag}\r\nX-Count: {count}\r\n\r\n".encode()
            )
            body = body_of(tag, number)
            for at in range(0, number, 50_000):
                piece = body[at : at + 50_000]
                self.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await self.room.wait()
            self.transport.write(b"0\r\n\r\n")
        else:
            self.transport.write(self.head(number, tag, count))
            whole = body_of(tag, PERIOD)
            for at in range(0, number, len(whole)):
                self.transport.write(whole[: number - at])
                await self.room.wait()
                if self.transport.is_closing():
                    return
        self.busy = False
        self.next()


async def main() -> None:
    port = int(sys.argv[1])
    loop = asyncio.get_running_loop()
    made = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    server = await loop.create_server(Server, sock=made)
    print(json.dumps({"ready": port}), flush=True)
    await server.serve_forever()


asyncio.run(main())
