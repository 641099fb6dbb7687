"""A node port: what comes to PORT on every address of this node goes on to TO TO_PORT, from the node's own address."""

import asyncio
import sys

port, to, to_port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])


async def move(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(1):
            far_reader, far_writer = await asyncio.open_connection(to, to_port)
            ways = [asyncio.create_task(move(reader, far_writer)), asyncio.create_task(move(far_reader, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    except (OSError, TimeoutError):
        pass
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, None, port)
    print("ready", flush=True)
    await server.serve_forever()


asyncio.run(main())
