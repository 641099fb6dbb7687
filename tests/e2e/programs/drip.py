"""An HTTP server whose response never ends: a chunk every 10 ms. argv: port."""

import asyncio
import sys


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10\r\n0123456789abcdef\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)
    except (OSError, EOFError):
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, None, int(sys.argv[1]), backlog=1024)
    await server.serve_forever()


asyncio.run(main())
