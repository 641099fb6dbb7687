"""An HTTP/1.1 server that answers with the request head it got, as JSON {"start", "headers", "peer"}; on Upgrade: websocket it
switches (101) and gives every byte back. argv: port."""

import asyncio
import json
import sys


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = [line.split(": ", 1) for line in head[1:] if line]
            lower = {name.lower(): value for name, value in headers}
            await reader.readexactly(int(lower.get("content-length", 0)))
            if lower.get("upgrade", "").lower() == "websocket":
                writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
                break
            peer = writer.get_extra_info("peername")[0]
            body = json.dumps({"start": head[0], "headers": headers, "peer": peer}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, None, int(sys.argv[1]))
    await server.serve_forever()


asyncio.run(main())
