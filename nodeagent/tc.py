"""The filter on the host side of each workload's veth (bpf/veth.c): a clsact ingress classifier that sees every packet
the workload sends, whatever socket made it. One program for all; the map `veths` says whose addresses are whose."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from nodeagent.datapath_api import DatapathError
from nodeagent.layouts import Layout, address
from nodeagent.loading import SOURCES, run_child
from nodeagent.maps import BpfMap, _check, _libbpf

CLSACT_HANDLE, INGRESS_PARENT = 0xFFFF0000, 0xFFFFFFF2
NAME, PREFERENCE = "pillion-veth", 1
ETH_P_ALL = 0x0003
ALREADY, GONE = 17, (2, 19, 22)  # EEXIST; ENOENT, ENODEV, EINVAL


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

    def close(self) -> None:
        self._map.close()

    def guard(self, veth: str, addresses: Sequence[str], netns: int, flags: int) -> None:
        """Attach (again) and say whose it is. The filter stands before the addresses do: nothing passes unfiltered.
        Raises DatapathError."""
        with IPRoute() as route:
            index = self._index(route, veth)
            self._attach(route, veth, index)
        wanted = {self._key.pack(ifindex=place, addr=address(text)) for text in addresses for place in (index, 0)}
        value = self._leaf.pack(netns=netns, flags=flags)
        stale = [key for key in self._of(index) if key not in wanted]
        for key in sorted(wanted):
            self._map.put(key, value)
        self._forget(stale)

    def unguard(self, veth: str) -> None:
        """Take filter and addresses away; an interface that is gone is fine (its filter went with it)."""
        with IPRoute() as route:
            found = route.link_lookup(ifname=veth)
            if not found:
                return
            try:
                # Ours alone: the qdisc may carry somebody else's filters
                route.tc("del-filter", "bpf", found[0], 1, parent=INGRESS_PARENT, prio=PREFERENCE, protocol=ETH_P_ALL)
            except NetlinkError as error:
                if error.code not in GONE:
                    raise DatapathError(f"{veth}: remove {NAME}: {error}") from error
        self._forget(self._of(found[0]))

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
        """Delete an interface's addresses; node-wide entries too, unless another interface has the address."""
        for key in keys:
            self._map.delete(key)
        remaining = {self._key.unpack(key)["addr"] for key in self._map if self._key.unpack(key)["ifindex"]}
        for key in keys:
            raw = self._key.unpack(key)["addr"]
            if raw not in remaining:
                self._map.delete(self._key.pack(ifindex=0, addr=raw))

    def _index(self, route: IPRoute, veth: str) -> int:
        found = route.link_lookup(ifname=veth)
        if not found:
            raise DatapathError(f"interface {veth} does not exist in the node's netns: name the host side of the workload's veth")
        return int(found[0])

    def _attach(self, route: IPRoute, veth: str, index: int) -> None:
        fd = _check(_libbpf.bpf_obj_get(os.fsencode(self._pin)), f"program {self._pin}")
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
