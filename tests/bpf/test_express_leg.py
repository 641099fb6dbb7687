"""Legs on real sockets: what an application and the proxy say to each other comes once and in order, whichever way it goes."""

from __future__ import annotations

import array
import errno
import fcntl
import random
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest

from nodeagent.express_path import Enrolment
from tests.bpf.conftest import Pairs
from tests.bpf.express_pair import GET, OKAY, Pair, nothing, read
from tests.bpf.families import Family
from tests.bpf.test_express_pairing import SO_PEEK_OFF, SO_ZEROCOPY, Reader
from tests.bpf.world import CALLER, IDENTITY, LEVEL, World, wait_for

HANDED_MAX = 262144
MESSAGE_COSTS = 1024
REASONS = ("leg", "leg_unread", "leg_long", "off", "no_record", "target_gone")
Side = Literal["client", "server"]
SIDES: tuple[Side, ...] = ("client", "server")


class Leg:
    """The client's and the accepted socket of a pair that is none, or the server's and the upstream."""

    def __init__(self, pair: Pair, side: Side) -> None:
        self.pair, self.side, self.path = pair, side, pair.path
        self.app, self.proxy = (pair.client, pair.accepted) if side == "client" else (pair.server, pair.upstream)
        self.netns = pair.fds["a" if side == "client" else "b"]
        self.legs: list[int] = []

    def enrolment(self, **changes: Any) -> Enrolment:
        values = {"record": self.legs[-1], "identity": 0, "leg": True, "caller": ("0.0.0.0", 0), **changes}
        return self.pair.enrolment(None if self.side == "client" else 0, **values)

    def enter(self, netns: int = 0, **changes: Any) -> str:
        """The result."""
        self.legs.append(self.path.create_leg())
        return self.path.enrol(netns or self.netns, self.enrolment(**changes))[0]

    def settle(self) -> None:
        wait_for(lambda: self.pair.settled(self.app, self.proxy), "both ends are settled")

    def stays_apart(self, *socks: socket.socket) -> None:
        """None of these is settled, though looked at again and again: after 1 ms, then doubling."""
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            assert not any(self.pair.settled(sock) for sock in socks)
            time.sleep(0.005)

    def forget(self) -> None:
        self.path.forget_leg(self.legs[-1])

    def state(self, leg: int = -1) -> dict[str, Any]:
        """Fields of struct pl_xleg; ``ends``: of pl_xlegend, the proxy's and the application's."""
        layouts = self.path._layouts
        raw = self.path._maps["xlegs"].get(struct.pack("=Q", self.legs[leg]))
        assert raw is not None
        found = layouts["pl_xleg"].unpack(raw)
        end = layouts["pl_xlegend"]
        found["ends"] = [end.unpack(found["ends"][at:]) for at in (0, end.size)]
        return found

    def went(self, data: bytes, sender: socket.socket | None = None) -> str:
        """How the kernel carried this one message, sent by the application if not said. It is not read."""
        before = self.path.counters()
        (sender or self.app).sendall(data)
        after = self.path.counters()
        (reason,) = [name for name in REASONS if after[name] - before[name]]
        return reason

    def says(self, data: bytes, *, proxy: bool = False) -> str:
        """The same; the other end reads it."""
        sender, receiver = (self.proxy, self.app) if proxy else (self.app, self.proxy)
        reason = self.went(data, sender)
        assert read(receiver, len(data)) == data
        return reason

    def speaks(self) -> None:
        """Both ways, however."""
        for sender, receiver in ((self.app, self.proxy), (self.proxy, self.app)):
            sender.sendall(GET)
            assert read(receiver, len(GET)) == GET

    def is_fast(self) -> None:
        """Both ways, after one message each: of which the kernel may ask nobody, after one that found no room."""
        self.speaks()
        assert (self.says(GET), self.says(OKAY, proxy=True)) == ("leg", "leg")


Legs = Callable[..., Leg]


@pytest.fixture
def legs(pairs: Pairs) -> Iterator[Legs]:
    """Makes legs, of a client if not said, entered and settled if not said."""
    made: list[Leg] = []

    def make(side: Side = "client", *family: Family, enter: bool = True, pair: Pair | None = None) -> Leg:
        made.append(Leg(pair or pairs(*family, enrol=False), side))
        if enter:
            assert made[-1].enter() == "ok"
            made[-1].settle()
        return made[-1]

    yield make
    for leg in made:
        for number in leg.legs:
            leg.path.forget_leg(number)


def waiting(sock: socket.socket) -> int:
    """FIONREAD"""
    number = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, number)
    return number[0]


def fill(sender: socket.socket, piece: bytes, most: int) -> int:
    """Bytes sent until there is room for no more."""
    sender.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while sent < most:
            sent += sender.send(piece)
    sender.settimeout(5)
    return sent


# ---- in order, once


@pytest.mark.parametrize("side", SIDES)
def test_what_both_ends_say_in_turn_goes_without_tcp(legs: Legs, family: Family, side: Side) -> None:
    leg = legs(side, family)
    assert leg.went(GET) == "leg"  # both were seen with all read when they were entered
    assert read(leg.proxy, len(GET)) == GET
    assert leg.says(OKAY, proxy=True) == "leg"
    for size in (1, 1000, 200_000):
        assert (leg.says(b"a" * size), leg.says(b"b" * size, proxy=True)) == ("leg", "leg")


@pytest.mark.parametrize("seed", range(4))
def test_a_dialogue_of_any_kind(legs: Legs, seed: int) -> None:
    """One thread: pieces of any size, readers that lag, ends that are silent for long."""
    dice = random.Random(seed)
    leg = legs(SIDES[seed % 2])
    before = leg.path.counters()
    ways = [(leg.app, leg.proxy, bytearray(), bytearray()), (leg.proxy, leg.app, bytearray(), bytearray())]
    for sock in (leg.app, leg.proxy):
        sock.setblocking(False)
    for _ in range(400):
        sender, receiver, sent, got = dice.choice(ways)
        if dice.random() < 0.45:
            piece = dice.randbytes(dice.choice((1, 50, 1500, 20_000, 70_000, dice.randint(1, 400_000))))
            with suppress(BlockingIOError):
                sent += piece[: sender.send(piece)]
        else:
            with suppress(BlockingIOError):
                for _ in range(dice.choice((1, 1, 4, 100))):
                    got += receiver.recv(dice.choice((1, 100, 65536, 500_000)))
    for _, receiver, sent, got in ways:
        receiver.settimeout(5)
        got += read(receiver, len(sent) - len(got))
        assert got == sent
    after = leg.path.counters()
    assert all(after[name] > before[name] + 5 for name in ("leg", "leg_unread", "leg_long"))
    leg.is_fast()


def test_both_ends_speak_and_read_at_the_same_time(legs: Legs) -> None:
    leg = legs()
    before = leg.path.counters()
    failed: list[str] = []

    def speak(sock: socket.socket, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(700):
            sock.sendall(dice.randbytes(dice.choice((1, 100, 1500, 30_000))))
        sock.shutdown(socket.SHUT_WR)

    def hear(sock: socket.socket, seed: int) -> None:
        dice = random.Random(seed)
        for number in range(700):
            piece = dice.randbytes(dice.choice((1, 100, 1500, 30_000)))
            if read(sock, len(piece)) != piece:
                failed.append(f"message {number}")
                return
        if sock.recv(1):
            failed.append("bytes nobody sent")

    threads = [
        threading.Thread(target=call, args=(sock, seed), daemon=True)
        for sock, other, seed in ((leg.app, leg.proxy, 1), (leg.proxy, leg.app, 2))
        for call, sock in ((speak, sock), (hear, other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "bytes are missing"
    assert not failed
    after = leg.path.counters()
    assert after["leg"] > before["leg"] and after["leg_unread"] > before["leg_unread"]


def test_threads_that_speak_at_the_same_time(legs: Legs) -> None:
    """What one of them says comes whole, and in its order; among theirs there is none, as by TCP."""
    leg = legs()
    count, size = 300, 100
    before = leg.path.counters()

    def speak(name: int) -> None:
        for number in range(count):
            leg.app.send(struct.pack("=HH", name, number) + bytes(size - 4))

    threads = [threading.Thread(target=speak, args=(name,), daemon=True) for name in range(4)]
    for thread in threads:
        thread.start()
    nexts = [0] * len(threads)
    for _ in range(count * len(threads)):
        record = read(leg.proxy, size)
        name, number = struct.unpack_from("=HH", record)
        assert (number, record[4:]) == (nexts[name], bytes(size - 4))
        nexts[name] += 1
        if number % 10 == 0:
            leg.proxy.send(b"k")
            leg.app.recv(100)
    assert nexts == [count] * len(threads)
    after = leg.path.counters()
    assert after["leg"] > before["leg"] and after["leg_unread"] > before["leg_unread"]


def test_a_file(legs: Legs, tmp_path: Path) -> None:
    leg = legs("server")
    body = random.Random(1).randbytes(600_000)
    (tmp_path / "body").write_bytes(body)
    with (tmp_path / "body").open("rb") as file:
        sender = threading.Thread(target=leg.app.sendfile, args=(file,))
        sender.start()
        assert read(leg.proxy, len(body)) == body
        sender.join()
    leg.is_fast()


def test_nothing_is_handed_over_ahead_of_tcps_own_bytes(legs: Legs) -> None:
    leg = legs()
    long = random.Random(1).randbytes(400_000)
    assert leg.went(long, leg.proxy) == "leg_long"
    assert read(leg.app, 10) == long[:10]
    assert leg.says(GET) == "leg"  # it has not read all, and says so
    assert leg.went(OKAY, leg.proxy) == "leg_unread"
    assert read(leg.app, len(long) - 10 + len(OKAY)) == long[10:] + OKAY
    assert leg.says(b"unknown yet", proxy=True) == "leg_unread"
    assert leg.says(GET) == "leg"
    assert leg.says(OKAY, proxy=True) == "leg"


def test_tcps_own_bytes_come_behind_what_was_handed_over(legs: Legs) -> None:
    leg = legs()
    first, second = b"f" * 100_000, b"s" * 300_000
    assert (leg.went(first, leg.proxy), leg.went(second, leg.proxy), leg.went(b"t", leg.proxy)) == (
        "leg",
        "leg_long",
        "leg_unread",
    )
    assert read(leg.app, 400_001) == first + second + b"t"


def test_what_an_end_has_said_is_used_up_by_what_goes_by_tcp(legs: Legs) -> None:
    """4 GiB later the numbers are the same."""
    leg = legs()
    for proxy in (False, True):
        assert leg.state()["ends"][int(proxy)]["clean"]
        assert leg.says(b"l" * 300_000, proxy=proxy) == "leg_long"
        assert not leg.state()["ends"][int(proxy)]["clean"]


# ---- how much


@pytest.mark.parametrize("side", SIDES)
def test_a_reader_that_sleeps_is_handed_so_much_and_the_rest_waits_in_tcp(legs: Legs, side: Side) -> None:
    leg = legs(side)
    for sender, receiver in ((leg.app, leg.proxy), (leg.proxy, leg.app)):
        leg.is_fast()
        before = leg.path.counters()
        piece = b"p" * 16384
        sent = fill(sender, piece, 64 << 20)
        after = leg.path.counters()
        each = len(piece) + MESSAGE_COSTS
        assert HANDED_MAX - 2 * each < (after["leg"] - before["leg"]) * each <= HANDED_MAX
        assert after["leg_long"] > before["leg_long"]
        assert HANDED_MAX < sent < 64 << 20
        assert read(receiver, sent) == b"p" * sent


def test_many_small_messages_cost_the_kernel_no_more(legs: Legs) -> None:
    """It keeps about a kilobyte of its own for each."""
    leg = legs()
    leg.is_fast()
    before = leg.path.counters()["leg"]
    for _ in range(1000):
        leg.app.send(b"s")
    assert 200 < leg.path.counters()["leg"] - before <= HANDED_MAX // MESSAGE_COSTS
    assert read(leg.proxy, 1000) == b"s" * 1000
    leg.is_fast()


# ---- entering


@pytest.mark.parametrize("side", SIDES)
def test_a_reader_asleep_in_recv_gets_what_comes(legs: Legs, side: Side) -> None:
    """It looks into TCP's queue alone: nothing is handed to its socket until it is awake."""
    leg = legs(side, enter=False)
    reader = Reader(leg.app)
    assert leg.enter() == "ok"
    leg.stays_apart(leg.app)
    assert leg.pair.settled(leg.proxy)
    assert leg.says(GET) == "leg"
    assert leg.went(OKAY, leg.proxy) == "leg_unread"
    assert reader.result() == OKAY
    leg.settle()
    leg.is_fast()


def test_a_reader_asleep_on_a_legs_socket_is_woken(legs: Legs) -> None:
    leg = legs()
    leg.is_fast()
    reader = Reader(leg.app)
    assert leg.went(OKAY, leg.proxy) == "leg"
    assert reader.result() == OKAY


def test_bytes_from_before(legs: Legs) -> None:
    """Read in part: nothing moves from under who reads it."""
    leg = legs(enter=False)
    leg.proxy.sendall(b"early reply")
    leg.app.sendall(b"early request")
    assert read(leg.app, 6) == b"early "
    assert leg.enter() == "ok"
    leg.stays_apart(leg.app, leg.proxy)
    assert leg.went(b" and more", leg.proxy) == "leg_unread"
    assert leg.went(b" and more") == "leg_unread"
    assert read(leg.app, 14) == b"reply and more"
    assert read(leg.proxy, 22) == b"early request and more"
    leg.settle()
    leg.is_fast()


def test_bytes_that_are_written_and_have_not_come(legs: Legs) -> None:
    """All read may hold for a moment only: what comes in the next would be moved from under who reads it."""
    leg = legs(enter=False)
    leg.proxy.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    leg.proxy.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    leg.proxy.sendall(b"corked")
    assert leg.enter() == "ok"
    leg.stays_apart(leg.app)
    leg.proxy.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    assert read(leg.app, 6) == b"corked"
    leg.settle()
    leg.is_fast()


def test_entered_again_nothing_is_known_until_it_is_said(legs: Legs) -> None:
    """Whether all is read can be told of a settled socket by who has it alone: bytes come to it meanwhile."""
    leg = legs()
    leg.is_fast()
    leg.forget()
    assert leg.says(GET) == "no_record"
    assert leg.enter() == "ok"
    assert [end["clean"] for end in leg.state()["ends"]] == [0, 0]
    assert leg.says(GET) == "leg_unread"
    assert leg.says(OKAY, proxy=True) == "leg"
    assert leg.says(GET) == "leg"


def test_the_former_of_two_legs_means_nothing_any_more(legs: Legs) -> None:
    leg = legs()
    leg.is_fast()
    assert leg.enter() == "ok"
    leg.path.forget_leg(leg.legs[0])
    leg.is_fast()


# ---- what the application sees


def test_counts_polls_and_peeks(legs: Legs) -> None:
    leg = legs()
    with select.epoll() as watch:
        watch.register(leg.app, select.EPOLLIN | select.EPOLLET)
        watch.poll(0)
        poller = select.poll()
        poller.register(leg.app, select.POLLIN)
        assert not poller.poll(0)
        assert leg.went(OKAY, leg.proxy) == "leg"
        assert watch.poll(5) and poller.poll(0)
        assert waiting(leg.app) == len(OKAY)
        assert leg.went(b"s" * 300_000, leg.proxy) == "leg_long"
        assert watch.poll(5)
        wait_for(lambda: waiting(leg.app) >= len(OKAY) + 65536, "TCP's own bytes are counted")
        assert leg.app.recv(5, socket.MSG_PEEK) == OKAY[:5]
        assert read(leg.app, len(OKAY) + 300_000) == OKAY + b"s" * 300_000
        assert waiting(leg.app) == 0 and not poller.poll(0)


def test_ends_come_behind_the_last_byte(legs: Legs) -> None:
    leg = legs("server")
    assert leg.went(GET) == "leg"
    leg.app.shutdown(socket.SHUT_WR)
    assert read(leg.proxy, len(GET)) == GET
    assert leg.proxy.recv(1) == b""
    assert leg.went(OKAY, leg.proxy) == "leg"  # the other half is open
    assert leg.went(b"s" * 300_000, leg.proxy) == "leg_long"
    leg.proxy.close()
    assert read(leg.app, len(OKAY) + 300_000) == OKAY + b"s" * 300_000
    assert leg.app.recv(1) == b""


@pytest.mark.parametrize("proxy", [False, True])
def test_what_was_said_last_is_read_after_the_end(legs: Legs, proxy: bool) -> None:
    """An end that closes has not read all: TCP alone would reset the connection."""
    leg = legs("server")
    closing, other = (leg.proxy, leg.app) if proxy else (leg.app, leg.proxy)
    assert leg.went(GET, other) == "leg"
    assert leg.went(OKAY, closing) == "leg"
    closing.close()
    assert read(other, len(OKAY)) == OKAY
    assert other.recv(1) == b""


def test_a_reset_ends_it(legs: Legs) -> None:
    leg = legs()
    assert (leg.went(GET), leg.went(b"s" * 300_000)) == ("leg", "leg_long")
    with select.epoll() as watch:
        watch.register(leg.proxy, select.EPOLLRDHUP)
        leg.app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        leg.app.close()
        assert watch.poll(5)
    assert read(leg.proxy, len(GET)) == GET  # what waits is there still, as it would be by TCP alone
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        leg.proxy.send(b"x")


def test_who_sends_to_an_end_that_is_gone_hears_of_it(legs: Legs) -> None:
    leg = legs()
    leg.app.close()
    assert leg.went(OKAY, leg.proxy) == "target_gone"
    assert leg.proxy.recv(1) == b""
    wait_for(lambda: _broken(leg.proxy), "the sender hears of it")


def _broken(sock: socket.socket) -> bool:
    try:
        sock.send(b"x")
    except (BrokenPipeError, ConnectionResetError):
        return True
    return False


# ---- the end of a leg


def test_bytes_that_wait_when_it_is_forgotten(legs: Legs) -> None:
    leg = legs()
    assert leg.went(OKAY, leg.proxy) == "leg"
    leg.forget()
    assert leg.went(b"slow", leg.proxy) == "no_record"
    assert leg.enter() == "ok"
    assert leg.went(b" and more", leg.proxy) == "leg_unread"
    assert leg.says(GET) == "leg"  # the proxy has read all, and has spoken
    assert leg.went(b" and yet more", leg.proxy) == "leg_unread"
    expected = OKAY + b"slow and more and yet more"
    assert read(leg.app, len(expected)) == expected
    leg.is_fast()


def set_option(leg: Leg, option: int, value: int) -> bool:
    """False: this kernel's TCP has none of it."""
    try:
        leg.app.setsockopt(socket.SOL_SOCKET, option, value)
    except OSError as error:
        if (option, error.errno) != (SO_PEEK_OFF, errno.EOPNOTSUPP):
            raise
        return False
    return True


@pytest.mark.parametrize(("option", "idle", "set_"), [(socket.SO_RCVLOWAT, 1, 7), (SO_PEEK_OFF, -1, 0), (SO_ZEROCOPY, 0, 1)])
def test_what_only_tcp_can_do_ends_it(legs: Legs, option: int, idle: int, set_: int) -> None:
    leg = legs()
    may_have = set_option(leg, option, idle)
    leg.is_fast()
    assert leg.went(OKAY, leg.proxy) == "leg"
    if not may_have:
        return
    set_option(leg, option, set_)
    assert leg.state()["off"] == 1
    assert (leg.went(b"s" * 10, leg.proxy), leg.says(GET)) == ("off", "off")
    set_option(leg, option, idle)
    assert read(leg.app, len(OKAY) + 10) == OKAY + b"s" * 10
    assert (leg.says(b"x"), leg.says(b"x", proxy=True), leg.says(GET)) == ("off", "off", "off")


@pytest.mark.parametrize(
    ("option", "set_", "reason"),
    [(socket.SO_RCVLOWAT, 7, "lowat"), (SO_PEEK_OFF, 0, "peek_off"), (SO_ZEROCOPY, 1, "zerocopy")],
)
def test_what_only_tcp_can_do_keeps_it_out(legs: Legs, option: int, set_: int, reason: str) -> None:
    leg = legs(enter=False)
    try:
        leg.app.setsockopt(socket.SOL_SOCKET, option, set_)
    except OSError:
        assert option == SO_PEEK_OFF
        return
    assert leg.enter() == reason
    leg.speaks()


def test_a_socket_that_connects_again_is_out(legs: Legs, world: World) -> None:
    """Until it is entered anew: the kernel leaves it in the sockhash, where its numbers begin anywhere."""
    leg = legs()
    world.a.give("again", leg.app)
    world.a("import ctypes; libc = ctypes.CDLL(None, use_errno=True); again.settimeout(3)")
    for _ in range(6):
        leg.is_fast()
        assert leg.says(b"l" * 300_000, proxy=True) == "leg_long"
        world.a("assert libc.connect(again.fileno(), bytes(28), 28) == 0")
        world.a(f"again.connect(({leg.pair.family.vip!r}, 80))")
        assert leg.state()["off"] == 1
        leg.proxy.close()
        world.agent["a"]("second, _ = l.accept()")
        leg.proxy = leg.pair.accepted = world.agent["a"]("second")
        leg.proxy.settimeout(5)
        leg.speaks()
        assert leg.enter() == "ok"
        leg.settle()
    world.a("again.close()")
    world.agent["a"]("second.close()")


# ---- who is refused


def test_no_pair_is_made_of_a_legs_sockets(legs: Legs) -> None:
    """What goes by a leg moves no sequence numbers, by which a pair is latched. Neither does what waits when it has ended."""
    leg, other = legs("client"), None
    assert leg.pair.enrol() == ["paired", "ok"]
    leg.forget()
    assert leg.pair.enrol() == ["paired", "ok"]
    other = legs("server")
    assert other.pair.enrol() == ["ok", "paired"]
    other.forget()
    assert other.pair.enrol() == ["ok", "paired"]
    for each in (leg, other):
        each.speaks()


def test_no_leg_is_made_of_a_pairs_sockets(pairs: Pairs, legs: Legs) -> None:
    pair = pairs()
    client, server = (legs(side, enter=False, pair=pair) for side in SIDES)
    assert (client.enter(), server.enter()) == ("paired", "paired")
    pair.exchange()


def test_a_pair_that_has_ended_may_be_a_leg(pairs: Pairs, legs: Legs) -> None:
    pair = pairs()
    pair.exchange()
    pair.client.sendall(GET)
    pair.server.sendall(OKAY)  # waits unread
    pair.path.forget_record(pair.record)
    leg = legs(enter=False, pair=pair)
    assert leg.enter() == "ok"
    assert leg.went(b"slow", leg.proxy) == "leg_unread"
    assert read(leg.app, len(OKAY) + 4) == OKAY + b"slow"
    leg.settle()
    leg.is_fast()


def test_two_sockets_that_are_not_what_is_said(legs: Legs) -> None:
    client, server = (legs(side, enter=False) for side in SIDES)
    one, two = (leg.pair.enrolment(slot) for leg, slot in ((client, None), (server, 0)))
    # another netns; the wrong way round; a connection on the wrong side; nobody's; not a leg's
    assert client.enter(netns=server.netns) == "no_app_socket"
    for leg, of in ((client, one), (server, two)):
        assert leg.enter(local=of.remote, remote=of.local) == "not_the_proxys"
        assert leg.enter(local=(of.local[0], 1)) in ("no_app_socket", "no_proxy_socket")  # or a listener
        assert leg.enter(remote=(of.remote[0], 1)) in ("no_app_socket", "not_established")
        assert leg.enter(side="server" if leg is client else "client") == "not_the_proxys"
        assert leg.enter(record=1) == "no_record"
        assert leg.enter(record=leg.pair.record) == "no_record"
        leg.speaks()


def test_a_word_of_the_proxys_makes_no_other_socket_of_one(legs: Legs, world: World) -> None:
    """It may say of any of its sockets for whom it is."""
    leg = legs(enter=False)
    said = world.caller(*leg.pair.caller, IDENTITY["a"])
    world.proxy(f"{leg.pair.accepted_name}.setsockopt({LEVEL}, {CALLER}, {said!r})")
    assert leg.enter(side="server") == "not_the_proxys"


def test_two_applications_sockets_are_no_leg(legs: Legs, world: World) -> None:
    """A connection without the proxy."""
    leg = legs(enter=False)
    world.a(
        "l9 = socket.create_server(('127.0.0.1', 7999)); c9 = socket.create_connection(('127.0.0.1', 7999)); s9, _ = l9.accept()"
    )
    local, remote = world.a("(s9.getsockname(), s9.getpeername())")
    for one, other in ((local, remote), (remote, local)):
        for side in SIDES:
            assert leg.enter(local=one, remote=other, side=side) == "not_the_proxys"


def test_connections_that_are_closing_are_refused(legs: Legs) -> None:
    for side in SIDES:
        leg = legs(side, enter=False)
        leg.app.shutdown(socket.SHUT_WR)
        assert leg.proxy.recv(1) == b""
        assert leg.enter() == "not_established"


def test_another_legs_entry_leads_to_nobody_elses_socket(legs: Legs) -> None:
    """The kernel gives the memory of a forgotten leg to the next, while a program may look at it still."""
    mine, other = legs(), legs()
    mine.is_fast()
    other.is_fast()
    maps, end = mine.path._maps["xlegs"], mine.path._layouts["pl_xlegend"]
    (own, foreign) = (maps.get(struct.pack("=Q", leg.legs[-1])) for leg in (mine, other))
    assert own is not None and foreign is not None
    mixed = bytearray(foreign)
    for at, state in zip((0, end.size), mine.state()["ends"], strict=True):
        was = end.unpack(foreign[at:])
        mixed[at : at + end.size] = end.pack(**{**was, "clean": state["clean"]})
    maps.put(struct.pack("=Q", mine.legs[-1]), bytes(mixed))
    mine.app.sendall(GET)
    assert nothing(other.proxy)
    assert read(mine.proxy, len(GET)) == GET
