"""What lasts longer than a proxy, checked byte by byte.

    lasting.py serve PORT          answers "GET /" with chunks until somebody asks "GET /enough"; bytes by their place
    lasting.py http HOST PORT      asks for that, and reads it to its end
    lasting.py tcp HOST PORT       a stream to an echo server, both ways at once, until SIGTERM; then to its end

Clients say "begun", at the end JSON: {"bytes", "error"}."""

import asyncio
import contextlib
import json
import signal
import sys

_BLOCK = b"".join(b"%07d\n" % number for number in range(12_500))
PIECE, PAUSE_S = 1500, 0.005


def piece(at: int, size: int) -> bytes:
    start = at % len(_BLOCK)
    return (_BLOCK * (size // len(_BLOCK) + 2))[start : start + size]


class Server:
    def __init__(self) -> None:
        self.enough = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /enough "):
                    self.enough.set()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    continue
                self.enough.clear()
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                at = 0
                while not self.enough.is_set():
                    writer.write(b"%x\r\n%b\r\n" % (PIECE, piece(at, PIECE)))
                    at += PIECE
                    await writer.drain()
                    await asyncio.sleep(PAUSE_S)
                writer.write(b"0\r\n\r\n")
        writer.close()


class Wrong(Exception):
    """Other bytes than were sent."""


async def http(host: str, port: int) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise Wrong(repr(head))
    at = 0
    while size := int(await reader.readline(), 16):
        check(at, await reader.readexactly(size))
        await reader.readexactly(2)
        begun(at)
        at += size
    await reader.readexactly(2)
    return at


async def tcp(host: str, port: int) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    await reader.readline()  # whom it saw
    enough, sent = asyncio.Event(), 0
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, enough.set)

    async def send() -> None:
        nonlocal sent
        while not enough.is_set():
            writer.write(piece(sent, PIECE))
            sent += PIECE
            await writer.drain()
            await asyncio.sleep(PAUSE_S)
        writer.write_eof()

    sending, at = asyncio.create_task(send()), 0
    while data := await reader.read(65536):
        check(at, data)
        begun(at)
        at += len(data)
    await sending
    if at != sent:
        raise Wrong(f"{at} of {sent} bytes came back")
    return at


def check(at: int, data: bytes) -> None:
    if data != piece(at, len(data)):
        raise Wrong(f"after {at} bytes")


def begun(at: int) -> None:
    if not at:
        print("begun", flush=True)


async def main() -> None:
    if sys.argv[1] == "serve":
        server = await asyncio.start_server(Server().serve, None, int(sys.argv[2]))
        await server.serve_forever()
    count, error = 0, ""
    try:
        count = await {"http": http, "tcp": tcp}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    except (OSError, EOFError, Wrong, ValueError) as failure:
        error = repr(failure)
    print(json.dumps({"bytes": count, "error": error}), flush=True)


asyncio.run(main())
