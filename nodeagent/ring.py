"""Kernel events out of the `events` ring buffer, as flows. The kernel drops events when nobody reads (counters stay
exact, they are apart); what we cannot keep up with we drop too, and count."""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from ipaddress import ip_address

import msgspec

from mesh.addresses import host_port
from mesh.link import Flow
from nodeagent.datapath_api import DatapathError, DeniedBy
from nodeagent.layouts import Layout, text_address
from nodeagent.libbpf import libbpf

UNTOLD = "proxy_dial"  # every forwarded connection has one; what it is for, the proxy tells
BLAMED = ("policy_denied", "generation_denied")
PENDING_MAX = 8192  # events waiting for the one consumer
TURN_EVENTS_MAX = 1024  # taken in one turn of the loop; the rest waits for the next
CLOCK_READINGS = 8

_SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
libbpf.ring_buffer__new.restype = ctypes.c_void_p
libbpf.ring_buffer__new.argtypes = (ctypes.c_int, _SAMPLE, ctypes.c_void_p, ctypes.c_void_p)
for _name in ("ring_buffer__consume", "ring_buffer__epoll_fd", "ring_buffer__free"):
    getattr(libbpf, _name).argtypes = (ctypes.c_void_p,)
libbpf.ring_buffer__free.restype = None

_TURN_FULL = -4  # a negative answer of the callback ends ring_buffer__consume after that record


class Names(msgspec.Struct):
    """What the numbers in events stand for. Missing numbers show as ``id:<number>``."""

    reasons: tuple[str, ...] = ()
    identities: Mapping[int, str] = {}
    workloads: Mapping[int, str] = {}
    services: Mapping[int, str] = {}
    rules: Mapping[int, str] = {}
    node: str = ""
    revision: int = 0
    denied_by: DeniedBy = lambda *_: ""  # see `blame.Blame`


class RingBuffer:
    """The raw records of a BPF_MAP_TYPE_RINGBUF; `fd` is readable when there are some."""

    def __init__(self, map_fd: int) -> None:
        self._records: list[bytes] = []
        self._callback = _SAMPLE(self._sample)  # must outlive the ring
        self._ring = libbpf.ring_buffer__new(map_fd, self._callback, None, None)
        if not self._ring:
            raise DatapathError("the events ring buffer cannot be mapped: locked memory limit?")
        self.fd: int = libbpf.ring_buffer__epoll_fd(self._ring)

    def _sample(self, _context: object, data: int, size: int) -> int:
        self._records.append(ctypes.string_at(data, size))
        return _TURN_FULL if len(self._records) >= TURN_EVENTS_MAX else 0

    def read(self) -> list[bytes]:
        """Up to TURN_EVENTS_MAX records, without waiting."""
        self._records = []
        if self._ring:
            libbpf.ring_buffer__consume(self._ring)
        return self._records

    def close(self) -> None:
        ring, self._ring = self._ring, None
        if ring:
            libbpf.ring_buffer__free(ring)


def flow_of(record: bytes, layout: Layout, names: Names, boot_offset_s: float) -> Flow | None:
    """One pl_event as a Flow; None: not for people. ``boot_offset_s``: unix time minus the kernel's clock. Pure."""
    event = layout.unpack(record)
    reason, identity = event["reason"], event["src_identity"]
    reason_name = names.reasons[reason] if reason < len(names.reasons) else f"id:{reason}"
    if reason_name == UNTOLD:
        return None
    source = names.workloads.get(event["src_workload"]) if not identity else None
    destination = event["dst_workload"]
    allowed = bool(event["verdict"])
    protocol = {6: "tcp", 17: "udp"}.get(event["proto"], str(event["proto"]))
    rule = names.rules.get(event["rule"], "")
    if not allowed and not rule and reason_name in BLAMED and destination:
        rule = names.denied_by(identity, destination, text_address(event["dst"]), event["dport"], protocol)
    return Flow(
        time=event["time_ns"] / 1e9 + boot_offset_s,
        verdict="allowed" if allowed else "denied",
        reason=(rule or reason_name) if allowed else reason_name,
        source=names.identities.get(identity) or source or (f"id:{identity}" if identity else "unknown"),
        destination=names.workloads.get(destination) or (f"id:{destination}" if destination else ""),
        source_address=_endpoint(event["src"], event["sport"]),
        destination_address=_endpoint(event["dst"], event["dport"]),
        protocol=protocol,
        revision=names.revision,
        node=names.node,
        rule=rule,
    )


def _endpoint(raw: bytes, port: int) -> str:
    """Empty for an address the hook did not know: connect() has no source yet."""
    address = text_address(raw)
    return "" if ip_address(address).is_unspecified else host_port(address, port)


def boot_offset_s(clock: int = time.CLOCK_BOOTTIME) -> float:
    """Unix time minus the kernel clock that stamps events. Of several readings the one that took least time: the two clocks
    are read one after the other, and who loses the CPU in between is off by as long as that takes."""

    def read() -> tuple[float, float]:
        before, now, after = time.clock_gettime(clock), time.time(), time.clock_gettime(clock)
        return after - before, now - (before + after) / 2

    return min(read() for _ in range(CLOCK_READINGS))[1]


class FlowReader:
    """Turns the ring into an async stream for one consumer."""

    def __init__(self, map_fd: int, layout: Layout, names: Names) -> None:
        self._ring = RingBuffer(map_fd)
        self._layout, self._names = layout, names
        self._pending: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.lost = 0  # read, but nobody took them in time

    def _readable(self) -> None:
        for record in self._ring.read():
            if len(self._pending) >= PENDING_MAX:
                self._pending.popleft()
                self.lost += 1
            self._pending.append(record)
        self._wake.set()

    async def flows(self) -> AsyncIterator[Flow]:
        """Every event from now on, until `close`."""
        if self._closed:
            return
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ring.fd, self._readable)
        offset = boot_offset_s()
        try:
            while not self._closed:
                while self._pending:
                    record = self._pending.popleft()
                    if len(record) >= self._layout.size:
                        flow = flow_of(record, self._layout, self._names, offset)
                        if flow is not None:
                            yield flow
                self._wake.clear()
                await self._wake.wait()
        finally:
            self._stop()
            if self._closed:
                self._ring.close()

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._ring.fd)

    def close(self) -> None:
        """From any thread. The consumer's loop ends the stream and lets go of the ring, if there is one."""
        self._closed = True
        loop = self._loop
        if loop is None or loop.is_closed():
            self._ring.close()
        else:
            loop.call_soon_threadsafe(self._wake.set)
