"""The kernel over heads that are like the one before, of which it takes eight bytes at a time: as the table has it, each time."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from random import Random

import pytest

from mesh.express import machine
from mesh.express.dfa import Table
from nodeagent.express_path import ExpressPath
from tests.bpf.conftest import Pairs
from tests.bpf.express_pair import GET, OKAY, Pair, Programs, read, request_table

SEED, HEADS, SAMPLED_OF = 7, 400, 6000
LONG = b"-then-a-name-that-goes-on"  # so that what is before it, and no colon, fills eight bytes
BASE = (
    b"GET /two HTTP/1.1\r\nHost: shop.test\r\nUser-Agent: some/1.0 (text; more)\r\nx-seen: 1\r\nAccept: */*\r\n"
    b"Content-Length: 0\r\nx-fill: " + b"f" * 60 + b"\r\n\r\n"
)
VERDICTS = {(rule, seen) for rule in (1, 2) for seen in range(4)}  # Programs.verdicts
NEAR = (
    b"GET ",
    b"POST ",
    b"HEAD ",
    b"/two ",
    b"/ ",
    b"/no ",
    b"x-seen",
    b"x-soon",
    b"Host",
    b"host",
    b"\r\n",
    b"\n",
    b"0",
    b"00",
)


def changed(random: Random, head: bytes) -> bytes:
    """Nearly the same head."""
    kind, at = random.randrange(5), random.randrange(len(head))
    if kind == 0:
        return head[:at] + bytes((random.randrange(256),)) + head[at + 1 :]
    if kind == 1:
        return head[:at] + head[at + random.randrange(1, 9) :]
    if kind == 2:
        return head[:at] + random.choice(NEAR) + head[at:]
    if kind == 3:
        old, new = random.choice(NEAR), random.choice(NEAR)
        return head.replace(old, new, 1)
    return head[:at].swapcase() + head[at:]


def random_places(length: int) -> list[int]:
    """A few of a head of this length, its ends among them."""
    return [0, length - 1, length - 17, *Random(length).sample(range(1, length - 1), 5)]


def met(pair: Pair, table: Table, head: bytes) -> bool:
    """Sends the head, answers it; whether it went fast. What the kernel read in it must be what the table says."""
    run = machine.run(table, head)
    if run is None or run.end != len(head) or run.length or (run.rule, run.seen) not in VERDICTS:
        pair.slow_exchange(head)
        return False
    pair.client.sendall(head)
    pair.is_fast(head)
    _, *registers = struct.unpack("=8I", pair.end(pair.client)["reg"])
    assert registers[:4] == [run.rule | machine.HEAD_METHOD * run.head, run.once, run.length, run.seen]
    response = OKAY[:-2] if run.head else OKAY
    pair.server.sendall(response)
    assert read(pair.client, len(response)) == response
    return True


def test_heads_like_the_one_before_are_read_as_the_table_does(pairs: Pairs) -> None:
    random, table = Random(SEED), request_table()
    pair = pairs()
    fast = 0
    head = BASE
    for _ in range(HEADS):
        other = changed(random, head)
        fast += met(pair, table, other)
        fast += met(pair, table, head)
        fast += met(pair, table, head)
        if machine.run(table, other) is not None and 40 < len(other) < 400:
            head = other
        elif random.random() < 0.05:
            head = BASE
    assert HEADS * 2 < fast < HEADS * 3


def test_the_same_bytes_in_the_same_place_may_mean_something_else(pairs: Pairs, programs: Programs, express: ExpressPath) -> None:
    name = b"x-seen" + LONG
    table = request_table(name)
    base = express.install(table)
    pair = pairs()
    programs.put(root=table.root_at(base))
    for pad in range(8):
        field = GET[:-2] + b"x-fill: " + b"1" * pad + b"\r\n" + name + b": 1\r\n\r\n"
        value = field.replace(b"\r\n" + name, b"ab" + name)
        for head in (value, value, field, field, value, field):
            assert met(pair, table, head)
    express.drop_program(1)
    express.release(base)
    express.reap()


def test_what_was_read_by_a_former_program_is_forgotten(pairs: Pairs, programs: Programs, express: ExpressPath) -> None:
    """Its rows may be another table's by then: under the same generation, in the same place."""
    former, later = request_table(b"x-seen" + LONG), request_table(b"x-soon" + LONG)
    assert len(former.rows) == len(later.rows) != len(request_table().rows)
    base = express.install(former)
    programs.put(root=former.root_at(base))
    pair = pairs()
    programs.put(root=former.root_at(base))
    express.set_verdicts(1, {(1, 0): programs.verdicts[1, 0]})
    head = GET[:-2] + b"x-seen" + LONG + b": 1\r\n\r\n"
    for _ in range(3):
        pair.slow_exchange(head)
        assert pair.punt() == "verdict"
    express.drop_program(1)
    express.release(base)
    express.reap()
    assert express.install(later) == base
    express.set_verdicts(1, {(1, 0): programs.verdicts[1, 0]})
    programs.put(root=later.root_at(base))
    try:
        pair.exchange(head)
        pair.exchange(head)
    finally:
        express.drop_program(1)
        express.release(base)
        express.reap()


def test_one_byte_more_or_less_of_a_known_head_is_seen(pairs: Pairs) -> None:
    """A head like the last one, byte for byte, is not walked; any other is."""
    pair, table = pairs(), request_table()
    for length in range(len(GET) + 18, len(GET) + 35):  # its last bytes lie differently each time
        head = GET[:-2] + b"x-fill: " + b"f" * (length - len(GET) - 10) + b"\r\n\r\n"
        assert met(pair, table, head) and met(pair, table, head)
        assert pair.view()["head"][: len(head)] == head
        for at in random_places(length):
            other = head[:at] + bytes((head[at] ^ 1,)) + head[at + 1 :]
            if met(pair, table, other):
                assert pair.view()["head"][: len(other)] == other
            assert met(pair, table, head)
            assert pair.view()["head"][: len(head)] == head


def test_a_known_head_behind_other_bytes_and_before_them(pairs: Pairs) -> None:
    pair, table = pairs(), request_table()
    post = b"POST / HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 4\r\n\r\n"
    for body in (b"body", b"GET ", b"\r\n\r\n"):
        pair.exchange(post + body)
    assert met(pair, table, GET)
    pair.client.sendall(GET + GET)  # of what is behind a head, the head says nothing
    pair.is_slow(GET + GET)
    assert pair.punt() == "pipelined"
    pair.client.sendall(GET[:-1])
    pair.is_slow(GET[:-1])


def test_each_head_is_judged_by_itself(pairs: Pairs) -> None:
    """The verdict on the last one holds for the same bytes alone."""
    pair = pairs()
    for path, name in ((b"/", 10), (b"/", 10), (b"/two", 20), (b"/no", 0), (b"/no", 0), (b"/two", 20), (b"/", 10)):
        head = GET.replace(b"/", path, 1)
        if name:
            pair.exchange(head)
            assert pair.view()["rule"] == name
        else:
            pair.slow_exchange(head)
            assert pair.punt() == "verdict"


def test_what_was_judged_by_a_former_program_is_judged_anew(pairs: Pairs, programs: Programs, express: ExpressPath) -> None:
    pair = pairs()
    for name in (7, 8):
        express.drop_program(1)
        express.set_verdicts(1, {(1, 0): programs.verdicts[1, 0]._replace(name=name)})
        programs.put()
        for _ in range(2):
            pair.exchange()
            assert pair.view()["rule"] == name
    express.drop_program(1)
    express.set_verdicts(1, {(2, 0): programs.verdicts[2, 0]})
    programs.put()
    pair.slow_exchange()
    assert pair.punt() == "verdict"


def test_no_program_has_anothers_stamp(programs: Programs, express: ExpressPath) -> None:
    programs.put(2)
    programs.put(3)
    programs.put(2)
    layout, found = express._layouts["pl_xprogram"], express._maps["xprograms"]
    stamps = [layout.unpack(found.get(index.to_bytes(4, "little")) or b"")["stamp"] for index in (3, 2, 0)]
    assert stamps[0] + 1 == stamps[1] == stamps[2] > 2
    express.drop_program(2)
    express.drop_program(3)
    express._start_afresh()
    programs.put(2)
    assert layout.unpack(found.get((2).to_bytes(4, "little")) or b"")["stamp"] == stamps[2] + 1
    express.drop_program(2)


@pytest.fixture
def one_cpu() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_cpu")  # each CPU has rows of its own: a sender that moves breaks them off
def test_requests_are_sampled_several_in_a_row(pairs: Pairs, programs: Programs) -> None:
    programs.put(sample=8192)
    pair = pairs()
    slow, runs, before = 0, 0, False
    for _ in range(SAMPLED_OF):
        pair.client.sendall(GET)
        sampled = pair.punt() == "sample" and not pair.view()["busy"]
        if sampled:
            pair.is_slow(GET)
            pair.relay(GET)
            pair.server.sendall(OKAY)
            pair.answer_slow(OKAY)
            pair.arm()
            runs += not before
        else:
            pair.is_fast(GET)
            pair.server.sendall(OKAY)
            assert read(pair.client, len(OKAY)) == OKAY
        slow, before = slow + sampled, sampled
    assert SAMPLED_OF / 32 < slow < SAMPLED_OF / 4  # of the eighth that was asked for, in some 40 runs
    assert slow / runs > 8
