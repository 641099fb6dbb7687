"""Pairs under load while everything about them changes: no response is lost, doubled, or another request's."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
import threading
import time

from nodeagent.express_path import ExpressPath, Verdict
from tests.bpf.conftest import Pairs
from tests.bpf.express_pair import EXPRESS, PLACES, Pair, Programs
from tests.bpf.world import LEVEL, World

PAIRS, REQUESTS, SERVERS = 3, 3000, 2
VERIFIED_MAX = 500_000  # instructions; the kernel walks a million, and other compilers and kernels need more
INFO_BYTES, VERIFIED_AT = 256, 216  # struct bpf_prog_info, verified_insns

# The proxy in small, for one pair: relays what comes to it, and tells the kernel. Runs in the proxy's cgroup.
PROXY = """
def relay(accepted, ups, view_format, view_fields, arm_format):
    import re, select, struct
    accepted.setblocking(True)
    consumed = sent = 0
    up_sent, up_consumed, turn = [0] * len(ups), [0] * len(ups), 0
    poll = select.poll()
    for sock in (accepted, *ups):
        poll.register(sock, select.POLLIN)
    def view():
        raw = accepted.getsockopt({level}, {express}, 1024)
        return dict(zip(view_fields, struct.unpack(view_format, raw)))
    def say(op, slot=0xffffffff):
        more = (up_sent[slot], up_consumed[slot]) if slot < len(ups) else (0, 0)
        accepted.setsockopt({level}, {express}, struct.pack(arm_format, op, slot, consumed, sent, *more, bytes(8)))
    def answer(slot):
        nonlocal sent
        data = b""
        while not data.endswith(b"!"):
            part = ups[slot].recv(65536)
            if not part:
                return False
            data += part
        up_consumed[slot] += len(data)
        accepted.sendall(data)
        sent += len(data)
        return True
    for slot in range(len(ups)):
        say(1, slot)
    while True:
        poll.poll()
        now = view()
        if now["busy"]:
            if not now["handed"]:
                continue
            slot = now["busy"] - 1
            if not answer(slot):
                return
            say(3)
            say(1, slot)
            continue
        try:
            data = accepted.recv(65536, 0x40)
        except BlockingIOError:
            continue  # what woke us went fast meanwhile
        if not data:
            return
        while not data.endswith(b"\\r\\n\\r\\n"):
            data += accepted.recv(65536)
        consumed += len(data)
        turn = (turn + 1) % len(ups)
        ups[turn].sendall(data)
        up_sent[turn] += len(data)
        if not answer(turn):
            return
        say(1, turn)

def relay_told(*args):
    try:
        relay(*args)
    except BaseException as error:
        faults.append(repr(error))
faults = []
"""


def ask(pair: Pair, count: int, faults: list[str]) -> None:
    """Requests in turn, each with its number; its response must carry it."""
    try:
        for number in range(count):
            pair.client.sendall(b"GET / HTTP/1.1\r\nHost: shop.test\r\nx-number: %d\r\n\r\n" % number)
            got = b""
            while not got.endswith(b"!"):
                part = pair.client.recv(65536)
                assert part, "the end of the stream"
                got += part
            wanted = b"%d!" % number
            assert got.endswith(b"\r\n\r\n" + wanted) and got.count(b"HTTP/1.1") == 1, (number, got)
    except (OSError, AssertionError) as error:
        faults.append(f"client {pair.number}: {error!r}")


def serve(sock: socket.socket) -> None:
    """Answers with the request's number, its length in a head of its own now and then."""
    sock.settimeout(30)
    try:
        while True:
            data = b""
            while not data.endswith(b"\r\n\r\n"):
                part = sock.recv(65536)
                if not part:
                    return
                data += part
            found = re.search(rb"x-number: (\d+)", data)
            assert found and data.count(b"GET /") == 1, data
            body = found[1] + b"!"
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
            if int(found[1]) % 7:
                sock.sendall(head + body)
            else:
                sock.sendall(head)
                sock.sendall(body)
    except OSError:
        return


def test_policy_and_programs_change_all_the_time(pairs: Pairs, world: World, programs: Programs, express: ExpressPath) -> None:
    endpoints = [PLACES + slot for slot in range(SERVERS)]
    programs.put(6, endpoints=endpoints)
    express.set_verdicts(6, {(1, 0): Verdict(1, ((1, 0b11),))})
    made = [pairs(servers=SERVERS, program=6) for _ in range(PAIRS)]
    before = express.counters()
    world.proxy(PROXY.format(level=LEVEL, express=EXPRESS).replace("{{", "{").replace("}}", "}"))
    world.proxy("import threading")
    view, arm = express.hello_layouts()["pl_xview"], express.hello_layouts()["pl_xarm"]
    for pair in made:
        for slot, upstream in enumerate(pair.upstreams):
            world.proxy.give(f"ups{pair.number}_{slot}", upstream)
        ups = ", ".join(f"ups{pair.number}_{slot}" for slot in range(SERVERS))
        for sock in (*pair.upstreams, pair.accepted):
            sock.settimeout(None)
        world.proxy(f"for s in ({ups}): s.setblocking(True)")
        args = f"({pair.accepted_name}, [{ups}], {view[0]!r}, {view[1]!r}, {arm[0]!r})"
        world.proxy(f"threading.Thread(target=relay_told, args={args}, daemon=True).start()")
    faults: list[str] = []
    servers = [threading.Thread(target=serve, args=(server,), daemon=True) for pair in made for server in pair.servers]
    clients = [threading.Thread(target=ask, args=(pair, REQUESTS, faults), daemon=True) for pair in made]
    for pair in made:
        pair.client.settimeout(20)
    for thread in (*servers, *clients):
        thread.start()
    turns = 0
    end = time.monotonic() + 60
    while any(thread.is_alive() for thread in clients) and time.monotonic() < end:
        turns += 1
        world.bump()
        time.sleep(0.002)
        express.set_verdicts(6, {(1, 0): Verdict(turns % 1000, ((1, 0b11),))})
        programs.put(6, generation=world.config["generation"], endpoints=endpoints)
        if turns % 20 == 0:
            express.forget_record(express.create_record(6, 1))
            express.reap()
        time.sleep(0.01)
    assert not faults and not world.proxy("faults"), (faults, world.proxy("faults"))
    assert not any(thread.is_alive() for thread in clients), "a client waits for ever"
    after = express.counters()
    carried = after["carried"] - before["carried"]
    assert turns > 10 and after["generation"] > before["generation"]
    assert carried > PAIRS * REQUESTS // 3, {name: after[name] - before[name] for name in after if after[name] != before[name]}
    for pair in made:
        pair.client.shutdown(socket.SHUT_WR)


def test_the_verifier_does_not_walk_near_its_limit(world: World, express: ExpressPath) -> None:
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    walked = {}
    for path in (world.fs / "express").iterdir():
        fd = libbpf.bpf_obj_get(os.fsencode(path))
        info, size = ctypes.create_string_buffer(INFO_BYTES), ctypes.c_uint(INFO_BYTES)
        assert not libbpf.bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size))
        os.close(fd)
        (walked[path.name],) = struct.unpack_from("=I", info.raw, VERIFIED_AT)
    assert walked["express"] and all(count < VERIFIED_MAX for count in walked.values()), walked  # 6.1 does not tell of each kind
