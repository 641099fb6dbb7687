"""echo.py PORT: gives back what it gets, on each connection, forever."""

import asyncio
import sys


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


async def main() -> None:
    async with await asyncio.start_server(serve, "::", int(sys.argv[1])) as server:
        await server.serve_forever()


asyncio.run(main())
