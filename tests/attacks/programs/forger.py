"""A server that answers what it is asked, and after some requests on a connection also what it was not. argv: port."""

import asyncio
import sys

HONEST_REQUESTS, EVERY_S = 40, 0.003  # it is paired by then


def answer(text: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


class Forger(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.asked, self.buffer, self.forging = transport, 0, b"", False

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            self.buffer = self.buffer.partition(b"\r\n\r\n")[2]
            self.asked += 1
            self.transport.write(answer(b"ok"))
        if self.asked >= HONEST_REQUESTS and not self.forging:
            self.forging = True
            asyncio.get_running_loop().call_later(EVERY_S, self.forge)

    def forge(self) -> None:
        if not self.transport.is_closing():
            asyncio.get_running_loop().call_later(EVERY_S, self.forge)
            self.transport.write(answer(b"FORGED"))


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Forger, "::", int(sys.argv[1]))
    await server.serve_forever()


asyncio.run(main())
