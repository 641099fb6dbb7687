from __future__ import annotations

import socket
from pathlib import Path

from l7proxy.stock import SHELF_MAX, SHELF_MIN, Stock
from l7proxy.transport import RECEIVED_BYTES_MAX


def fds(count: int) -> list[int]:
    return [socket.socket().detach() for _ in range(count)]


def test_low_water_asks_once() -> None:
    asked: list[tuple[int, int, int]] = []
    stock = Stock(lambda *what: asked.append(what))
    assert stock.take(7, socket.AF_INET) is None
    assert asked == [(7, socket.AF_INET, SHELF_MIN)]
    stock.add(7, socket.AF_INET, fds(SHELF_MIN))
    for _ in range(SHELF_MIN // 4):
        found = stock.take(7, socket.AF_INET)
        assert found is not None
        found.close()
    assert len(asked) == 1
    found = stock.take(7, socket.AF_INET)
    assert found is not None
    found.close()
    assert asked[1:] == [(7, socket.AF_INET, SHELF_MIN // 4 + 1)]
    stock.sweep(frozenset())


def test_waiters_come_first_and_time_out() -> None:
    stock = Stock(lambda *_: None)
    got: list[socket.socket | None] = []
    stock.wait(7, socket.AF_INET, got.append)
    stock.wait(7, socket.AF_INET, got.append, timeout_s=-1)
    stock.add(7, socket.AF_INET, fds(1))
    assert got[0] is not None
    stock.sweep(frozenset((7,)))
    assert got[1:] == [None]
    got[0].close()


def test_shelves_are_bounded_and_go_with_their_netns() -> None:
    stock = Stock(lambda *_: None)
    shelf = stock.shelf(7, socket.AF_INET)
    shelf.want = SHELF_MAX
    stock.add(7, socket.AF_INET, fds(300))
    assert stock.counts() == {(7, socket.AF_INET): 300}
    held = list(shelf.sockets)
    stock.sweep(frozenset())
    assert stock.counts() == {}
    assert all(sock.fileno() == -1 for sock in held)


def test_the_stock_follows_the_rate() -> None:
    stock = Stock(lambda *_: None)
    shelf = stock.shelf(7, socket.AF_INET)
    shelf.taken, shelf.since = 50, shelf.since - 1.0
    stock.sweep(frozenset((7,)))
    assert shelf.want > 2500  # 50 a second for a minute without an agent


def test_what_waits_in_the_kernel_for_them_is_bounded() -> None:
    stock = Stock(lambda *_: None)
    stock.add(7, socket.AF_INET, fds(1))
    sock = stock.take(7, socket.AF_INET)
    assert sock is not None
    rmem_max = int(Path("/proc/sys/net/core/rmem_max").read_text())
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == min(RECEIVED_BYTES_MAX, 2 * rmem_max)
    sock.close()
    stock.sweep(frozenset())
