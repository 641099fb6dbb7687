"""Who may be paired, what it does to the sockets, and how it ends."""

from __future__ import annotations

import array
import errno
import fcntl
import select
import socket
import struct
import termios
import threading
import time
from collections import Counter

import pytest

from nodeagent.express_path import Enrolment, ExpressPath, Verdict
from tests.bpf.conftest import Pairs
from tests.bpf.express_pair import GET, OKAY, PLACES, TAKE, Pair, Programs, nothing, read
from tests.bpf.families import Family
from tests.bpf.steps import NO_OPTION, refused
from tests.bpf.world import IDENTITY, World, wait_for

STRANGE = b"BREW / HTTP/1.1\r\nHost: shop.test\r\n\r\n"


class Reader:
    """A thread inside recv()."""

    def __init__(self, sock: socket.socket, flags: int = 0, count: int = 1 << 16) -> None:
        sock.settimeout(None)
        self.got: list[bytes] = []
        self._thread = threading.Thread(target=lambda: self.got.append(sock.recv(count, flags)), daemon=True)
        self._thread.start()
        wait_for(lambda: self._asleep(), "the reader sleeps")

    def _asleep(self) -> bool:
        with open(f"/proc/self/task/{self._thread.native_id}/wchan") as place:
            return "wait" in place.read()

    def result(self) -> bytes:
        self._thread.join(5)
        assert self.got, "the reader still sleeps"
        return self.got[0]


# ---- readers who sleep while their socket is enrolled


@pytest.mark.parametrize("flags", [0, socket.MSG_WAITALL])
def test_readers_asleep_in_recv_get_what_comes(pairs: Pairs, family: Family, flags: int) -> None:
    """A reader inside TCP's own recv() sees TCP's own queue alone: nothing may be queued elsewhere while it is there."""
    pair = pairs(family, enrol=False)
    client, server = Reader(pair.client, flags, len(OKAY)), Reader(pair.server, flags, len(STRANGE))
    assert pair.enrol() == ["ok", "ok"]
    pair.arm()
    with pytest.raises(AssertionError, match="not within"):
        wait_for(lambda: pair.settled(pair.client) or pair.settled(pair.server), "settled", 0.3)
    pair.client.sendall(STRANGE)
    assert read(pair.accepted, len(STRANGE)) == STRANGE
    pair.consumed += len(STRANGE)
    for part in (STRANGE[:7], STRANGE[7:]) if flags else (STRANGE,):
        pair.upstream.sendall(part)
    pair.up_sent[0] += len(STRANGE)
    assert server.result() == STRANGE
    pair.server.sendall(OKAY)
    assert read(pair.upstream, len(OKAY)) == OKAY
    pair.up_consumed[0] += len(OKAY)
    pair.accepted.sendall(OKAY)
    pair.sent += len(OKAY)
    assert client.result() == OKAY
    pair.arm()
    wait_for(lambda: pair.settled(pair.server), "the server, which has sent, is settled")
    if not pair.settled(pair.client):
        pair.slow_exchange()
    pair.settle()
    pair.exchange()


def test_two_readers_asleep_in_recv_are_both_waited_for(pairs: Pairs) -> None:
    """That the first has been woken, and its process has answered, says nothing of the second."""
    pair = pairs(enrol=False)
    readers = [Reader(pair.server), Reader(pair.server)]
    assert pair.enrol() == ["ok", "ok"]
    pair.arm()

    def slowly() -> None:
        pair.client.sendall(STRANGE)
        assert read(pair.accepted, len(STRANGE)) == STRANGE
        pair.consumed += len(STRANGE)
        before = sum(len(reader.got) for reader in readers)
        pair.upstream.sendall(STRANGE)
        pair.up_sent[0] += len(STRANGE)
        wait_for(lambda: sum(len(reader.got) for reader in readers) > before, "a reader has it")
        pair.server.sendall(OKAY)
        pair.answer_slow(OKAY)
        pair.arm()

    slowly()
    with pytest.raises(AssertionError, match="not within"):
        wait_for(lambda: pair.settled(pair.server), "settled", 0.3)
    slowly()
    assert [reader.got for reader in readers] == [[STRANGE], [STRANGE]]
    pair.settle()
    pair.exchange()


def test_a_connection_that_is_not_accepted_yet(pairs: Pairs) -> None:
    late = pairs(enrol=False, accept=False)
    assert late.enrol() == ["ok", "ok"]
    late.arm()
    late.client.sendall(GET)
    assert read(late.accepted, len(GET)) == GET
    late.consumed += len(GET)
    assert late.punt() == "unclean"
    late.upstream.sendall(GET)
    late.up_sent[0] += len(GET)
    late.accept(0)
    assert read(late.server, len(GET)) == GET
    late.server.sendall(OKAY)
    late.answer_slow(OKAY)
    late.arm()
    late.settle()
    late.slow_exchange(STRANGE)
    late.exchange()


def test_readers_asleep_on_an_enrolled_socket_are_woken(pairs: Pairs) -> None:
    pair = pairs()
    for request in (GET, STRANGE):
        client, server = Reader(pair.client), Reader(pair.server)
        pair.client.sendall(request)
        if request is STRANGE:
            assert read(pair.accepted, len(request)) == request
            pair.upstream.sendall(request)
        assert server.result() == request
        pair.server.sendall(OKAY)
        if request is STRANGE:
            assert read(pair.upstream, len(OKAY)) == OKAY
            pair.accepted.sendall(OKAY)
        assert client.result() == OKAY


def test_threads_that_poll_are_not_waited_for(pairs: Pairs) -> None:
    """They are woken, look again, and find redirected bytes by the new recv()."""
    pair = pairs(enrol=False)
    poller = select.poll()
    poller.register(pair.server, select.POLLIN)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(poller.poll(5000)))
    thread.start()
    with select.epoll() as watch:
        watch.register(pair.client, select.EPOLLIN | select.EPOLLET)
        assert pair.enrol() == ["ok", "ok"]
        pair.settle()
        pair.arm()
        pair.client.sendall(GET)
        thread.join(5)
        assert found and found[0]
        pair.is_fast(GET)
        pair.server.sendall(OKAY)
        assert watch.poll(5)


def test_counts_of_waiting_bytes_are_right(pairs: Pairs) -> None:
    """FIONREAD, for redirected bytes and for TCP's own."""
    pair = pairs()

    def waiting(sock: socket.socket) -> int:
        number = array.array("i", [0])
        fcntl.ioctl(sock, termios.FIONREAD, number)
        return number[0]

    pair.client.sendall(GET)
    assert waiting(pair.server) == len(GET)
    assert read(pair.server, 10) == GET[:10]
    assert waiting(pair.server) == len(GET) - 10
    assert read(pair.server, len(GET) - 10) == GET[10:]
    assert waiting(pair.server) == 0
    pair.server.sendall(OKAY)
    assert waiting(pair.client) == len(OKAY)
    assert pair.client.recv(5, socket.MSG_PEEK) == OKAY[:5]
    assert waiting(pair.client) == len(OKAY)
    assert read(pair.client, len(OKAY)) == OKAY
    pair.accepted.sendall(b"slow")
    wait_for(lambda: waiting(pair.client) == 4, "TCP's own bytes are counted")


def test_data_from_before_the_enrolment_is_read_first(pairs: Pairs) -> None:
    pair = pairs(enrol=False)
    pair.accepted.sendall(b"early reply")
    pair.upstream.sendall(b"early request")
    assert pair.enrol() == ["ok", "ok"]
    pair.arm()
    pair.client.sendall(GET)
    pair.is_slow_unread(GET)
    assert read(pair.client, 11) == b"early reply"
    assert read(pair.server, 13) == b"early request"
    pair.arm()
    pair.settle()


def test_data_that_is_read_in_part_is_not_read_twice(pairs: Pairs) -> None:
    """A segment that moves from TCP's queue moves as a whole: not while somebody has had the first part of one."""
    pair = pairs(enrol=False)
    pair.accepted.sendall(b"early reply")
    pair.upstream.sendall(b"early request")
    assert read(pair.client, 6) == b"early " and read(pair.server, 6) == b"early "
    assert pair.enrol() == ["ok", "ok"]
    pair.accepted.sendall(b" and more")
    pair.upstream.sendall(b" and more")
    assert read(pair.client, 14) == b"reply and more"
    assert read(pair.server, 16) == b"request and more"
    pair.sent += len(b" and more")
    pair.up_sent[0] += len(b" and more")
    pair.arm()
    pair.settle()


def test_nothing_is_settled_in_the_midst_of_an_answer(pairs: Pairs) -> None:
    """All read may hold for a moment only: what comes in the next would be moved from under who reads it."""
    pair = pairs(enrol=False)
    pair.accepted.sendall(b"early")
    assert pair.enrol() == ["ok", "ok"]
    pair.arm()
    pair.accepted.sendall(b" and more")  # not armed since: more may come
    assert read(pair.client, 14) == b"early and more"
    wait_for(lambda: pair.settled(*pair.servers), "the server's end is settled")
    end = time.monotonic() + 0.1  # looked at many times: after 1 ms, then doubling
    while time.monotonic() < end:
        assert not pair.settled(pair.client)
        time.sleep(0.005)
    pair.sent += len(b" and more")
    pair.arm()
    pair.settle()


# ---- who is refused


def one_result(pair: Pair, netns: int, enrolment: Enrolment) -> str:
    return pair.path.enrol(netns, enrolment)[0]


def test_only_the_connections_of_the_named_identity_are_paired(pairs: Pairs) -> None:
    pair = pairs(enrol=False)
    a, b = pair.fds["a"], pair.fds["b"]
    other = IDENTITY["b"]
    assert one_result(pair, a, pair.enrolment(identity=other)) == "identity"
    assert one_result(pair, b, pair.enrolment(0, identity=other)) == "identity"
    assert one_result(pair, b, pair.enrolment(0, caller=("10.9.9.9", pair.caller[1]))) == "caller"
    assert one_result(pair, b, pair.enrolment()) == "no_proxy_socket"  # another netns
    assert one_result(pair, a, pair.enrolment(record=1)) == "no_record"
    assert one_result(pair, b, pair.enrolment(0)._replace(slot=8)) == "malformed"
    # The wrong way round, and a connection on the wrong side
    one = pair.enrolment()
    assert one_result(pair, a, one._replace(local=one.remote, remote=one.local)) == "not_the_proxys"
    assert one_result(pair, a, one._replace(side="server", caller=pair.caller)) == "not_the_proxys"
    two = pair.enrolment(0)
    assert one_result(pair, b, two._replace(local=two.remote, remote=two.local)) == "not_the_proxys"
    assert one_result(pair, b, two._replace(side="client")) == "not_the_proxys"
    record = pair.path.read_record(pair.record)
    assert record is not None and record["client_key"] == 0 and not any(slot["key"] for slot in record["slots"])


def test_connections_that_are_closing_are_refused(pairs: Pairs) -> None:
    pair = pairs(enrol=False)
    pair.client.shutdown(socket.SHUT_WR)
    wait_for(lambda: pair.accepted.recv(1) == b"", "the end is seen")
    assert pair.enrol()[0] == "not_established"


def test_listeners_are_not_taken_for_connections(pairs: Pairs) -> None:
    pair = pairs(enrol=False)
    one = pair.enrolment()
    gone = one._replace(remote=(one.remote[0], 1))
    assert one_result(pair, pair.fds["a"], gone) == "not_established"


def test_low_water_marks_keep_a_socket_out(pairs: Pairs, world: World) -> None:
    pair = pairs(enrol=False)
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
    assert pair.enrol() == ["lowat", "ok"]
    pair = pairs()
    pair.exchange()
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    pair.exchange()
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 5)
    pair.slow_exchange(arm=False)
    assert pair.punt() == "off"
    assert pair.view()["flags"] == 1


SO_PEEK_OFF, SO_ZEROCOPY = 42, 60


@pytest.mark.parametrize(
    ("option", "idle", "set_", "reason"), [(SO_PEEK_OFF, -1, 0, "peek_off"), (SO_ZEROCOPY, 0, 1, "zerocopy")]
)
def test_what_only_tcp_can_do_keeps_a_socket_out(pairs: Pairs, option: int, idle: int, set_: int, reason: str) -> None:
    pair = pairs(enrol=False)
    try:
        pair.server.setsockopt(socket.SOL_SOCKET, option, set_)
    except OSError as error:
        if (option, error.errno) != (SO_PEEK_OFF, errno.EOPNOTSUPP):  # some kernels' TCP has none
            raise
        return
    assert pair.enrol() == ["ok", reason]
    pair = pairs()
    pair.client.setsockopt(socket.SOL_SOCKET, option, idle)
    pair.exchange()
    pair.client.setsockopt(socket.SOL_SOCKET, option, set_)
    pair.slow_exchange(arm=False)
    assert pair.punt() == "off"


def test_pages_that_are_lent_to_the_kernel_are_given_back(pairs: Pairs) -> None:
    """MSG_ZEROCOPY: the sender waits to be told so."""
    pair = pairs()
    pair.client.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    pair.client.send(GET, 0x4000000)
    pair.is_slow(GET)
    poller = select.poll()
    poller.register(pair.client, 0)
    assert poller.poll(1000)
    assert pair.client.recvmsg(1, 100, socket.MSG_ERRQUEUE)[1]


def test_a_low_water_mark_set_meanwhile_hands_over(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.sendall(GET)
    pair.is_fast(GET)
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 100)
    pair.server.sendall(OKAY)
    assert read(pair.upstream, len(OKAY)) == OKAY
    assert pair.view()["handed"] == 1


def test_upper_layers_do_not_come_upon_enrolled_sockets(pairs: Pairs, world: World) -> None:
    pair = pairs()
    for sock in (pair.client, pair.server):
        with pytest.raises(PermissionError):
            sock.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
    pair.exchange()
    plain = pairs(enrol=False)
    try:
        plain.client.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
    except FileNotFoundError:
        return  # this kernel has no TLS
    assert plain.enrol() == ["ulp", "ok"]


def test_workloads_do_not_speak_to_pairs(pairs: Pairs, world: World) -> None:
    pair = pairs()
    world.a.give("mine", pair.client)
    refused(world.a, f"mine.setsockopt({0x50494C}, 3, bytes(32))")
    with pytest.raises(OSError, match=NO_OPTION):
        world.a(f"mine.getsockopt({0x50494C}, 3, 1024)")
    world.a.give("theirs", pair.accepted)  # even with the proxy's socket in hand
    refused(world.a, f"theirs.setsockopt({0x50494C}, 3, bytes(32))")
    world.a("mine.close(); theirs.close()")
    pair.exchange()


# ---- pairs end, and begin again


def again(pair: Pair, program: int = 1) -> Pair:
    """The same sockets under another record."""
    pair.record = pair.path.create_record(program, IDENTITY["a"])
    assert set(pair.enrol()) == {"ok"}
    for slot in range(len(pair.servers)):
        pair.arm(slot)
    return pair


def test_the_same_sockets_in_another_record(pairs: Pairs, express: ExpressPath) -> None:
    pair = pairs()
    pair.exchange()
    old, keys = pair.record, (pair.end(pair.client)["key"], pair.end(pair.server)["key"])
    again(pair)
    assert (pair.end(pair.client)["key"], pair.end(pair.server)["key"]) == keys
    former = express.read_record(old)
    assert former is not None and former["off"] == 1
    assert pair.settled(pair.client, pair.server)
    pair.exchange()
    express.forget_record(old)
    express.reap()
    pair.exchange()


def test_the_same_record_again(pairs: Pairs) -> None:
    pair = pairs()
    pair.slow_exchange(STRANGE)
    assert pair.enrol() == ["ok", "ok"]
    pair.arm()
    pair.exchange()


def test_a_place_that_is_given_again_means_nothing_to_its_former_sockets(pairs: Pairs, express: ExpressPath) -> None:
    pair = pairs()
    pair.exchange()
    place = express._place(pair.record)
    express.forget_record(pair.record)
    express.reap()
    early = express.create_record(1, IDENTITY["a"])
    assert express._place(early) != place  # a program may look at it still
    express.reap()
    later = express.create_record(1, IDENTITY["a"])
    assert express._place(later) == place
    fresh = express.read_record(later)
    for own, peer in ((pair.client, pair.accepted), (pair.server, pair.upstream)):
        own.sendall(GET)
        assert read(peer, len(GET)) == GET
    assert express.read_record(later) == fresh
    for record in (early, later):
        express.forget_record(record)


def test_a_record_is_busy_with_a_socket_that_left_it(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.sendall(GET)
    pair.is_fast(GET)
    again(pair)
    pair.server.sendall(OKAY)  # asked under the old record: nobody's answer now
    assert nothing(pair.client)
    assert read(pair.upstream, len(OKAY)) == OKAY


def test_a_server_whose_place_another_has_taken(pairs: Pairs) -> None:
    """The place in the record is the new connection's; the old one has a note that says the same place."""
    pair = pairs()
    pair.dial(0)
    late = pair.enrolment(1)._replace(slot=0, workload=PLACES)
    assert one_result(pair, pair.fds["b"], late) == "ok"
    pair.settle()
    pair.up_sent[0] = pair.up_consumed[0] = 0
    pair.arm()
    pair.client.sendall(GET)
    assert read(pair.servers[1], len(GET)) == GET
    pair.servers[0].sendall(OKAY)
    assert nothing(pair.client)
    pair.servers[1].sendall(OKAY)
    assert read(pair.client, len(OKAY)) == OKAY


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_socket_that_connects_again_is_out(pairs: Pairs, world: World, side: str) -> None:
    pair = pairs()
    pair.exchange()
    sock, actor = (pair.client, world.a) if side == "client" else (pair.server, world.b)
    actor.give("again", sock)
    actor("import ctypes; libc = ctypes.CDLL(None, use_errno=True); assert libc.connect(again.fileno(), bytes(28), 28) == 0")
    actor("again.settimeout(1)")
    actor("try: again.connect(('127.0.0.1', 1))\nexcept OSError: pass")
    record = pair.path.read_record(pair.record)
    assert record is not None and record["off"] == 1
    if side == "server":
        pair.client.sendall(GET)
        pair.servers.clear()
        pair.is_slow(GET)
    actor("again.close()")


def test_a_socket_that_listens_is_out(pairs: Pairs, world: World) -> None:
    pair = pairs()
    world.b.give("again", pair.server)
    world.b("import ctypes; libc = ctypes.CDLL(None, use_errno=True); assert libc.connect(again.fileno(), bytes(28), 28) == 0")
    world.b("again.listen(1)")
    record = pair.path.read_record(pair.record)
    assert record is not None and record["off"] == 1
    pair.client.sendall(GET)
    assert read(pair.accepted, len(GET)) == GET
    world.b("again.close()")


def test_a_proxys_sockets_are_taken_over_where_they_were_armed(pairs: Pairs) -> None:
    pair = pairs()
    pair.exchange()
    a, b = pair.fds["a"], pair.fds["b"]

    def found() -> tuple[str, str]:
        return pair.path.check(a, pair.enrolment()), pair.path.check(b, pair.enrolment(0))

    assert found() == ("ok", "ok")
    pair.client.sendall(STRANGE)
    assert found() == ("ok", "ok")  # what waits unread is for whoever takes it over
    pair.is_slow(STRANGE)
    assert found() == ("moved", "ok")
    pair.relay(STRANGE)
    assert found() == ("moved", "moved")
    pair.server.sendall(OKAY)
    pair.answer_slow(OKAY)
    pair.arm()
    assert found() == ("ok", "ok")
    assert pair.path.check(a, pair.enrolment(record=pair.path.create_record(1, 1))) == "no_record"


# ---- choice among servers, and what is counted


def test_weights_and_endpoints(pairs: Pairs, programs: Programs, express: ExpressPath) -> None:
    programs.put(endpoints=[PLACES, PLACES + 1, PLACES + 2])
    express.set_verdicts(1, {(1, 0): Verdict(1, ((3, 0b001), (1, 0b110))), (2, 0): Verdict(2, ((0, 0b001), (7, 0b100)))})
    pair = pairs(servers=3)
    taken: Counter[int] = Counter()
    with select.epoll() as watch:
        for server in pair.servers:
            watch.register(server, select.EPOLLIN)
        for _ in range(400):
            pair.client.sendall(GET)
            (ready, _), *more = watch.poll(5)
            assert not more
            slot = next(slot for slot, server in enumerate(pair.servers) if server.fileno() == ready)
            taken[slot] += 1
            assert read(pair.servers[slot], len(GET)) == GET
            pair.servers[slot].sendall(OKAY)
            assert read(pair.client, len(OKAY)) == OKAY
    assert 250 < taken[0] < 350, taken
    assert taken[1] > 20 and taken[2] > 20, taken
    for _ in range(20):
        pair.exchange(GET.replace(b"/", b"/two", 1), slot=2)


def test_the_less_loaded_of_two_is_asked(pairs: Pairs, programs: Programs, express: ExpressPath) -> None:
    programs.put(3, endpoints=[PLACES, PLACES + 1])
    express.set_verdicts(3, {(1, 0): Verdict(1, ((1, 0b11),))})
    first = pairs(servers=2, program=3)
    first.client.sendall(GET)
    busy = 0 if not nothing(first.servers[0]) else 1
    second = pairs(servers=2, program=3)
    for _ in range(10):
        second.exchange(slot=1 - busy)
    first.say(TAKE)
    first.arm(0)
    taken: Counter[int] = Counter()
    for _ in range(40):
        second.client.sendall(GET)
        slot = 0 if not nothing(second.servers[0]) else 1
        taken[slot] += 1
        assert read(second.servers[slot], len(GET)) == GET
        second.servers[slot].sendall(OKAY)
        assert read(second.client, len(OKAY)) == OKAY
    assert min(taken[0], taken[1]) > 3


@pytest.mark.parametrize("chooses", [True, False])
def test_load_is_counted_where_it_decides(pairs: Pairs, programs: Programs, express: ExpressPath, chooses: bool) -> None:
    programs.put(7, endpoints=[PLACES, PLACES + 1], chooses=chooses)
    express.set_verdicts(7, {(1, 0): Verdict(1, ((1, 0b01),))})
    pair = pairs(servers=2, program=7)
    loads, of_first = express._maps["xloads"], struct.pack("=I", 8 * 7)
    pair.client.sendall(GET)
    pair.is_fast(GET)
    assert loads.get(of_first) == struct.pack("=I", int(chooses))
    pair.server.sendall(OKAY)
    assert read(pair.client, len(OKAY)) == OKAY
    assert loads.get(of_first) == struct.pack("=I", 0)


def test_a_response_that_may_be_on_its_way_is_not_overtaken(pairs: Pairs, programs: Programs, express: ExpressPath) -> None:
    """Whoever redirects to the client holds a reference to its socket. A timer of TCP's does so as well: then the same server
    is asked again, if it may be."""
    programs.put(5, endpoints=[PLACES, PLACES + 1])
    express.set_verdicts(5, {(1, 0): Verdict(1, ((1, 0b01), (1, 0b10))), (2, 0): Verdict(2, ((1, 0b10), (0, 0b01)))})
    pair = pairs(servers=2, program=5)

    def ask() -> int:
        pair.client.sendall(GET)
        slot = 0 if not nothing(pair.servers[0]) else 1
        assert read(pair.servers[slot], len(GET)) == GET
        pair.servers[slot].sendall(OKAY)
        assert read(pair.client, len(OKAY)) == OKAY
        return slot

    asked = [ask() for _ in range(40)]
    assert set(asked) == {0, 1}
    while ask() != 0:
        pass
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert {ask() for _ in range(30)} == {0}
    two = GET.replace(b"/", b"/two", 1)
    pair.client.sendall(two)
    assert read(pair.accepted, len(two)) == two
    assert pair.punt() == "pipelined"


def test_endpoints_must_be_those_of_the_program(pairs: Pairs, programs: Programs) -> None:
    pair = pairs()
    programs.put(generation=1, endpoints=[PLACES + 7])
    pair.slow_exchange()
    assert pair.punt() == "no_slot"


def test_everything_is_counted_once(pairs: Pairs, programs: Programs, express: ExpressPath) -> None:
    programs.put(4)
    express.set_verdicts(4, programs.verdicts)
    before = express.counters()
    pair = pairs(program=4)
    body = b"b" * 100
    head = b"POST /two HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 100\r\nx-seen: yes\r\n\r\n"
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 7\r\n\r\nmissing"
    for _ in range(5):
        pair.exchange()
    for _ in range(3):
        pair.exchange(head + body, answer)
    pair.client.sendall(GET)
    pair.is_fast(GET)
    pair.server.sendall(b"nonsense")  # user space counts this one
    found = {key: stat for key, stat in express.stats().items() if key[0] == 4}
    assert set(found) == {(4, 10, 200), (4, 23, 404)}
    one, two = found[4, 10, 200], found[4, 23, 404]
    assert (one.requests, one.bytes_in, one.bytes_out) == (5, 5 * len(GET), 5 * len(OKAY))
    assert (two.requests, two.bytes_in, two.bytes_out) == (3, 3 * len(head + body), 3 * len(answer))
    assert sum(one.buckets) == 5 and sum(two.buckets) == 3 and 0 < one.ns < 5 * 10**9
    after = express.counters()
    assert after["carried"] - before["carried"] == 9
    assert after["answered"] - before["answered"] == 8
    assert after["response_head"] - before["response_head"] == 1


def test_a_program_that_is_gone_leaves_its_room_and_its_totals(pairs: Pairs, programs: Programs, express: ExpressPath) -> None:
    def stored(program: int) -> int:
        return sum(struct.unpack_from("=I", key)[0] == program for key in express._maps["xstats"])

    programs.put(8)
    express.set_verdicts(8, programs.verdicts)
    pair = pairs(program=8)
    for _ in range(3):
        pair.exchange()
    express.drop_program(8)
    express.reap()
    assert not stored(8)
    kept = express.stats()[8, 10, 200]
    assert (kept.requests, kept.bytes_out, sum(kept.buckets)) == (3, 3 * len(OKAY), 3)
    programs.put(8)
    express.set_verdicts(8, programs.verdicts)
    pair.exchange()
    express.reap()  # of one that came back nothing is moved
    assert stored(8) == 1
    found = express.stats()[8, 10, 200]
    assert (found.requests, found.bytes_in, found.bytes_out) == (4, 4 * len(GET), 4 * len(OKAY))
    assert (sum(found.buckets), found.ns > kept.ns) == (4, True)


def test_the_kernels_structs_are_small_enough(express: ExpressPath) -> None:
    formats = express.hello_layouts()
    assert struct.calcsize(formats["pl_xview"][0]) == 1024
    assert struct.calcsize(formats["pl_xarm"][0]) == 32


def test_long_heads_are_saved_whole(pairs: Pairs, world: World) -> None:
    pair = pairs()
    head = GET[:-2] + b"x-fill: " + b"f" * 970 + b"\r\n\r\n"
    pair.client.sendall(head)
    pair.is_fast(head)
    view = pair.view()
    assert view["head_len"] == len(head) > len(view["head"])
    whole = world.proxy(f"{pair.accepted_name}.getsockopt({0x50494C}, 4, 1024)")
    assert whole[: len(head)] == head
