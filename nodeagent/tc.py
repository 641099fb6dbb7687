"""The filter on the host side of each workload's veth (bpf/veth.c): a clsact ingress classifier that sees every packet
the workload sends, whatever socket made it. One program for all; the map `veths` says whose addresses are whose."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from nodeagent.datapath_api import DatapathError
from nodeagent.layouts import Layout, address
from nodeagent.libbpf import libbpf
from nodeagent.loading import SOURCES, run_child
from nodeagent.maps import BpfMap, check

INGRESS_PARENT = 0xFFFFFFF2
NAME, PREFERENCE = "pillion-veth", 1
ETH_P_ALL = 0x0003
TAKEN = struct.pack("=I", 1)
_U32, _KEY = struct.Struct("=I"), struct.Struct("=5I")
ALREADY, GONE = errno.EEXIST, (errno.ENOENT, errno.ENODEV, errno.EINVAL)
ASKED_AT_ONCE = 64
RECEIVE_BYTES, ANSWER_S = 64 << 10, 5.0
_NLM_F_REQUEST, _RTM_NEWTFILTER, _RTM_GETTFILTER = 1, 44, 46
_NLMSG, _TCMSG = struct.Struct("=IHHII"), struct.Struct("=BxxxiIII")


class Ways:
    """The array `ways`: keys of the map `veths` once more, where the program finds most of them without hashing. A key is taken
    out here before it is there, and one whose place is another's is only there."""

    def __init__(self, ways: BpfMap, layout: Layout) -> None:
        ways.expect(_U32.size, layout.size)
        self._map, self._empty = ways, layout.pack()

    def close(self) -> None:
        self._map.close()

    def put(self, key: bytes) -> None:
        place = self._place(key)
        if self._map.get(place) == self._empty:
            self._map.put(place, key + TAKEN)

    def delete(self, key: bytes) -> None:
        place = self._place(key)
        if self._map.get(place) == key + TAKEN:
            self._map.put(place, self._empty)

    def restore(self, known: set[bytes]) -> None:
        """Mend what an agent that was killed in between has left. ``known``: the keys of `veths`."""
        for index in range(self._map.entries_max):
            place = _U32.pack(index)
            value = self._map.get(place) or self._empty
            if value != self._empty and value.removesuffix(TAKEN) not in known:
                self._map.put(place, self._empty)
        for key in known:
            self.put(key)

    def _place(self, key: bytes) -> bytes:
        """As way_of() in bpf/veth.c."""
        mixed = reduce(xor, _KEY.unpack(key))
        return _U32.pack((mixed * 0x9E3779B1 & 0xFFFFFFFF) >> 20)


class VethGuard:
    """The loaded program and its map. Everything happens in the caller's netns: the node's own."""

    def __init__(self, bpf_dir: Path, run_dir: Path) -> None:
        self._pin = bpf_dir / "tc" / "veth"
        layouts = run_dir / "layouts-veth.json"
        run_child("nodeagent.tc_load", ["--bpf-dir", str(bpf_dir), "--src", str(SOURCES), "--layouts", str(layouts)])
        structs: dict[str, Any] = msgspec.json.decode(layouts.read_bytes())
        key, leaf = structs["pl_veth_key"], structs["pl_veth"]
        self._key = Layout("pl_veth_key", key["format"], tuple(field[0] for field in key["fields"]))
        self._leaf = Layout("pl_veth", leaf["format"], tuple(field[0] for field in leaf["fields"]))
        self._map = BpfMap.open(bpf_dir / "maps" / "veths")
        self._map.expect(self._key.size, self._leaf.size)
        way = structs["pl_way"]
        ways = BpfMap.open(bpf_dir / "maps" / "ways")
        layout = Layout("pl_way", way["format"], tuple(field[0] for field in way["fields"]))
        self._ways = Ways(ways, layout)
        self._ways.restore(set(self._map))
        self._unguarded: frozenset[bytes] = frozenset()  # node-wide keys without an interface
        self._indexes: dict[str, int] = {}  # of guarded interfaces, which may be gone, or made anew under their names

    def close(self) -> None:
        self._ways.close()
        self._map.close()

    def guard(self, veth: str, addresses: Sequence[str], netns: int, flags: int) -> None:
        """Attach (again) and say whose it is. The filter stands before the addresses do: nothing passes unfiltered.
        Raises DatapathError."""
        with IPRoute() as route:
            index = self._index(route, veth)
            self._attach(route, veth, index)
        wanted = {self._key.pack(ifindex=place, addr=address(text)) for text in addresses for place in (index, 0)}
        value = self._leaf.pack(netns=netns, flags=flags)
        before = self._indexes.get(veth, index)
        stale = [key for place in {index, before} for key in self._of(place) if key not in wanted]
        for key in sorted(wanted):
            self._map.put(key, value)
            self._ways.put(key)
        self._indexes[veth] = index
        self._forget(stale)

    def bare(self, veths: Iterable[str]) -> list[str]:
        """Those that are there and have lost their filter. Raises DatapathError."""
        found = {}
        for veth in veths:
            try:
                found[socket.if_nametoindex(veth)] = veth
            except OSError:
                continue
        try:
            return [found[index] for index in unfiltered(list(found))]
        except OSError as error:
            raise DatapathError(f"ask for the filters of veths: {error}") from error

    def set_unguarded(self, addresses: Sequence[str]) -> None:
        """All workload addresses of this node that are behind no interface of `guard`, such as the node's own. Those
        no longer given are forgotten, a former agent's too."""
        self._unguarded = frozenset(self._key.pack(ifindex=0, addr=address(text)) for text in addresses)
        for key in self._unguarded:
            if self._map.get(key) is None:  # one that an interface has as well stays that one's
                self._map.put(key, self._leaf.pack())
                self._ways.put(key)
        self._forget(self._of(0))

    def unguard(self, veth: str) -> None:
        """Take filter and addresses away; an interface that is gone took its filter along."""
        with IPRoute() as route:
            found = route.link_lookup(ifname=veth)
            try:
                for index in found:  # ours alone: the qdisc may carry somebody else's filters
                    route.tc("del-filter", "bpf", index, 1, parent=INGRESS_PARENT, prio=PREFERENCE, protocol=ETH_P_ALL)
            except NetlinkError as error:
                if error.code not in GONE:
                    raise DatapathError(f"{veth}: remove {NAME}: {error}") from error
        places = {*found, self._indexes.pop(veth, 0)} - {0}  # 0: the node's
        self._forget([key for place in places for key in self._of(place)])

    def sweep(self) -> int:
        """Forget addresses of interfaces that are gone. Returns how many entries."""
        with IPRoute() as route:
            present = {link["index"] for link in route.get_links()}
        indexes = {self._key.unpack(key)["ifindex"] for key in self._map} - {0}
        stale = [key for index in indexes - present for key in self._of(index)]
        self._forget(stale)
        return len(stale)

    def _of(self, index: int) -> list[bytes]:
        return [key for key in self._map if self._key.unpack(key)["ifindex"] == index]

    def _forget(self, keys: Sequence[bytes]) -> None:
        """Delete an interface's addresses; node-wide entries too, unless somebody else has the address."""
        own = [self._key.unpack(key) for key in keys]
        for key, fields in zip(keys, own, strict=True):
            if fields["ifindex"]:
                self._delete(key)
        remaining = {self._key.unpack(key)["addr"] for key in self._map if self._key.unpack(key)["ifindex"]}
        for key in {self._key.pack(ifindex=0, addr=fields["addr"]) for fields in own if fields["addr"] not in remaining}:
            if key not in self._unguarded:
                self._delete(key)

    def _delete(self, key: bytes) -> None:
        self._ways.delete(key)
        self._map.delete(key)

    def _index(self, route: IPRoute, veth: str) -> int:
        found = route.link_lookup(ifname=veth)
        if not found:
            raise DatapathError(f"interface {veth} does not exist in the node's netns: name the host side of the workload's veth")
        return int(found[0])

    def _attach(self, route: IPRoute, veth: str, index: int) -> None:
        fd = check(libbpf.bpf_obj_get(os.fsencode(self._pin)), f"program {self._pin}")
        try:
            try:
                route.tc("add", "clsact", index)
            except NetlinkError as error:
                if error.code != ALREADY:
                    raise
            route.tc(
                "replace-filter",
                "bpf",
                index,
                1,
                fd=fd,
                name=NAME,
                parent=INGRESS_PARENT,
                prio=PREFERENCE,
                protocol=ETH_P_ALL,
                classid=1,
                direct_action=True,
            )
        except NetlinkError as error:
            raise DatapathError(f"{veth}: attach {NAME}: {error}") from error
        finally:
            os.close(fd)


def unfiltered(indexes: Sequence[int]) -> list[int]:
    """Interfaces without our filter; not those that are gone. The kernel lists filters of one interface at a time, but answers
    many questions for a single one that came in one message. Raises OSError."""
    found: list[int] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(ANSWER_S)
        for at in range(0, len(indexes), ASKED_AT_ONCE):
            asked = dict(enumerate(indexes[at : at + ASKED_AT_ONCE]))
            sock.send(b"".join(_question(number, index) for number, index in asked.items()))
            while asked:
                for number, kind, body in _messages(sock.recv(RECEIVE_BYTES)):
                    if (index := asked.pop(number, None)) is None:
                        continue
                    if kind == _RTM_NEWTFILTER:
                        ours = f"{NAME}\0".encode() in body
                    elif (code := -int.from_bytes(body[:4], "little", signed=True)) in GONE:
                        ours = code == errno.ENODEV
                    else:
                        raise OSError(code, os.strerror(code))
                    found += [] if ours else [index]
    return found


def _question(number: int, index: int) -> bytes:
    place = _TCMSG.pack(0, index, 1, INGRESS_PARENT, PREFERENCE << 16 | socket.htons(ETH_P_ALL))
    return _NLMSG.pack(_NLMSG.size + len(place), _RTM_GETTFILTER, _NLM_F_REQUEST, number, 0) + place


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number of the question, type, body) of each."""
    while data:
        length, kind, _, number, _ = _NLMSG.unpack_from(data)
        yield number, kind, data[_NLMSG.size : length]
        data = data[length + 3 & ~3 :]
