"""Requests carried by the kernel, on real sockets: what goes fast, what must not, and that user space gets all the rest."""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from pathlib import Path

import pytest

from mesh.express import machine
from nodeagent.express_path import ExpressPath, Verdict
from tests.bpf.conftest import Pairs
from tests.bpf.express_pair import GET, HOLD, OKAY, PLACES, TAKE, Programs, nothing, read, request_table
from tests.bpf.families import Family
from tests.bpf.steps import NO_OPTION
from tests.bpf.world import TAG, World

STRANGE = b"BREW / HTTP/1.1\r\nHost: shop.test\r\n\r\n"
HEAD = GET.replace(b"GET", b"HEAD")


def post(length: int) -> bytes:
    """The head of a POST."""
    return b"POST / HTTP/1.1\r\nHost: shop.test\r\nContent-Length: %d\r\n\r\n" % length


def reply(body: bytes, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, more, len(body), body)


# ---- the latch


def test_an_armed_pair_carries_requests_and_responses(pairs: Pairs, family: Family) -> None:
    pair = pairs(family)
    for _ in range(3):
        pair.exchange()
    pair.slow_exchange(STRANGE)
    pair.exchange()


def test_after_one_slow_request_all_are_until_the_proxy_arms(pairs: Pairs, family: Family) -> None:
    pair = pairs(family)
    pair.exchange()
    pair.slow_exchange(STRANGE, arm=False)
    pair.slow_exchange(arm=False)
    assert pair.punt() == "behind"
    pair.arm()
    pair.exchange()


def test_what_the_proxy_sent_must_have_been_told_and_read(pairs: Pairs) -> None:
    pair = pairs()
    pair.slow_exchange(STRANGE, arm=False)
    sent, pair.sent = pair.sent, 0
    pair.arm()
    pair.slow_exchange(arm=False)
    assert pair.punt() == "unread"
    pair.sent += sent
    pair.arm()
    pair.exchange()


def test_an_unarmed_pair_carries_nothing(pairs: Pairs) -> None:
    pair = pairs(enrol=False)
    assert pair.enrol() == ["ok", "ok"]
    pair.settle()
    pair.slow_exchange(arm=False)
    assert pair.punt() == "not_armed"


def test_a_head_split_anywhere_goes_to_user_space(pairs: Pairs) -> None:
    pair = pairs()
    for at in range(1, len(GET)):
        pair.client.sendall(GET[:at])
        pair.client.sendall(GET[at:])
        pair.is_slow(GET)
        pair.relay(GET)
        pair.server.sendall(OKAY)
        pair.answer_slow(OKAY)
        pair.arm()
        pair.exchange()


def test_a_head_in_two_messages_is_told_apart_from_one_that_is_not_understood(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.sendall(GET[:-1])
    assert pair.punt() == "head_part"
    pair.client.sendall(GET[-1:])
    pair.is_slow(GET)
    pair.relay(GET)
    pair.server.sendall(OKAY)
    pair.answer_slow(OKAY)
    pair.arm()
    pair.slow_exchange(b"\0" + GET)
    assert pair.punt() == "head"


def test_a_head_in_several_pieces_of_one_message_is_put_together(pairs: Pairs) -> None:
    pair = pairs()
    big = reply(b"x" * 20_000)
    for at in range(1, len(GET), 5):
        pair.client.sendmsg([GET[:at], GET[at:]])
        pair.is_fast(GET)
        pair.server.sendmsg([big[:at], big[at : at + 7000], big[at + 7000 :]])
        assert read(pair.client, len(big)) == big


def test_heads_cross_the_pages_they_are_kept_in(pairs: Pairs) -> None:
    """A sender's small messages share pages: one in some hundred lies on two."""
    pair = pairs()
    head = GET[:-2] + b"x-fill: " + b"f" * 700 + b"\r\n\r\n"
    for _ in range(150):
        pair.exchange(head, reply(b"y" * 333))


def test_a_head_may_fill_the_window_and_not_exceed_it(pairs: Pairs) -> None:
    pair = pairs()
    fill = 1024 - len(GET) - len("x-fill: \r\n")
    pair.exchange(GET[:-2] + b"x-fill: " + b"f" * fill + b"\r\n\r\n")
    pair.slow_exchange(GET[:-2] + b"x-fill: " + b"f" * (fill + 1) + b"\r\n\r\n")
    assert pair.punt() == "head_long"
    body = b"z" * 100
    pair.exchange(post(100)[:-2] + b"x-fill: " + b"f" * 900 + b"\r\n\r\n" + body)  # the body past the window


@pytest.mark.parametrize("special", [0, 9, 10, 13, 0x1F, 0x20, 0x7E, 0x7F, 0x80, 0xFF])
def test_a_value_read_eight_bytes_at_a_time_is_read_as_byte_by_byte(pairs: Pairs, special: int) -> None:
    pair, table = pairs(), request_table()
    for length in (7, 8, 24):
        for at in range(length):
            value = bytearray(b"v" * length)
            value[at] = special
            head = GET[:-2] + b"x-fill: " + value + b"\r\nx-seen: 1\r\n\r\n"
            if machine.run(table, head) is not None:
                pair.exchange(head)
            else:
                pair.slow_exchange(head)
                assert pair.punt() == "head"


# ---- bodies of requests


def test_bodies_go_with_their_heads(pairs: Pairs) -> None:
    pair = pairs()
    body = b"GET /two HTTP/1.1\r\nHost: shop.test\r\n\r\n"
    head = post(len(body))
    pair.exchange(head + body)
    for at in range(len(head), len(head) + len(body)):
        whole = head + body
        pair.client.sendall(whole[:at])
        pair.is_fast(whole[:at])
        pair.client.sendall(whole[at:])
        pair.is_fast(whole[at:])
        pair.server.sendall(OKAY)
        assert read(pair.client, len(OKAY)) == OKAY


def test_a_message_moves_as_a_whole_or_not_at_all(pairs: Pairs, world: World) -> None:
    """Where the receiver's memory is at its limit, the kernel would move the first pieces of one, and come back with the rest
    as if that were a message of its own."""
    limits = Path("/sys/fs/cgroup/memory")
    if not (limits / "memory.kmem.tcp.limit_in_bytes").exists():
        return  # only cgroup v1 can be told how much memory TCP has
    pid = world.b("os.getpid()")
    (former,) = re.findall(r"^\d+:memory:(.*)$", Path(f"/proc/{pid}/cgroup").read_text(), re.M)
    group = limits / f"{TAG}-tcp"
    group.mkdir()
    limit = group / "memory.kmem.tcp.limit_in_bytes"
    try:
        limit.write_text(str(64 << 20))
        (group / "cgroup.procs").write_text(str(pid))
        pair = pairs()
        whole = post(60_000) + b"b" * 60_000
        pair.exchange(whole)
        limit.write_text(str(int((group / "memory.kmem.tcp.usage_in_bytes").read_text()) + (32 << 10)))
        with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
            pair.client.sendall(whole)
        assert nothing(pair.server) and nothing(pair.accepted)
    finally:
        (limits / former.lstrip("/") / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def test_a_body_in_single_bytes(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.sendall(post(20))
    for number in range(20):
        assert pair.view()["req_left"] == 20 - number
        pair.client.sendall(b"%d" % (number % 10))
    pair.is_fast(post(20) + b"01234567890123456789")
    pair.server.sendall(OKAY)
    assert read(pair.client, len(OKAY)) == OKAY


def test_large_bodies_go_to_user_space(pairs: Pairs) -> None:
    pair = pairs()
    pair.exchange(post(65536) + b"b" * 65536)
    pair.client.sendall(post(65537))
    pair.is_slow(post(65537))
    assert pair.punt() == "body"


def test_a_request_behind_a_body_is_not_taken_for_body(pairs: Pairs) -> None:
    pair = pairs()
    whole = post(5) + b"12345" + GET
    pair.client.sendall(whole)
    pair.is_slow(whole)
    assert pair.punt() == "pipelined"


def test_a_request_in_the_last_message_of_a_body_hands_over(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.sendall(post(5) + b"12")
    pair.is_fast(post(5) + b"12")
    pair.client.sendall(b"345" + GET)
    pair.is_slow(b"345" + GET)
    view = pair.view()
    assert (view["busy"], view["handed"], view["handed_slow"], view["phase"], view["req_left"]) == (1, 1, 0, 1, 3)
    pair.relay(b"345")
    pair.server.sendall(OKAY)
    pair.answer_slow(OKAY)
    pair.say(TAKE)
    pair.relay(GET)
    pair.server.sendall(OKAY)
    pair.answer_slow(OKAY)
    pair.arm()
    pair.exchange()


def test_a_punted_heads_body_is_no_request(pairs: Pairs) -> None:
    """security.md 2"""
    pair = pairs()
    for head in (
        b"POST / HTTP/1.1\r\nHost: shop.test\r\nTransfer-Encoding: chunked\r\n\r\n",
        post(4)[:-2] + b"Expect: 1\r\nX\r\n\r\n",
    ):
        pair.client.sendall(head)
        pair.client.sendall(GET)
        pair.is_slow(head + GET)
        pair.relay(head + GET)
        pair.server.sendall(OKAY)
        pair.answer_slow(OKAY)
        pair.arm()
        pair.exchange()


def test_pipelined_requests_are_answered_in_order_by_user_space(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.sendall(GET)
    pair.is_fast(GET)
    second = GET.replace(b"/", b"/two", 1)
    pair.client.sendall(second)
    pair.is_slow(second)
    assert pair.view()["flags"] == HOLD
    pair.server.sendall(OKAY)
    view = pair.view()
    assert (view["busy"], view["handed"], view["phase"], view["handed_slow"], view["resp_bytes"]) == (1, 1, 2, 0, 0)
    assert view["head"][: view["head_len"]] == GET
    pair.answer_slow(OKAY)
    pair.say(TAKE)
    pair.relay(second)
    pair.server.sendall(OKAY)
    pair.answer_slow(OKAY)
    pair.arm()
    pair.exchange()


# ---- responses


@pytest.mark.parametrize(
    ("request_", "response", "fast"),
    [
        (GET, reply(b""), True),
        (GET, reply(b"x" * 1000, b"404 Not Found"), True),
        (GET, reply(b"x", b"500 Oops"), True),
        (GET, reply(b"x", b"503 Busy"), False),
        (GET, reply(b"x", b"502 Bad"), False),
        (GET, reply(b"x", b"504 Late"), False),
        (GET, reply(b"x", b"505 Other Version"), True),
        (GET, reply(b"x", b"451 By Law"), True),
        (GET, reply(b"x", b"299 Made Up"), False),  # as many of them as there are would take the others' room to be counted
        (GET, reply(b"x", b"450 Made Up"), False),
        (GET, reply(b"x", b"599 Made Up"), False),
        (GET, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", False),
        (GET, b"HTTP/1.1 200 OK\r\n\r\nuntil the end", False),
        (GET, b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (GET, b"HTTP/1.1 100 Continue\r\n\r\n" + OKAY, False),
        (GET, b"HTTP/1.1 103 Early Hints\r\n\r\n", False),
        (GET, b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n", True),
        (GET, b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n", True),
        (HEAD, b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", True),
        (HEAD, b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n", True),
        (GET, reply(b"x", more=b"Connection: close\r\n"), False),
        (GET, reply(b"x", more=b"Connection: keep-alive\r\n"), True),
        (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", False),
        (GET, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", False),
        (GET, b"nonsense", False),
    ],
)
def test_responses(pairs: Pairs, request_: bytes, response: bytes, fast: bool) -> None:
    pair = pairs()
    if fast:
        pair.exchange(request_, response)
        pair.exchange()
        return
    pair.client.sendall(request_)
    pair.is_fast(request_)
    pair.server.sendall(response[:30])
    pair.server.sendall(response[30:])
    assert read(pair.upstream, len(response)) == response
    assert nothing(pair.client)
    view = pair.view()
    assert (view["busy"], view["handed"], view["phase"], view["handed_slow"]) == (1, 1, 2, 0)
    assert view["head"][: view["head_len"]] == request_
    assert view["method_head"] == (request_ is HEAD)


def test_a_response_head_split_anywhere_is_handed_over(pairs: Pairs) -> None:
    pair = pairs()
    for at in range(1, OKAY.index(b"\r\n\r\n") + 4):
        pair.client.sendall(GET)
        pair.is_fast(GET)
        pair.server.sendall(OKAY[:at])
        pair.server.sendall(OKAY[at:])
        pair.answer_slow(OKAY)
        pair.say(TAKE)
        pair.arm()
        pair.exchange()


def test_a_response_body_in_pieces(pairs: Pairs) -> None:
    pair = pairs()
    body = bytes(range(256)) * 200
    whole = reply(body)
    head = len(whole) - len(body)
    for sizes in ((head, 1, 2, 10_000, 50_000), (head + 5, 60_000), (head, 51_200)):
        pair.client.sendall(GET)
        pair.is_fast(GET)
        at = 0
        for size in sizes:
            pair.server.sendall(whole[at : at + size])
            at += size
        assert read(pair.client, len(whole)) == whole
        assert pair.view()["busy"] == 0


def test_a_body_by_sendfile(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs()
    body = bytes(range(256)) * 512
    (tmp_path / "body").write_bytes(body)
    whole = reply(body)
    with (tmp_path / "body").open("rb") as file:
        for _ in range(3):
            pair.client.sendall(GET)
            pair.is_fast(GET)
            pair.server.sendall(whole[: -len(body)], socket.MSG_MORE)
            at = 0
            while at < len(body):
                at += os.sendfile(pair.server.fileno(), file.fileno(), at, len(body) - at)
            assert read(pair.client, len(whole)) == whole
            assert pair.view()["busy"] == 0


def test_the_budget_of_a_response(pairs: Pairs) -> None:
    pair = pairs()
    room = 262144 - len(reply(b"")) - 5
    pair.exchange(GET, reply(b"b" * room))
    pair.client.sendall(GET)
    pair.is_fast(GET)
    pair.server.sendall(reply(b"b" * (room + 1))[:500])
    assert len(read(pair.upstream, 500)) == 500
    assert pair.punt() == "response_budget"


@pytest.mark.parametrize("at", [0, 1, len(OKAY) - 2, len(OKAY) - 1, len(OKAY), len(OKAY) + 5])
def test_bytes_behind_a_response_reach_the_proxy_alone(pairs: Pairs, at: int) -> None:
    """security.md 3"""
    pair = pairs()
    whole = OKAY + b"HTTP/1.1 200 OK"
    pair.client.sendall(GET)
    pair.is_fast(GET)
    for part in (whole[:at], whole[at:]):
        if part:
            pair.server.sendall(part)
    pair.client.settimeout(0.1)
    seen = b""
    try:
        while True:
            seen += pair.client.recv(100)
    except TimeoutError:
        assert OKAY.startswith(seen)
    assert read(pair.upstream, len(whole) - len(seen)) == whole[len(seen) :]
    pair.client.sendall(GET)
    pair.is_slow(GET)


def test_an_unasked_response_reaches_no_client(pairs: Pairs, express: ExpressPath) -> None:
    """security.md 3"""
    pair = pairs()
    before = express.counters()["unasked"]
    pair.server.sendall(OKAY)
    assert nothing(pair.client)
    assert read(pair.upstream, len(OKAY)) == OKAY
    assert express.counters()["unasked"] == before + 1
    pair.client.sendall(GET)
    pair.is_slow(GET)
    assert pair.punt() == "dirty"


def test_only_the_server_that_was_asked_answers(pairs: Pairs, programs: Programs, express: ExpressPath) -> None:
    """security.md 3"""
    programs.put(endpoints=[PLACES, PLACES + 1])
    express.set_verdicts(1, {(1, 0): Verdict(1, ((1, 0b01),))})
    pair = pairs(servers=2)
    pair.client.sendall(GET)
    pair.is_fast(GET)
    pair.servers[1].sendall(reply(b"evil"))
    assert nothing(pair.client)
    pair.server.sendall(OKAY)
    assert read(pair.client, len(OKAY)) == OKAY
    assert nothing(pair.client)
    assert read(pair.upstreams[1], 4) == b"HTTP"


def test_bytes_that_arm_did_not_know_of_are_told(pairs: Pairs) -> None:
    """The server wrote unasked, unseen by a proxy that armed again: what it says next is not taken for an answer."""
    pair = pairs()
    pair.server.sendall(b"unasked")
    pair.arm()
    pair.client.sendall(GET)
    pair.is_fast(GET)
    pair.server.sendall(OKAY)
    assert nothing(pair.client)
    view = pair.view()
    assert (view["handed"], view["handed_slow"]) == (1, 7)


def test_a_server_that_answers_early(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.sendall(post(10) + b"12345")
    pair.is_fast(post(10) + b"12345")
    pair.server.sendall(OKAY)
    assert pair.punt() == "early"
    assert read(pair.upstream, len(OKAY)) == OKAY
    pair.client.sendall(b"67890")
    pair.is_slow(b"67890")
    assert pair.view()["req_left"] == 5


# ---- order


@pytest.mark.parametrize("size", [100_000, 300_000, 5_000_000])
def test_the_next_request_before_a_slow_reply_is_read(pairs: Pairs, size: int) -> None:
    pair = pairs()
    body = bytes(index * 7 % 251 for index in range(size))
    pair.client.sendall(STRANGE)
    pair.is_slow(STRANGE)
    pair.accepted.settimeout(0.3)
    written = 0
    try:
        while written < size:  # as much as fits while nobody reads
            written += pair.accepted.send(body[written : written + 65536])
    except TimeoutError:
        pass
    pair.sent += written
    pair.arm()
    assert read(pair.client, 10) == body[:10]
    pair.client.sendall(GET)
    pair.is_slow(GET)
    assert pair.punt() == "unread"
    assert read(pair.client, written - 10) == body[10:written]
    pair.arm()
    pair.exchange()


def test_the_next_request_before_a_fast_reply_is_read(pairs: Pairs) -> None:
    pair = pairs()
    whole = reply(b"f" * 200_000)
    pair.client.sendall(GET)
    pair.is_fast(GET)
    pair.server.sendall(whole)
    assert read(pair.client, 100) == whole[:100]
    pair.client.sendall(GET)
    pair.is_slow(GET)
    assert pair.punt() == "unread"
    pair.relay(GET)
    pair.server.sendall(OKAY)
    assert read(pair.upstream, len(OKAY)) == OKAY
    pair.accepted.sendall(OKAY)
    pair.up_consumed[0] += len(OKAY)
    pair.sent += len(OKAY)
    assert read(pair.client, len(whole) - 100 + len(OKAY)) == whole[100:] + OKAY
    pair.arm()
    pair.exchange()


def test_a_server_that_has_not_read_all_gets_nothing_ahead_of_it(pairs: Pairs) -> None:
    pair = pairs()
    slow = STRANGE + b"and a body that the server leaves"
    pair.client.sendall(slow)
    pair.is_slow(slow)
    pair.upstream.sendall(slow)
    pair.up_sent[0] += len(slow)
    assert read(pair.server, 10) == slow[:10]
    pair.server.sendall(OKAY)
    pair.answer_slow(OKAY)
    pair.arm()
    pair.client.sendall(GET)
    assert nothing(pair.client)
    assert read(pair.accepted, len(GET)) == GET
    assert pair.punt() == "unclean"
    pair.upstream.sendall(GET)
    assert read(pair.server, len(slow) - 10 + len(GET)) == slow[10:] + GET


# ---- what else sends requests to user space


def test_held_pairs_hand_over(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.sendall(GET)
    pair.is_fast(GET)
    pair.say(HOLD)
    pair.server.sendall(OKAY)
    pair.answer_slow(OKAY)
    assert pair.view()["handed"] == 1
    with pytest.raises(PermissionError):
        pair.arm()  # refused while busy
    pair.say(TAKE)
    pair.arm()
    pair.exchange()
    pair.say(HOLD)
    pair.slow_exchange()
    pair.exchange()


def test_held_in_the_middle_of_a_response(pairs: Pairs) -> None:
    pair = pairs()
    whole = reply(b"r" * 1000)
    pair.client.sendall(GET)
    pair.is_fast(GET)
    pair.server.sendall(whole[:500])
    assert read(pair.client, 500) == whole[:500]
    pair.say(HOLD)
    pair.server.sendall(whole[500:])
    view = pair.view()
    assert (view["phase"], view["resp_bytes"], view["resp_left"], view["status"]) == (3, 500, len(whole) - 500, 200)
    pair.answer_slow(whole[500:])


def test_another_generation_stops_the_very_next_request(pairs: Pairs, world: World, programs: Programs) -> None:
    pair = pairs()
    pair.exchange()
    world.bump()
    pair.slow_exchange()
    assert pair.punt() == "generation"
    programs.put(generation=world.config["generation"])
    pair.exchange()
    pair.client.sendall(GET)
    pair.is_fast(GET)
    world.bump()
    pair.server.sendall(OKAY)
    assert nothing(pair.client)
    assert pair.view()["handed"] == 1


def test_without_a_lease_nothing_goes_fast(pairs: Pairs, world: World) -> None:
    pair = pairs()
    world.configure(lease_until_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 10**10)
    pair.exchange()
    world.configure(lease_until_ns=1)
    pair.slow_exchange()
    assert pair.punt() == "lease"


def test_no_verdict_is_user_spaces(pairs: Pairs) -> None:
    pair = pairs()
    pair.slow_exchange(GET.replace(b"/", b"/no", 1))
    assert pair.punt() == "verdict"
    pair.exchange(GET.replace(b"/", b"/two", 1))


def test_a_header_twice_where_it_must_be_once(pairs: Pairs) -> None:
    pair = pairs()
    pair.slow_exchange(GET.replace(b"\r\n\r\n", b"\r\nHost: evil.test\r\n\r\n"))
    assert pair.punt() == "head"


def test_a_sample_goes_to_user_space(pairs: Pairs, programs: Programs) -> None:
    programs.put(sample=65536)
    pair = pairs()
    pair.slow_exchange()
    assert pair.punt() == "sample"
    programs.put(sample=0)
    pair.exchange()


def test_the_rate_of_a_program(pairs: Pairs, programs: Programs) -> None:
    programs.put(2, rate_per_s=1, burst=3)
    programs.path.set_verdicts(2, programs.verdicts)
    pair = pairs(program=2)
    for _ in range(3):
        pair.exchange()
    pair.slow_exchange()
    assert pair.punt() == "rate"


def test_a_forgotten_record_is_out_of_use_at_once(pairs: Pairs, express: ExpressPath) -> None:
    pair = pairs()
    pair.client.sendall(GET)
    pair.is_fast(GET)
    express.forget_record(pair.record)
    pair.server.sendall(OKAY)
    pair.answer_slow(OKAY)
    express.reap()
    assert express.read_record(pair.record) is None
    with pytest.raises(OSError, match=NO_OPTION):
        pair.view()
    pair.slow_exchange(arm=False)


def test_a_dropped_program(pairs: Pairs, express: ExpressPath) -> None:
    pair = pairs()
    express.drop_program(1)
    pair.slow_exchange()
    assert pair.punt() == "generation"


def test_a_server_that_is_gone(pairs: Pairs) -> None:
    pair = pairs()
    pair.server.close()
    pair.servers.clear()
    pair.client.sendall(GET)
    pair.is_slow(GET)
    assert pair.punt() == "target_gone"
    assert pair.upstream.recv(1) == b""


def test_a_client_that_is_gone(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.sendall(GET)
    pair.is_fast(GET)
    pair.client.close()
    pair.server.sendall(OKAY)
    assert read(pair.upstream, len(OKAY)) == OKAY
    assert pair.view()["handed"] == 1
    pair.client = socket.socket()


def test_half_closed_clients_get_their_response(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.sendall(GET)
    pair.is_fast(GET)
    pair.client.shutdown(socket.SHUT_WR)
    assert pair.accepted.recv(1) == b""
    pair.server.sendall(OKAY)
    assert read(pair.client, len(OKAY)) == OKAY
