"""A node's pinned maps from outside: what the tests break on purpose, and put right again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nodeagent.datapath_api import MapFull
from nodeagent.layouts import Layouts, address
from nodeagent.maps import BpfMap
from tests.e2e.mesh import Mesh

JUNK_AT_ONCE = 1024
TCP = 6


class Kernel:
    """One node's maps. Numbers (ids, virtual addresses) are the controller's."""

    def __init__(self, mesh: Mesh, node: str) -> None:
        self._mesh, self._node = mesh, node
        self._run = mesh.lab.paths.agent_run(node)
        self.layouts = Layouts.read(self._run / "layouts.json")
        self._items = mesh.lab.controller_api("GET", "/v1/state")["items"]

    def open(self, name: str) -> BpfMap:
        return BpfMap.open(self._run / "bpf" / "maps" / name)

    def vip(self, service: str) -> str:
        """The IPv4 one."""
        vips: list[str] = self._items[f"Service/shop/{service}"]["vips"]
        return next(vip for vip in vips if ":" not in vip)

    def dest(self, at: str, port: int) -> bytes:
        """Key of `dests`."""
        return self.layouts["pl_dest_key"].pack(addr=address(at), port=port, proto=TCP)

    def backends(self, at: str, port: int) -> list[bytes]:
        """Keys of `backends` behind a native destination."""
        dest = self.layouts["pl_dest"].unpack(self.value("dests", self.dest(at, port)))
        pack = self.layouts["pl_backend_key"].pack
        return [pack(service=dest["service"], port=port, slot=slot) for slot in range(dest["backends"])]

    def policy(self, workload: str, source: str, port: int) -> bytes:
        """Key of `policy`, for what ``source`` may do at ``workload``."""
        to, who = self._items[f"Workload/shop/{workload}"], self._items[f"Workload/shop/{source}"]
        return self.layouts["pl_policy_key"].pack(workload=to["id"], identity=who["identity"], port=port, proto=TCP)

    def member(self, workload: str) -> bytes:
        """Key of `members`: the cgroup's id."""
        return Path(self._mesh.w[workload].cgroup).stat().st_ino.to_bytes(8, "little")

    def netns(self, workload: str) -> int:
        """Cookie of the netns of a workload here."""
        return int(self.layouts["pl_member"].unpack(self.value("members", self.member(workload)))["netns"])

    def listener(self, workload: str) -> bytes:
        """Key of `listeners`."""
        return self.netns(workload).to_bytes(8, "little")

    def dials(self, workload: str, port: int) -> list[bytes]:
        """Keys of `dials`: where the proxy may dial this workload."""
        pack, netns = self.layouts["pl_dial_key"].pack, self.netns(workload)
        return [pack(netns=netns, addr=address(at), port=port) for at in self._mesh.w[workload].addresses]

    def value(self, name: str, key: bytes) -> bytes:
        opened = self.open(name)
        try:
            value = opened.get(key)
            assert value is not None, f"{name} has no {key.hex()}"
            return value
        finally:
            opened.close()

    @contextmanager
    def agent_paused(self) -> Iterator[None]:
        """The agent repairs its maps every few seconds: not meanwhile."""
        (pid,) = self._mesh.lab.pids(self._node, "agent")
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def remove(self, name: str, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """What was there and is no more. Each must be there."""
        opened = self.open(name)
        try:
            removed = {}
            for key in keys:
                value = opened.get(key)
                assert value is not None, f"{name} has no {key.hex()}"
                removed[key] = value
                opened.delete(key)
            return removed
        finally:
            opened.close()

    @contextmanager
    def without(self, name: str, keys: Iterable[bytes]) -> Iterator[None]:
        """These entries are gone meanwhile; nobody but us puts them back."""
        with self.agent_paused():
            removed = self.remove(name, keys)
            try:
                yield
            finally:
                opened = self.open(name)
                opened.put_many(list(removed.items()))
                opened.close()

    @contextmanager
    def configured(self, **fields: int) -> Iterator[None]:
        """The one entry of `config` says this meanwhile."""
        key, layout = bytes(4), self.layouts["pl_config"]
        with self.agent_paused():
            opened = self.open("config")
            before = opened.get(key)
            assert before is not None
            opened.put(key, layout.pack(**{**layout.unpack(before), **fields}))
            try:
                yield
            finally:
                opened.put(key, before)
                opened.close()

    @contextmanager
    def full(self, name: str) -> Iterator[None]:
        """A map that has no room for one entry more."""
        opened = self.open(name)
        junk: list[bytes] = []

        def put(count: int) -> bool:
            keys = [os.urandom(opened.key_size) for _ in range(count)]
            junk.extend(keys)
            try:
                opened.put_many([(key, bytes(opened.value_size)) for key in keys])
            except MapFull:
                return False
            return True

        try:
            while put(JUNK_AT_ONCE):
                assert len(junk) <= 2 * opened.entries_max
            while put(1):
                pass
            yield
        finally:
            for key in junk:
                opened.delete(key)
            opened.close()
