from __future__ import annotations

import socket
import struct

import pytest

from l7proxy.kernel import Kernel, Origin, address_bytes, address_text
from l7proxy.target import Caller
from mesh.link import Hello

ORIGIN = ("16s16sQQIIIHH", ("dst", "client", "cgroup", "netns", "workload", "identity", "service", "dst_port", "client_port"))
CALLER = ("16sIHH", ("addr", "identity", "port", "pad"))


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
