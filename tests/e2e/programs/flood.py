"""Clients that behave badly at once: argv: host port slow oversized truncated.
`slow` connections send a head of a byte each 0.5 s until they are answered, `oversized` send a head of 64 KiB, `truncated`
stop in the middle of a head or a body and leave. Prints "started", then JSON:
{"slow": {status: n}, "oversized": {status: n}, "left": n, "failed": [errors]}."""

import asyncio
import collections
import json
import sys

HEAD = b"GET / HTTP/1.1\r\nHost: flood\r\n"
host, port = sys.argv[1], int(sys.argv[2])
statuses: dict[str, collections.Counter[str]] = {"slow": collections.Counter(), "oversized": collections.Counter()}
left = 0


async def answer(kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        line = await asyncio.wait_for(reader.readline(), 30)
        status = line.split()[1].decode() if line else "closed"
    except (OSError, TimeoutError) as error:
        status = type(error).__name__
    statuses[kind][status] += 1
    writer.close()


async def slow() -> None:
    reader, writer = await asyncio.open_connection(host, port)
    answered = asyncio.create_task(answer("slow", reader, writer))
    writer.write(HEAD + b"X: ")
    while not answered.done():
        writer.write(b"a")
        await asyncio.sleep(0.5)


async def oversized() -> None:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(HEAD + b"X: " + b"a" * 65536 + b"\r\n\r\n")
    await answer("oversized", reader, writer)


async def truncated(number: int) -> None:
    global left
    _, writer = await asyncio.open_connection(host, port)
    body = b"POST / HTTP/1.1\r\nHost: flood\r\nContent-Length: 1000000\r\n\r\n" + b"a" * 50_000
    writer.write(HEAD[: 5 + number % 20] if number % 2 else body)
    await asyncio.sleep(0.05 * (number % 20))
    if number % 4 < 2:
        writer.transport.abort()
    writer.close()
    left += 1


async def main() -> None:
    counts = [int(text) for text in sys.argv[3:6]]
    tasks = [asyncio.create_task(slow()) for _ in range(counts[0])]
    await asyncio.sleep(0.5)
    print("started", flush=True)
    for number in range(max(counts[1:])):
        if number < counts[1]:
            tasks.append(asyncio.create_task(oversized()))
        if number < counts[2]:
            tasks.append(asyncio.create_task(truncated(number)))
        await asyncio.sleep(0.04)
    failed = [repr(each) for each in await asyncio.gather(*tasks, return_exceptions=True) if each is not None]
    print(json.dumps({**statuses, "left": left, "failed": failed[:5]}), flush=True)


asyncio.run(main())
