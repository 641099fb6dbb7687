"""What agent and proxy say to each other: the proxy listens on a unix socket it made before it gave up
its privileges, the agent dials each worker. A frame is ``u32 length, u32 nfds, JSON``; its descriptors
(SCM_RIGHTS) ride with its bytes, in order. Sans-IO: bytes and descriptors in, messages out.
"""

from __future__ import annotations

import struct

import msgspec

from mesh.model import Item

FRAME_BYTES_MAX = 64 << 20  # a whole snapshot at the planned scale fits
FRAME_FDS_MAX = 128  # the kernel takes 253 in one sendmsg
PAIR_ENDS_MAX = 8  # upstreams of one paired session
PAIR_ASKS_MAX = 32  # Pairs of one worker under way at once
LEG_ASKS_MAX = 32  # Legs of one worker under way at once
LEG_ANSWER_S = 1.0
_HEADER = struct.Struct("!II")


class Base(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True):
    """A message; the tag names it."""


# ---- agent -> proxy


class PairEnd(msgspec.Struct, frozen=True, array_like=True):
    """Where an upstream leads: a workload of this node and its port."""

    workload: str  # item key
    port: int


class LocalWorkload(msgspec.Struct, frozen=True):
    """A workload of this node as the proxy needs it."""

    key: str  # item key
    netns: int  # netns cookie (SO_NETNS_COOKIE)
    cgroup: int  # cgroup id


class Hello(Base, frozen=True, tag="hello"):
    node: str
    origin_format: str  # struct format of pl_origin, from the loader's layouts
    origin_fields: tuple[str, ...]
    caller_format: str  # struct format of pl_caller
    caller_fields: tuple[str, ...]
    origin_level: int = 0x50494C
    origin_opt: int = 1
    caller_opt: int = 2
    xview_format: str = ""  # struct format of pl_xview; "" with all of these: no express on this node
    xview_fields: tuple[str, ...] = ()
    xarm_format: str = ""  # struct format of pl_xarm
    xarm_fields: tuple[str, ...] = ()
    xreasons: tuple[str, ...] = ()  # names of enum pl_xreason by number, lower case, without prefix: what pl_xview.punt says
    express_opt: int = 3


class Update(Base, frozen=True, tag="update"):
    """Replace (full) or change the state. Answered by Ack with the digest of the state after it."""

    revision: int
    full: bool
    put: dict[str, Item] = {}
    delete: tuple[str, ...] = ()
    local: tuple[LocalWorkload, ...] = ()  # always complete
    generation: int = 0  # bumped when a decision may change: open streams are re-evaluated


class Listener(Base, frozen=True, tag="listener"):
    """One descriptor: a bound socket inside a workload's netns. kind: outbound | hbone | dns-udp | dns-tcp |
    dns-forward (UDP, of the node's netns, several: questions to Config.dns_upstreams)."""

    id: str  # "<netns cookie>/<kind>/<address>"; of dns-forward "forward/<family>/<number>"
    kind: str
    netns: int
    address: str
    port: int


class CloseListener(Base, frozen=True, tag="close-listener"):
    id: str


class Stock(Base, frozen=True, tag="stock"):
    """As many descriptors as the frame carries: fresh TCP client sockets made in ``netns``."""

    netns: int
    family: int  # socket.AF_INET or AF_INET6


class Svid(Base, frozen=True, tag="svid"):
    """One descriptor: a sealed memfd with the PEM key."""

    spiffe: str
    chain: str  # PEM, leaf first
    serial: str  # hex
    not_after: float  # unix seconds


class DropSvid(Base, frozen=True, tag="drop-svid"):
    spiffe: str


class Lease(Base, frozen=True, tag="lease"):
    """Until when (CLOCK_BOOTTIME, ns) the policy lets new connections in, where `Config.policy_lease_s` sets a limit."""

    until_ns: int


class Paired(Base, frozen=True, tag="paired"):
    """The answer to Pair, exactly one to each; not ``ok``: nothing of the session is left with the agent. At any other time it
    is a wish: not ``ok``, that the worker lets go of the session (it says Unpair once the kernel carries nothing of it);
    ``ok``, that it dials ``missing`` and pairs anew."""

    session: int
    ok: bool
    slots: tuple[int, ...] = ()  # the slot of each upstream in Pair's order, -1: this one was refused
    missing: tuple[PairEnd, ...] = ()  # endpoints of the compiled program that no upstream of this pair leads to
    reason: str = ""  # of a refusal, from a closed list
    lasting: bool = False  # it holds for all that this caller address asks this destination, until the configuration changes


class Takeover(Base, frozen=True, tag="takeover"):
    """A pair of a worker that is gone, whose sockets stand where the kernel armed them. Descriptors as in Pair. The kernel
    may be carrying an exchange on it right now. Answered by Pair with the same session at its next idle moment, or by
    Unpair. After the listeners, so that a worker which drains never gets one."""

    session: int
    service: str
    port: int
    caller: str
    endpoints: tuple[PairEnd, ...]
    slots: tuple[int, ...]  # of each upstream


class Legged(Base, frozen=True, tag="legged"):
    """The answer to Leg, exactly one to each; not ``ok``: all goes by TCP, as ever. At any other time, and not
    ``ok``: that one is over."""

    number: int
    ok: bool
    reason: str = ""  # of a refusal, from a closed list


class Granted(Base, frozen=True, tag="granted"):
    """The answer to Grant; ``reason`` of a refusal, from a closed list, "" for what is open now."""

    number: int
    reason: str = ""


class Scrape(Base, frozen=True, tag="scrape"):
    """Asks for Metrics."""


class Drain(Base, frozen=True, tag="drain"):
    """Finish what is open within ``seconds``, take nothing new. To one that is `Leaving`: a successor serves."""

    seconds: float = 30.0


# ---- proxy -> agent


class Ready(Base, frozen=True, tag="ready"):
    worker: int
    pid: int
    generation: int = 0  # of its proxy: the greater is the newer


class Ack(Base, frozen=True, tag="ack"):
    revision: int
    digest: str


class Nack(Base, frozen=True, tag="nack"):
    revision: int
    error: str


class NeedStock(Base, frozen=True, tag="need-stock"):
    netns: int
    family: int
    count: int


class Pair(Base, frozen=True, tag="pair"):
    """Asks that the kernel carries an idle HTTP session between its sockets. Descriptors: the accepted socket, then one
    connected to each of ``endpoints``. Always total: it replaces what the session was paired with, and counts of bytes
    begin at 0 again. Nothing is read or written on these sockets from before this is sent until Paired; a worker that
    gives up waiting (1 s) says Unpair. One Pair of a session is under way at a time."""

    session: int  # worker << 48 | number; no other worker or life of a worker uses it
    service: str  # item key, "" for a workload that no service claims
    port: int  # as dialled
    caller: str  # item key of the workload that dialled
    endpoints: tuple[PairEnd, ...]  # PAIR_ENDS_MAX at most


class Unpair(Base, frozen=True, tag="unpair"):
    """The agent forgets the record and closes its duplicates; nothing is answered. An unknown session is no fault."""

    session: int


class Leg(Base, frozen=True, tag="leg"):
    """Asks that the kernel hands over, without TCP between them, what the worker and the application at the other end of one
    connection say to each other. Descriptor: the worker's socket. Nothing is written on it from before this is sent until
    Legged, or for LEG_ANSWER_S. It ends with the connection; the worker says Unleg."""

    number: int  # worker << 48 | number; no other worker or life of a worker uses it
    workload: str  # item key of the application's
    dialled: bool  # by the worker, to a server; else it was accepted from a client


class Unleg(Base, frozen=True, tag="unleg"):
    """From now on all goes by TCP; nothing is answered. An unknown number is no fault."""

    number: int


class Grant(Base, frozen=True, tag="grant"):
    """A name outside the mesh was answered: asks that who asked for it may reach these addresses, as its ServiceEntries say.
    The agent tells by itself who that was, and whether it may."""

    number: int
    netns: int
    client: tuple[str, int]  # where the question came from
    transport: str  # of the question: udp | tcp
    name: str  # lower case, without the last dot
    addresses: tuple[str, ...]  # GRANT_ADDRESSES_MAX at most
    ttl_s: float


class Leaving(Base, frozen=True, tag="leaving"):
    """The worker ends by plan, and another comes in its place: what it has paired it leaves to that one. The agent, which has
    the sockets, stays until then. Said again on each link. Without ``seconds`` it stops at once; with them it serves on until
    Drain, which comes when a worker of a newer generation serves, and then has so long for what is open."""

    seconds: float = 0.0


class Left(Base, frozen=True, tag="left"):
    """This pair of a worker that is `Leaving` rests, and is for its successor."""

    session: int


class Drained(Base, frozen=True, tag="drained"):
    """The last word of a worker: its time was over, and so many connections were cut."""

    cut: int


class Metrics(Base, frozen=True, tag="metrics"):
    worker: int
    text: str  # Prometheus exposition


class Flow(Base, frozen=True, tag="flow"):
    """A verdict of user space, for ``pillion flows``. Also the agent's form for kernel events."""

    time: float  # unix seconds
    verdict: str  # allowed | denied | audited
    reason: str  # of a denial the counted one; of what was allowed or audited, the rule that did
    source: str = ""  # spiffe or "unknown"
    destination: str = ""  # workload or service item key
    source_address: str = ""
    destination_address: str = ""
    protocol: str = "tcp"
    layer: str = "L4"
    method: str = ""
    path: str = ""
    status: int = 0
    revision: int = 0
    direction: str = ""  # outbound | inbound
    node: str = ""
    rule: str = ""  # "shop/web-allow#0", where one decided


Message = (
    Hello | Update | Listener | CloseListener | Stock | Svid | DropSvid | Lease | Paired | Takeover | Legged | Granted | Scrape
    | Drain
    | Ready | Ack | Nack | NeedStock | Pair | Unpair | Leg | Unleg | Grant | Leaving | Left | Drained | Metrics
    | Flow
)  # fmt: skip

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


class LinkError(ValueError):
    """The other end broke the framing; close the link."""


def encode(message: Message, nfds: int = 0) -> bytes:
    """One frame. Send its first byte together with the ``nfds`` descriptors."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX or nfds > FRAME_FDS_MAX:
        raise LinkError(f"frame of {len(body)} bytes and {nfds} descriptors is over the limit")
    return _HEADER.pack(len(body), nfds) + body


class Decoder:
    """Collects bytes and descriptors, yields whole messages with theirs."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fds: list[int] = []

    def feed(self, data: bytes, fds: list[int]) -> list[tuple[Message, list[int]]]:
        """Messages completed by this read. Raises LinkError; the caller then owns no descriptor of ours: see `take_fds`."""
        self._buffer += data
        self._fds += fds
        out: list[tuple[Message, list[int]]] = []
        while len(self._buffer) >= _HEADER.size:
            length, nfds = _HEADER.unpack_from(self._buffer)
            if length > FRAME_BYTES_MAX or nfds > FRAME_FDS_MAX:
                raise self._broken(out, f"frame header asks for {length} bytes and {nfds} descriptors")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            if len(self._fds) < nfds:
                raise self._broken(out, "descriptors are missing")
            try:
                message = _decoder.decode(memoryview(self._buffer)[_HEADER.size : end])
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                raise self._broken(out, f"not a message: {error}") from error
            del self._buffer[:end]
            out.append((message, self._fds[:nfds]))
            del self._fds[:nfds]
        return out

    @property
    def fds_waiting(self) -> int:
        """Descriptors that came and belong to no whole frame yet."""
        return len(self._fds)

    def _broken(self, out: list[tuple[Message, list[int]]], why: str) -> LinkError:
        """Messages of the same read go with the link: their descriptors are for `take_fds`."""
        self._fds[:0] = [fd for _, fds in out for fd in fds]
        return LinkError(why)

    def take_fds(self) -> list[int]:
        """Descriptors not handed out; the caller closes them."""
        fds, self._fds = self._fds, []
        return fds
