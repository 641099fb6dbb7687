from __future__ import annotations

import socket
import struct
import time

import pytest

from l7proxy.express import ARM, RESPONSE_BODY
from l7proxy.kernel import Kernel, Origin, address_bytes, address_text
from l7proxy.target import Caller
from mesh.link import Hello

ORIGIN = ("16s16sQQIIIHH", ("dst", "client", "cgroup", "netns", "workload", "identity", "service", "dst_port", "client_port"))
CALLER = ("16sIHH", ("addr", "identity", "port", "pad"))
WORDS = (
    "flags", "armed", "busy", "phase", "handed", "handed_slow", "rule", "status", "method_head", "head_len", "req_left",
    "resp_left", "resp_bytes", "punt",
)  # fmt: skip
VIEW = ("Q14IQ1024s", ("record", *WORDS, "t0_ns", "head"))
XARM = ("6I8s", ("op", "slot", "consumed", "sent", "up_sent", "up_consumed", "pad"))
EXPRESS = Hello(
    "n1", *ORIGIN, *CALLER,
    xview_format=VIEW[0], xview_fields=VIEW[1], xarm_format=XARM[0], xarm_fields=XARM[1], xreasons=("carried", "sample", "rate"),
)  # fmt: skip


class Socket:
    """A socket on which programs answer."""

    def __init__(self, answer: bytes | None = None) -> None:
        self.answer, self.set = answer, b""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        if self.answer is None:
            raise OSError(92, "Protocol not available")
        assert (level, option, size) == (0x50494C, 1, struct.calcsize(ORIGIN[0]))
        return self.answer

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        assert (level, option) == (0x50494C, 2)
        self.set = value


@pytest.mark.parametrize(("dst", "client"), [("240.0.0.7", "10.77.1.2"), ("fd50:494c::7", "fd77:1::2")])
def test_the_origin_is_read_by_the_agents_layout(dst: str, client: str) -> None:
    kernel = Kernel()
    raw = struct.pack(ORIGIN[0], address_bytes(dst), address_bytes(client), 1, 7, 300, 256, 400, 80, 40000)
    assert kernel.origin(Socket(raw)) is None  # before Hello
    kernel.learn(Hello("n1", *ORIGIN, *CALLER))
    assert kernel.origin(Socket(raw)) == Origin(dst, 80, client, 40000, 7, 300, 256, 400)
    assert kernel.origin(Socket(raw[:-1])) is None
    assert kernel.origin(Socket(None)) is None


def test_the_caller_is_written_by_the_agents_layout() -> None:
    kernel, sock = Kernel(), Socket()
    caller = Caller("spiffe://x", 256, "10.77.1.2", 40000)
    with pytest.raises(OSError, match="no layouts"):
        kernel.set_caller(sock, caller)
    kernel.learn(Hello("n1", *ORIGIN, *CALLER))
    kernel.set_caller(sock, caller)
    assert sock.set == struct.pack(CALLER[0], address_bytes("10.77.1.2"), 256, 40000, 0)


def test_layouts_that_lack_a_field_are_refused() -> None:
    with pytest.raises(ValueError, match="client_port"):
        Kernel().learn(Hello("n1", "16s", ("dst",), *CALLER))


@pytest.mark.parametrize("text", ["127.0.0.1", "::1", "fd77::11"])
def test_addresses(text: str) -> None:
    assert address_text(address_bytes(text)) == text


def test_the_agent_is_root() -> None:
    one, two = socket.socketpair()
    assert Kernel().check_agent(one)  # the tests run as root
    one.close()
    two.close()


class Paired(Socket):
    """An accepted socket with a record."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        assert (level, option, size) == (0x50494C, 3, struct.calcsize(VIEW[0]))
        if self.answer is None:
            raise OSError(92, "Protocol not available")
        return self.answer

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        assert (level, option) == (0x50494C, 3)
        if self.answer is None:
            raise OSError(1, "Operation not permitted")
        self.set = value


def test_the_account_of_a_pair_is_read_by_the_agents_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    kernel.learn(EXPRESS)
    assert kernel.express
    words = {"flags": 1, "busy": 3, "phase": 3, "handed": 1, "status": 201, "head_len": 4, "resp_left": 9, "punt": 2}
    now = 5_000_000_000_000
    began = now - 2_000_000_000
    raw = struct.pack(VIEW[0], 5, *(words.get(name, 0) for name in WORDS), began, b"GET /")
    monkeypatch.setattr("l7proxy.kernel.clock_gettime_ns", {time.CLOCK_BOOTTIME: now}.__getitem__)
    monkeypatch.setattr("l7proxy.kernel.perf_counter", lambda: 100.0)
    view = kernel.express_view(Paired(raw))
    assert view is not None
    assert (view.slot, view.phase, view.handed, view.handed_slow) == (2, RESPONSE_BODY, True, 0)
    assert (view.status, view.head, view.req_left, view.resp_left) == (201, b"GET ", 0, 9)
    assert (view.punt, view.off) == ("rate", True)
    assert view.started == 98.0
    assert kernel.express_view(Paired(None)) is None


def test_what_is_armed_is_written_by_the_agents_layout() -> None:
    kernel, sock = Kernel(), Paired(b"")
    kernel.learn(EXPRESS)
    assert kernel.express_op(sock, ARM, 1, (1 << 32) + 2, 3, 4, 5)
    assert sock.set == struct.pack(XARM[0], 1, 1, 2, 3, 4, 5, bytes(8))
    assert not kernel.express_op(Paired(None), ARM, 1)


def test_without_its_layouts_there_is_no_express() -> None:
    kernel = Kernel()
    kernel.learn(Hello("n1", *ORIGIN, *CALLER))
    assert not kernel.express
    assert kernel.express_view(Paired(b"")) is None
    assert not kernel.express_op(Paired(b""), ARM, 1)
