"""A TCP echo server: says who it saw first ("<ip> <port>\\n"), unless `quiet`; gives every byte back. argv: port [quiet]."""

import asyncio
import sys


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if sys.argv[2:] != ["quiet"]:
        host, port = writer.get_extra_info("peername")[:2]
        writer.write(f"{host.removeprefix('::ffff:')} {port}\n".encode())
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, None, int(sys.argv[1]), backlog=1024)
    await server.serve_forever()


asyncio.run(main())
