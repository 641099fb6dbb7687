"""Load on connections that are kept: argv: kind host port connections seconds.
`stream`: round trips with an echo server; `idle`: an echo connection that only waits for its end; `http`: requests on a
kept-alive connection; `download`: one response that never ends. What fails is tried again, on a new connection.
Prints "started" when every connection has worked for a while, then, past the seconds or at SIGTERM, JSON: {"ok": rounds,
"last_ok": monotonic seconds, "failures": n, "first_failures": [texts]}."""

import asyncio
import collections
import json
import signal
import sys
import time

kind, host, port, connections, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
WARM_S, PAUSE_S, RETRY_S, TIMEOUT_S = 0.5, 0.004, 0.05, 3.0
BLOCK = b"x" * 512
REQUEST = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
end = time.monotonic() + seconds
ok, last_ok, failures, texts = 0, 0.0, 0, collections.Counter()
working: set[int] = set()
all_work = asyncio.Event()


class Failed(Exception):
    pass


def worked(number: int) -> None:
    global ok, last_ok
    ok, last_ok = ok + 1, time.monotonic()
    working.add(number)
    if len(working) == connections:
        all_work.set()


async def head(reader: asyncio.StreamReader) -> bytes:
    text = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in text.partition(b"\r\n")[0]:
        raise Failed(text.partition(b"\r\n")[0].decode())
    return text


async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if kind == "stream":
        writer.write(BLOCK)
        await reader.readexactly(len(BLOCK))
    elif kind == "http":
        writer.write(REQUEST)
        fields = (await head(reader)).lower()
        await reader.readexactly(int(fields.partition(b"content-length:")[2].split()[0]))
    elif not await reader.read(65536):
        raise Failed("closed")


async def rounds(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if kind in ("stream", "idle"):
        await reader.readuntil(b"\n")  # whom it saw
    while time.monotonic() < end:
        if kind != "idle":
            async with asyncio.timeout(TIMEOUT_S):  # a connection that is cut off without a word
                await step(reader, writer)
        else:
            worked(number)
            closed = asyncio.create_task(reader.read(1))
            await asyncio.wait((closed, over), timeout=max(0.0, end - time.monotonic()), return_when=asyncio.FIRST_COMPLETED)
            if not closed.done():
                closed.cancel()
                return
            closed.result()
            raise Failed("closed")
        worked(number)
        await asyncio.sleep(PAUSE_S)


async def one(number: int) -> None:
    global failures
    while time.monotonic() < end:
        writer = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, port)
                if kind == "download":
                    writer.write(REQUEST)
                    await head(reader)
            await rounds(number, reader, writer)
        except (OSError, EOFError, TimeoutError, Failed, asyncio.LimitOverrunError) as error:
            failures += 1
            texts[repr(error)] += 1
            await asyncio.sleep(RETRY_S)
        finally:
            if writer is not None:
                writer.transport.abort()


async def started() -> None:
    await all_work.wait()
    await asyncio.sleep(WARM_S)
    print("started", flush=True)


def stop() -> None:
    global end
    end = 0.0
    if not over.done():
        over.set_result(None)


async def main() -> None:
    global over
    over = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    tasks = [asyncio.create_task(one(number)) for number in range(connections)]
    first = asyncio.create_task(started())
    await asyncio.gather(*tasks)
    first.cancel()
    print(json.dumps({"ok": ok, "last_ok": last_ok, "failures": failures, "first_failures": texts.most_common(5)}), flush=True)


asyncio.run(main())
