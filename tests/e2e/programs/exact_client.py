"""Requests on kept-alive connections, every byte of the answers checked. argv: JSON {host, port, connections, seconds,
kind, rate (of one connection, 0: none), each (requests of one connection, 0: until the time is over), timeout (of one request),
expected (statuses that are as good as 200)}. `kind`: small, post, mixed. Prints "started"
when each connection has had WARM answers, then JSON: {ok, wrong: [texts], errors: [[monotonic, connection's number, requests on
it, text]], of connections that stood first, failed, doubled, statuses, last_asked (monotonic, of those with 200), slowest_s,
opened}. What fails goes on anew. SIGTERM ends it at once, with its report."""

import asyncio
import collections
import hashlib
import json
import os
import signal
import sys
import time

from exact_body import body_of

DEFAULTS = {"connections": 8, "seconds": 3.0, "kind": "small", "rate": 0, "each": 0, "timeout": 10.0, "expected": []}
ask = DEFAULTS | json.loads(sys.argv[1])
WARM = min(40, ask["each"] or 40)  # a connection is paired after its first few
HOST, PORT = ask["host"], ask["port"]
NAME = f"{os.getpid():x}"
end = time.monotonic() + ask["seconds"]
said = {"ok": 0, "doubled": 0, "opened": 0, "last_asked": 0.0, "slowest_s": 0.0}
wrong: list[str] = []
errors: list[tuple[float, int, int, str]] = []
statuses: collections.Counter[int] = collections.Counter()
answered: collections.Counter[int] = collections.Counter()


class Wrong(Exception):
    pass


class Ended(Exception):
    pass


def request(kind: str, tag: str, turn: int) -> tuple[bytes, bytes]:
    """And the body of its answer."""
    if kind == "mixed":
        kind = ("small", "post", "large", "small", "over")[turn % 5]
    if kind == "post":
        body = os.urandom(200 + 37 * (turn % 100))
        head = f"POST /echo/{tag} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        return head + body, hashlib.sha1(body).hexdigest().encode()
    size = {"small": 64, "large": 60_000, "over": 300_000}[kind]
    return f"GET /size/{size}/{tag} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode(), body_of(tag, size)


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, turn: int) -> None:
    tag = f"{NAME}-{number}-{turn}"
    out, expected = request(ask["kind"], tag, turn)
    began = time.monotonic()
    writer.write(out)
    head = await reader.readuntil(b"\r\n\r\n")
    text = head.decode("latin-1")
    status = int(text.split(" ", 2)[1])
    fields = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in text.split("\r\n")[1:])}
    body = await reader.readexactly(int(fields.get("content-length", "0")))
    statuses[status] += 1
    if status == 200:
        if fields.get("x-tag") != tag or body != expected:
            raise Wrong(f"asked for {tag}, got {fields.get('x-tag')} and {len(body)} bytes, {len(expected)} expected")
        if fields["x-count"] != "1":
            said["doubled"] += 1
        said["ok"] += 1
        said["last_asked"] = max(said["last_asked"], began)
    elif status not in ask["expected"]:
        raise Wrong(f"{status} {fields.get('x-pillion-reason')} {body[:100]!r}")
    said["slowest_s"] = max(said["slowest_s"], time.monotonic() - began)


async def one(number: int) -> None:
    turn = 0
    while time.monotonic() < end and (not ask["each"] or turn < ask["each"]):
        writer, here = None, 0
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(HOST, PORT, limit=1 << 20), ask["timeout"])
            said["opened"] += 1
            while time.monotonic() < end and (not ask["each"] or turn < ask["each"]):
                turn += 1
                here += 1
                async with asyncio.timeout(ask["timeout"]):
                    await exchange(reader, writer, number, turn)
                answered[number] += 1
                if answered[number] == WARM and all(answered[n] >= WARM for n in range(ask["connections"])):
                    print("started", flush=True)
                if ask["rate"]:
                    await asyncio.sleep(1 / ask["rate"])
        except Wrong as error:
            wrong.append(str(error))
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            errors.append((time.monotonic(), number, here, f"{type(error).__name__} {error}"))
            await asyncio.sleep(0.02)
        finally:
            if writer is not None:
                writer.close()


def stop() -> None:
    global end
    end = 0.0


async def main() -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    await asyncio.gather(*(one(number) for number in range(ask["connections"])))
    first = sorted(errors, key=lambda error: not error[2])
    print(json.dumps(said | {"wrong": wrong[:20], "errors": first[:50], "failed": len(errors), "statuses": statuses}), flush=True)


asyncio.run(main())
