"""The kernel's list of sockets of one netns, with what our programs stored on them, and the end of any of them: raw
NETLINK_SOCK_DIAG, since no library hands out socket storage. A netlink socket sees the netns it was made in, so make
the `SockDiag` inside (netns.run_in). Needs CAP_NET_ADMIN; SOCK_DESTROY needs CONFIG_INET_DIAG_DESTROY."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from ipaddress import IPv6Address, ip_address

import msgspec

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
NLM_F_DUMP_INTR = 0x10
REQ_SK_BPF_STORAGES, REQ_MAP_FD = 2, 1
ATTR_SK_BPF_STORAGES, ATTR_CGROUP_ID = 20, 21  # INET_DIAG_*
STORAGE, STORAGE_MAP_ID, STORAGE_MAP_VALUE = 1, 2, 3  # SK_DIAG_BPF_STORAGE*
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF
RECEIVE_BYTES = 256 << 10
DUMP_TRIES = 3

_NLMSG = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI48s")  # inet_diag_req_v2
_MESSAGE = struct.Struct("=BBBB48sIIIII")  # inet_diag_msg
_NLA = struct.Struct("=HH")


class State(IntEnum):
    """TCP states as the kernel numbers them."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11


ANY_STATE = 0xFFF
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
BOTH = (TCP, UDP)
# Everything that still carries or may carry data; TIME_WAIT and SYN_RECV own no socket, CLOSE moves nothing.
OPEN_STATES = sum(
    1 << state
    for state in (
        State.ESTABLISHED,
        State.SYN_SENT,
        State.FIN_WAIT1,
        State.FIN_WAIT2,
        State.CLOSE_WAIT,
        State.LAST_ACK,
        State.CLOSING,
    )
)


class Sock(msgspec.Struct, frozen=True):
    """One socket. Addresses are canonical text, IPv4 also where an IPv6 socket speaks it."""

    family: int  # AF_INET or AF_INET6: of the socket, not of the addresses
    protocol: int  # IPPROTO_TCP or IPPROTO_UDP
    state: State
    local: str
    local_port: int
    remote: str
    remote_port: int
    inode: int
    cgroup: int  # id of the cgroup that made it; 0 unknown
    id: bytes  # inet_diag_sockid: names exactly this socket, by its cookie
    storage: dict[int, bytes]  # map id -> value, of the maps asked for

    def __str__(self) -> str:
        name = "tcp" if self.protocol == TCP else "udp"
        return f"{name} {self.local}:{self.local_port} -> {self.remote}:{self.remote_port} ({self.state.name.lower()})"


class SockDiag:
    """A netlink socket of the netns it was made in; usable from any thread afterwards, one at a time."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
        self._sock.settimeout(5.0)
        self._sequence = 0

    def close(self) -> None:
        self._sock.close()

    def dump(
        self,
        states: int = ANY_STATE,
        protocols: Sequence[int] = (TCP,),
        storage_fds: Sequence[int] = (),
    ) -> list[Sock]:
        """Sockets of both families in these states (bit ``1 << State``), with the values of these sk_storage maps.

        Raises OSError. Sockets that come or go meanwhile may be missing: the programs already see those.
        """
        found: list[Sock] = []
        for protocol in protocols:
            for family in (socket.AF_INET, socket.AF_INET6):
                found += self._dump(family, protocol, states, storage_fds)
        return found

    def _dump(self, family: int, protocol: int, states: int, storage_fds: Sequence[int]) -> list[Sock]:
        body = _REQUEST.pack(family, protocol, 0, states, bytes(48))
        if storage_fds:
            fds = b"".join(attribute(REQ_MAP_FD, struct.pack("=I", fd)) for fd in storage_fds)
            body += attribute(REQ_SK_BPF_STORAGES | NLA_F_NESTED, fds)
        for _ in range(DUMP_TRIES):
            self._send(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, body)
            interrupted = False
            found = []
            for kind, flags, payload in self._answers():
                interrupted |= bool(flags & NLM_F_DUMP_INTR)
                if kind == SOCK_DIAG_BY_FAMILY:
                    found.append(parse(protocol, payload))
            if not interrupted:
                break
        return found

    def destroy(self, sock: Sock) -> bool:
        """End this very socket: RST to its peer, ECONNABORTED to its owner. False if it was gone. Raises OSError."""
        body = _REQUEST.pack(sock.family, sock.protocol, 0, 1 << sock.state, sock.id)
        self._send(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, body)
        try:
            for _ in self._answers():
                pass
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            if error.errno == errno.EOPNOTSUPP:
                raise OSError(error.errno, "SOCK_DESTROY: this kernel lacks CONFIG_INET_DIAG_DESTROY") from error
            raise
        return True

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        self._sock.send(_NLMSG.pack(_NLMSG.size + len(body), kind, flags, self._sequence, 0) + body)

    def _answers(self) -> Iterator[tuple[int, int, memoryview]]:
        """(type, flags, payload) up to the end of this answer. Raises OSError with the kernel's errno."""
        while True:
            data = memoryview(self._sock.recv(RECEIVE_BYTES))
            while len(data) >= _NLMSG.size:
                length, kind, flags, sequence, _ = _NLMSG.unpack_from(data)
                payload, data = data[_NLMSG.size : length], data[(length + 3) & ~3 :]
                if sequence != self._sequence:
                    continue  # left over from an answer we gave up on
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    code = -struct.unpack_from("=i", payload)[0] if len(payload) >= 4 else 0
                    if code > 0:
                        raise OSError(code, f"sock_diag: {os.strerror(code)}")
                    return
                yield kind, flags, payload


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded to 4 bytes."""
    return _NLA.pack(_NLA.size + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type without flags, value) of each netlink attribute."""
    while len(data) >= _NLA.size:
        length, kind = _NLA.unpack_from(data)
        if length < _NLA.size or length > len(data):
            return
        yield kind & NLA_TYPE_MASK, data[_NLA.size : length]
        data = data[(length + 3) & ~3 :]


def parse(protocol: int, payload: memoryview) -> Sock:
    """One inet_diag_msg with its attributes."""
    family, state, _, _, sock_id, _, _, _, _, inode = _MESSAGE.unpack_from(payload)
    sport, dport, src, dst = struct.unpack_from("!HH16s16s", sock_id)
    cgroup, storage = 0, {}
    for kind, value in attributes(payload[_MESSAGE.size :]):
        if kind == ATTR_CGROUP_ID:
            cgroup = struct.unpack_from("=Q", value)[0]
        elif kind == ATTR_SK_BPF_STORAGES:
            storage = dict(_storages(value))
    local, remote = _text(family, src), _text(family, dst)
    return Sock(family, protocol, State(state), local, sport, remote, dport, inode, cgroup, sock_id, storage)


def _storages(data: memoryview) -> Iterator[tuple[int, bytes]]:
    for kind, nested in attributes(data):
        if kind == STORAGE:
            parts = dict(attributes(nested))
            if STORAGE_MAP_VALUE in parts:
                yield struct.unpack_from("=I", parts[STORAGE_MAP_ID])[0], bytes(parts[STORAGE_MAP_VALUE])


def _text(family: int, raw: bytes) -> str:
    address = ip_address(raw[:4] if family == socket.AF_INET else raw)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def destroy_where(diag: SockDiag, socks: Iterable[Sock], doomed: Callable[[Sock], bool]) -> list[Sock]:
    """Destroy the sockets for which ``doomed`` says so, and their other ends if those are here too: the reset that
    would tell them may be denied like everything else. Returns those it ended, without the other ends. Raises OSError."""
    socks = list(socks)
    found = [sock for sock in socks if doomed(sock)]
    ended = [sock for sock in found if diag.destroy(sock)]
    gone = {sock.id for sock in found}
    facing = {(sock.protocol, sock.remote, sock.remote_port, sock.local, sock.local_port) for sock in ended if sock.remote_port}
    for sock in socks:
        if sock.id not in gone and (sock.protocol, sock.local, sock.local_port, sock.remote, sock.remote_port) in facing:
            diag.destroy(sock)
    return ended
