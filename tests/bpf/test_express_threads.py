"""Several threads inside send() on one connection that the kernel carries. It lets go of the sender's socket before it queues
what it redirects at the receiver's: what another thread sends meanwhile must not come before it."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fcntl import ioctl
from functools import wraps

import pytest

from nodeagent.express_ops import _Opts
from nodeagent.express_path import ExpressPath
from nodeagent.libbpf import libbpf
from tests.bpf.conftest import Pairs
from tests.bpf.express_pair import GET, HOLD, OKAY, Pair, nothing, read
from tests.bpf.world import wait_for

STRANGE = b"BREW / HTTP/1.1\r\nHost: shop.test\r\n\r\n"
DENIED = b"GET /no HTTP/1.1\r\nHost: shop.test\r\n\r\n"
HEAD = b"POST / HTTP/1.1\r\nHost: shop.test\r\nContent-Length: %d\r\n\r\n" % len(DENIED)
_USERFAULTFD, _MISSING, _FEATURES = 323, 1, 0xAA  # linux/userfaultfd.h
_API, _REGISTER, _WAKE = 0xC018AA3F, 0xC020AA00, 0x8010AA02
INSIDE, TORN, ANSWERING = 4, 8, 16  # enum pl_xflag
READ = "0"  # the system call's number
TRIES = 5
TOLD_TWICE = 100_000  # times; one in ten thousand is at the same time
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def state(thread: threading.Thread) -> str:
    """As ps shows it."""
    with open(f"/proc/self/task/{thread.native_id}/stat") as place:
        return place.read().rpartition(")")[2].split()[0]


def call_of(thread: threading.Thread) -> str:
    """The system call it sleeps in: one that waits for the interpreter is in another, and does not stay."""
    with open(f"/proc/self/task/{thread.native_id}/syscall") as place:
        return place.read().split()[0]


def gone(thread: threading.Thread) -> bool:
    """The kernel's task, not Python's thread alone."""
    return not os.path.exists(f"/proc/self/task/{thread.native_id}")


class Started(threading.Thread):
    """A call on a thread of its own, perhaps on one CPU alone."""

    def __init__(self, call: Callable[..., object], *arguments: object, cpu: int | None = None) -> None:
        super().__init__(daemon=True)
        self._call, self._arguments, self._cpu = call, arguments, cpu
        self.start()

    def run(self) -> None:
        if self._cpu is not None:
            os.sched_setaffinity(0, {self._cpu})
        with suppress(OSError):
            self._call(*self._arguments)


@contextmanager
def locked(sock: socket.socket) -> Iterator[None]:
    """Somebody is inside send() on this socket, and has it: what he sends is not there (userfaultfd), and never will be."""
    watch = _libc.syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    assert watch >= 0, os.strerror(ctypes.get_errno())
    place = _libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    ioctl(watch, _API, bytearray(struct.pack("=QQQ", _FEATURES, 0, 0)))
    ioctl(watch, _REGISTER, bytearray(struct.pack("=QQQQ", place, mmap.PAGESIZE, _MISSING, 0)))
    thread = Started(_libc.send, sock.fileno(), ctypes.c_void_p(place), 1, 0)
    wait_for(lambda: os.read(watch, 32) if _readable(watch) else b"", "the sender has the socket")
    try:
        yield
    finally:
        _libc.munmap(ctypes.c_void_p(place), mmap.PAGESIZE)  # so that nothing is sent
        ioctl(watch, _WAKE, bytearray(struct.pack("=QQ", place, mmap.PAGESIZE)))
        thread.join(5)
        os.close(watch)


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


@contextmanager
def busy(cpu: int) -> Iterator[None]:
    """It has no time for others; the kernel gives them some after a second. A process does this: a thread of ours would wait,
    and leave its CPU, whenever another has the interpreter."""
    hog = os.fork()
    if not hog:
        try:
            _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            os.sched_setaffinity(0, {cpu})
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            while True:
                pass
        finally:
            os._exit(1)
    try:
        wait_for(lambda: os.sched_getscheduler(hog) == os.SCHED_FIFO, "a CPU is busy")
        yield
    finally:
        os.kill(hog, signal.SIGKILL)
        os.waitpid(hog, 0)


@contextmanager
def sending(sender: socket.socket, receiver: socket.socket, data: bytes, cpu: int | None = None) -> Iterator[Started]:
    """A thread is inside send() with this: judged, and it waits for the receiver's socket, which somebody has."""
    sender.setblocking(True)
    with locked(receiver):
        thread = Started(sender.send, data, cpu=cpu)
        wait_for(lambda: state(thread) == "D", "it waits for the receiver's socket")
        yield thread


@contextmanager
def on_its_way(sender: socket.socket, receiver: socket.socket, data: bytes) -> Iterator[None]:
    """The same, and over once it has sent. Nobody else can use the receiver's socket meanwhile."""
    with sending(sender, receiver, data) as thread:
        yield
    thread.join(5)


@contextmanager
def kept_on_its_way(pair: Pair, sender: socket.socket, receiver: socket.socket, data: bytes) -> Iterator[None]:
    """The same, where the receiver's socket is needed: the thread is kept from its CPU before the receiver has the data. All
    whom the test needs have another CPU."""
    cpus, proxy = os.sched_getaffinity(0), pair.world.proxy.process.pid
    assert len(cpus) > 1, "one CPU for who is kept from it, one for the rest"
    first = min(cpus)
    with ExitStack() as stack:
        for who in (0, proxy):
            os.sched_setaffinity(who, cpus - {first})
            stack.callback(os.sched_setaffinity, who, cpus)
        with ExitStack() as until_busy:
            thread = until_busy.enter_context(sending(sender, receiver, data, first))
            stack.callback(thread.join, 5)
            stack.enter_context(busy(first))
        before = ran(thread)
        try:
            yield
        except (AssertionError, OSError) as error:
            if ran(thread) != before:
                raise LetGo from error
            raise


def ran(thread: threading.Thread) -> str:
    """For how long it had a CPU; nothing once it is over."""
    with suppress(OSError), open(f"/proc/self/task/{thread.native_id}/schedstat") as place:
        return place.read().split()[0]
    return ""


class LetGo(Exception):
    """The kernel gave the thread some time all the same, so nothing was seen of what the test is about."""


def while_kept(test: Callable[[Pairs], None]) -> Callable[[Pairs], None]:
    """Anew, where `kept_on_its_way` could not keep the thread."""

    @wraps(test)
    def again(pairs: Pairs) -> None:
        for _ in range(TRIES - 1):
            with suppress(LetGo):
                return test(pairs)
        return test(pairs)

    return again


def test_a_body_does_not_overtake_its_head(pairs: Pairs) -> None:
    """The server would take the body for a request, which nobody judged. User space waits with it until the head has come."""
    pair = pairs()
    with on_its_way(pair.client, pair.server, HEAD):
        pair.client.send(DENIED)
        assert pair.punt() == "inside"
        assert pair.view()["flags"] & ~ANSWERING == HOLD | INSIDE | TORN
    assert pair.view()["flags"] == HOLD
    assert read(pair.server, len(HEAD)) == HEAD
    assert read(pair.accepted, len(DENIED)) == DENIED
    assert pair.view()["req_left"] == len(DENIED)


def test_what_was_once_passed_on_is_not_overtaken_either(pairs: Pairs) -> None:
    pair = pairs()
    with on_its_way(pair.client, pair.server, HEAD):
        pair.client.send(DENIED[:5])
    assert pair.punt() == "inside"
    pair.client.send(DENIED[5:])
    assert pair.punt() == "behind"
    assert read(pair.server, len(HEAD)) == HEAD
    assert read(pair.accepted, len(DENIED)) == DENIED
    assert nothing(pair.server)


def test_after_its_end_a_client_sends_no_more(pairs: Pairs) -> None:
    pair = pairs()
    pair.client.send(HEAD + DENIED[:5])
    pair.is_fast(HEAD + DENIED[:5])
    pair.client.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError):
        pair.client.send(DENIED[5:])
    assert nothing(pair.server)


@while_kept
def test_the_end_of_a_body_is_not_overtaken(pairs: Pairs) -> None:
    """By a request after an answer that came before the body did: the server would take the request for the body."""
    pair = pairs()
    pair.client.send(HEAD)
    pair.is_fast(HEAD)
    with kept_on_its_way(pair, pair.client, pair.server, DENIED):
        pair.server.sendall(OKAY)
        assert read(pair.client, len(OKAY)) == OKAY
        view = pair.view()
        assert (view["busy"], view["flags"] & ~ANSWERING) == (0, INSIDE | TORN)
        pair.client.send(GET)
        assert read(pair.accepted, len(GET)) == GET
    assert pair.view()["flags"] == 0
    assert read(pair.server, len(DENIED)) == DENIED


def test_after_hold_it_is_seen_that_an_exchange_may_begin(pairs: Pairs) -> None:
    pair = pairs()
    with on_its_way(pair.client, pair.server, GET):
        pair.say(HOLD)
        view = pair.view()
        assert (view["busy"], view["flags"] & ~ANSWERING) == (1, HOLD | INSIDE)
    assert pair.view()["flags"] == HOLD
    pair.is_fast(GET)


@while_kept
def test_an_answer_is_not_overtaken_by_the_next(pairs: Pairs) -> None:
    """To a client that asks before it has the answer; user space, which would answer the second, hears that it should wait."""
    pair = pairs()
    pair.client.send(GET)
    pair.is_fast(GET)
    with kept_on_its_way(pair, pair.server, pair.client, OKAY):
        view = pair.view()
        assert view["busy"] == 0 and view["flags"] & ANSWERING
        pair.client.send(STRANGE)
        assert read(pair.accepted, len(STRANGE)) == STRANGE
    assert pair.view()["flags"] == 0
    assert read(pair.client, len(OKAY)) == OKAY


@pytest.mark.parametrize("then", ["ends", "sleeps", "runs"])
def test_threads_that_send_in_turn_beside_one_that_reads(pairs: Pairs, then: str) -> None:
    """Whoever reads is inside the kernel all the time: who sent last is asked. One that runs could be anywhere, until it has
    been seen to run outside the kernel."""
    pair = pairs()
    pair.client.setblocking(True)
    got: list[bytes] = []
    reader = Started(lambda: got.append(pair.client.recv(1 << 16)))
    wait_for(lambda: state(reader) == "S", "the reader sleeps")
    over, sent = threading.Event(), threading.Event()
    waits, wakes = os.pipe()

    def sender() -> None:
        pair.client.send(HEAD)
        sent.set()
        while then == "runs" and not over.is_set():
            pass
        if then == "sleeps":
            os.read(waits, 1)

    thread = Started(sender)
    sent.wait()
    if then == "ends":
        thread.join()
        wait_for(lambda: gone(thread), "the sender is no more")
        wait_for(lambda: not pair.view()["flags"] & INSIDE, "nor for the kernel, which may not have come to its end")
    elif then == "sleeps":
        wait_for(lambda: call_of(thread) == READ, "the sender sleeps")
    pair.client.send(DENIED)
    if then == "runs":
        assert pair.view()["flags"] == HOLD | INSIDE | TORN
        wait_for(lambda: pair.view()["flags"] == HOLD, "it has left its send()")
        assert not over.is_set()
        assert read(pair.accepted, len(DENIED)) == DENIED
        assert read(pair.server, len(HEAD)) == HEAD
        pair.upstream.sendall(DENIED)
        assert read(pair.server, len(DENIED)) == DENIED
        pair.client.shutdown(socket.SHUT_RD)
    else:
        pair.is_fast(HEAD + DENIED)
        pair.server.sendall(OKAY)
        reader.join(5)
        assert got == [OKAY]
    over.set()
    os.close(wakes)
    thread.join(5)
    os.close(waits)


def test_a_thread_in_the_place_of_one_that_ended_is_another(pairs: Pairs, express: ExpressPath) -> None:
    """The kernel puts a new task where an old one was: by that alone it would be taken for the one that has ended."""
    pair = pairs()
    pair.exchange()
    records, key = express._maps["xrecords"], struct.pack("=I", express._place(pair.record))
    raw = records.get(key) or b""
    tid = express._layouts["pl_xrecord"].unpack(raw)["sender"][-8:-4]
    assert raw.count(tid) == 2  # who sent, and who answered: this thread did both
    records.put(key, raw.replace(tid, struct.pack("=I", 1)))
    pair.exchange()
    assert (records.get(key) or b"").count(tid) == 2


def test_what_is_over_is_counted_off_once(express: ExpressPath) -> None:
    """Its end may be told on two CPUs at the same time: by who answers, takes over, unpairs. Here a process says so all the
    time, beside this one."""
    loads, records, program, full = express._maps["xloads"], express._maps["xrecords"], 9, 1_000_000
    place = struct.pack("=I", 8 * program)
    record = express.create_record(program, 1)
    at = express._place(record)
    key = struct.pack("=I", at)
    counted = express._layouts["pl_xrecord"].pack(id=record, program=program, busy=1, counted=8 * program + 1, place=at)
    forget = _forget(express, record)
    loads.put(place, struct.pack("=I", full))
    beside = os.fork()
    if not beside:
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        while True:
            forget()
    try:
        for _ in range(TOLD_TWICE):
            records.put(key, counted)
            forget()
    finally:
        os.kill(beside, signal.SIGKILL)
        os.waitpid(beside, 0)
    express.forget_record(record)
    assert struct.unpack("=I", loads.get(place) or b"") == (full - TOLD_TWICE,)


def _forget(express: ExpressPath, record: int) -> Callable[[], int]:
    """PL_XK_FORGET with as little around it as can be."""
    layout, enums = express._layouts["pl_xop"], express._layouts.enums
    packet = ctypes.create_string_buffer(layout.pack(kind=enums["PL_XK_FORGET"], side=1, record=record), layout.size)
    place = ctypes.cast(packet, ctypes.c_void_p)
    opts = _Opts(sz=ctypes.sizeof(_Opts), data_in=place, data_out=place, repeat=1)
    opts.data_size_in = opts.data_size_out = layout.size
    call, fd, argument = libbpf.bpf_prog_test_run_opts, express._ops._fd, ctypes.byref(opts)
    return lambda: int(call(fd, argument))
