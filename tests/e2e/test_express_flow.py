"""Express with clients and servers that sleep, hurry, vanish and reset, and with answers beyond every budget: no hang, no byte
lost, doubled or out of its place, and memory bounded."""

from __future__ import annotations

import json
import os
import re
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from l7proxy.transport import RECEIVED_BYTES_MAX
from lab.pace import SLOW
from mesh.ports import OUTBOUND_PORT
from tests.e2e import express
from tests.e2e.express import NAME, PORT, clean, event, load, stopped
from tests.e2e.mesh import Background, Mesh, until

pytestmark = pytest.mark.timeout(400)
TRIES = 3
WARM = 80  # exchanges of a client before it is odd: up to 48 until it is paired, up to 16 samples in a row
KB, MB, GB = 1000, 1_000_000, 1 << 30
# A client that closes with bytes unread says FIN, not RST, when they wait where redirected ones do: what is to be written to
# it ends when the kernel forgets it (60 s) and asks again (51 s at most), longer than a test may take
GREW_MB_MAX = 64  # the worker's memory, whatever its clients do
# Linux lets in a whole buffer while a queue is below its limit, which is `tcp_wmem` where one sends, transport.RECEIVED_BYTES_MAX
# where the proxy receives: 64 KiB, or what came while the socket was in use, put together to 17 (MAX_SKB_FRAGS) pieces of 32 KiB
QUEUE_MB_MAX = 4.195 + 0.57
RECEIVED_LIMIT = min(RECEIVED_BYTES_MAX, 2 * int(Path("/proc/sys/net/core/rmem_max").read_text()))  # as the kernel counts it
RESTS = 4  # of one that reads, for each queue on the way to it to be full


@pytest.fixture(scope="module", autouse=True)
def serving(mesh: Mesh) -> Iterator[None]:
    with express.exact(mesh):
        express.warm(mesh)
        yield


def odd(mesh: Mesh, mode: str, **options: Any) -> Background:
    """`programs/odd_client.py` on a connection that the kernel carries by now."""
    question = {"host": f"{NAME}.shop.mesh", "port": PORT, "mode": mode, "warm": WARM, **options}
    made = mesh.program("client", "odd_client.py", json.dumps(question))
    line = made.first_line()
    assert line == "ready\n", line or made.popen.communicate()
    return made


def right(report: dict[str, Any]) -> None:
    assert not report["wrong"] and not report["errors"], report


def resident_mb(mesh: Mesh) -> float:
    """Of the proxy's workers."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in mesh.lab.pids("n1", "proxy-worker")]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / MB


def queued_mb(mesh: Mesh) -> tuple[float, float, float]:
    """What TCP holds: the most that one socket of the proxy's has received and sent, and all beside the client and the server
    but what waits for the client to read it, which is as much with a mesh as without: up to `tcp_rmem`, 32 MiB on new kernels."""
    received_max = sent_max = total = 0
    for name in ("client", NAME):
        argv = ["ip", "netns", "exec", mesh.w[name].pod.netns, "ss", "-tmnHO"]
        for line in mesh.lab.nodes["n1"].run(argv).stdout.splitlines():
            here, there = line.split()[3:5]
            found = re.search(r"skmem:\(r(\d+),rb(\d+),t\d+,tb\d+,f\d+,w(\d+)", line)
            if found is None:  # it ends, and holds nothing
                continue
            received, limit, sent = map(int, found.groups())
            if here.endswith(f":{OUTBOUND_PORT}") or there.endswith(f":{PORT}"):
                assert limit == RECEIVED_LIMIT, line
                received_max, sent_max = max(received_max, received), max(sent_max, sent)
            total += sent + (0 if there.endswith(f":{OUTBOUND_PORT}") else received)
    return received_max / MB, sent_max / MB, total / MB


def filled_mb(mesh: Mesh, reader: Background) -> tuple[float, float, float]:
    """The same while ``reader`` rests, once nothing moves any more."""
    os.kill(reader.popen.pid, signal.SIGSTOP)
    try:
        seen = [queued_mb(mesh)]

        def still() -> bool:
            seen.append(queued_mb(mesh))
            return seen[-1] == seen[-2]

        until(still, "it moves on")
    finally:
        os.kill(reader.popen.pid, signal.SIGCONT)
    return seen[-1]


@contextmanager
def bounded(mesh: Mesh) -> Iterator[None]:
    before = resident_mb(mesh)
    yield
    assert resident_mb(mesh) - before < GREW_MB_MAX, f"the worker grew from {before:.0f} to {resident_mb(mesh):.0f} MB"


@pytest.mark.parametrize("size", [100 * KB, 300 * KB, 5 * MB])
def test_a_client_that_asks_again_before_it_has_read(mesh: Mesh, size: int) -> None:
    """The kernel carries one answer at most that is not read: what is asked on top of it goes by user space, in its order."""
    before = event(mesh, "carried")
    with bounded(mesh):
        report = odd(mesh, "eager", size=size, times=6).report(60 * SLOW)
    right(report)
    assert report["ok"] == WARM + 5 * 7
    assert event(mesh, "carried") > before
    assert event(mesh, "pipelined") + event(mesh, "unread") + event(mesh, "behind") > 0


@pytest.mark.parametrize("size", [100 * KB, 250 * KB, 300 * KB, 5 * MB])
def test_a_reader_that_sleeps(mesh: Mesh, size: int) -> None:
    """Others notice nothing."""
    slowest = [beside_sleepers(mesh, size)]
    while slowest[-1] >= 1 * SLOW:  # other work makes it longer, and nothing shorter
        assert len(slowest) < TRIES, slowest
        slowest.append(beside_sleepers(mesh, size))


def beside_sleepers(mesh: Mesh, size: int) -> float:
    """Seconds of the others' slowest exchange."""
    with bounded(mesh):
        others = load(mesh, connections=2, seconds=60, rate=100)
        express.started(others)
        sleepers = [odd(mesh, "sleepy", size=size, times=2) for _ in range(3)]
        reports = [sleeper.report(30 * SLOW) for sleeper in sleepers]
        beside = stopped(others)
    for report in reports:
        right(report)
        assert report["ok"] == WARM + 2 * 2
    clean(beside)
    return float(beside["slowest_s"])


@pytest.mark.parametrize("size", [100 * KB, 250 * KB, 5 * MB])
def test_clients_that_vanish_while_they_are_answered(mesh: Mesh, size: int) -> None:
    records = mesh.metric("n1", "pillion_express_records")
    with bounded(mesh):
        others = load(mesh, connections=2, seconds=60, rate=100)
        express.started(others)
        right(odd(mesh, "vanish", size=size, times=12).report(60 * SLOW))
        clean(stopped(others))
    express.warm(mesh)
    if size < 1 * MB:  # else a minute and more: see above
        until(lambda: mesh.metric("n1", "pillion_express_records") <= records, "their records stay")


def test_servers_that_reset(mesh: Mesh) -> None:
    """Before the answer: user space tries again, as it always does, and says 502; half an answer: the client learns that it
    is half of one by the end of its connection."""
    others = load(mesh, connections=2, seconds=60, rate=100)
    express.started(others)
    report = odd(mesh, "broken", size=100 * KB, times=12).report(60 * SLOW)
    clean(stopped(others))
    assert not report["wrong"], report
    assert report["statuses"].get("502", 0) + report["statuses"].get("503", 0) == 6, report
    assert len(report["errors"]) == 6 and all(text.startswith("half: ") for text in report["errors"]), report


def test_an_answer_of_a_gigabyte(mesh: Mesh) -> None:
    size = GB if SLOW == 1 else GB // 8
    held: list[tuple[float, float, float]] = []
    with bounded(mesh):
        others = queued_mb(mesh)[2]  # for those that vanished in tests before; that only gets less
        running = odd(mesh, "huge", size=size)
        while not select.select([running.popen.stdout], [], [], 0.05)[0]:
            held.append(filled_mb(mesh, running) if len(held) < RESTS else queued_mb(mesh))
        report = running.report(180 * SLOW)
    right(report)
    assert report["ok"] == WARM + 2
    received, sent, total = (max(column) for column in zip(*held, strict=True))
    assert 0 < received < QUEUE_MB_MAX, f"{received:.2f} MB received for the proxy"
    assert 0 < sent < QUEUE_MB_MAX, f"{sent:.2f} MB sent by the proxy"
    assert total < others + 3 * QUEUE_MB_MAX, f"{total:.2f} MB in TCP's queues (the server's, the proxy's two)"


def test_ten_thousand_short_connections(mesh: Mesh) -> None:
    """Of one to three requests, beside some that last: each served, and nothing of them stays."""
    records = mesh.metric("n1", "pillion_express_records")
    with bounded(mesh):
        others = load(mesh, connections=2, seconds=300, rate=50)
        express.started(others)
        many = [odd(mesh, "short", times=2500) for _ in range(4)]
        reports = [each.report(150 * SLOW) for each in many]
        clean(stopped(others))
    for report in reports:
        right(report)
    assert sum(report["statuses"]["200"] for report in reports) > 2 * 4 * 2500
    until(lambda: mesh.metric("n1", "pillion_express_records") <= records, "their records stay")


def test_many_short_lives_that_were_paired(mesh: Mesh) -> None:
    """Each connection lasts long enough to be paired, and no longer."""
    records = mesh.metric("n1", "pillion_express_records")
    with bounded(mesh):
        for _ in range(4):
            clean(load(mesh, connections=50, seconds=60, each=30, kind="mixed").report(60 * SLOW))
    until(lambda: mesh.metric("n1", "pillion_express_records") <= records, "their records stay")
