"""Express's maps on a node, made wrong in one place and put right again: so that a test shows it would see that."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from nodeagent.counters import possible_cpus
from nodeagent.layouts import Layouts
from nodeagent.maps import BpfMap
from tests.e2e.mesh import Mesh

MARKS, PUNT = 0xC000, 0  # ACT and LOOP of mesh.express.dfa
ROW_BYTES = 512  # 256 edges of two bytes

_libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)

Write = Callable[[], None]


class Tamper:
    """Of the program that one service has on node n1."""

    def __init__(self, mesh: Mesh, service: str) -> None:
        run = mesh.lab.paths.agent_run("n1")
        self._maps = run / "bpf" / "maps"
        self._layouts = Layouts.read(run / "layouts-express.json")
        self._items = mesh.lab.controller_api("GET", "/v1/state")["items"]
        self._service = self._items[f"Service/shop/{service}"]["id"]

    @contextmanager
    def _open(self, name: str) -> Iterator[BpfMap]:
        found = BpfMap.open(self._maps / name)
        try:
            yield found
        finally:
            found.close()

    def program(self) -> tuple[int, int]:
        """Its number and its table's root."""
        layout = self._layouts["pl_xprogram"]
        with self._open("xprograms") as programs:
            for index in range(1, programs.entries_max):
                found = layout.unpack(programs.get(index.to_bytes(4, "little")) or bytes(layout.size))
                if found["generation"] and found["service"] == self._service:
                    return index, found["root"]
        raise AssertionError("the kernel has no program of this service")

    @contextmanager
    def _rows(self) -> Iterator[mmap.mmap]:
        with self._open("xrows") as rows:
            table = mmap.mmap(rows.fd, rows.entries_max * rows.value_size)
            try:
                yield table
            finally:
                table.close()

    def edge(self, to: bytes, like: bytes) -> tuple[Write, Write]:
        """Two writes: one that changes one edge, one that undoes it. The last edge of the table's way over `to` shall lead
        where that of the way over `like` does."""
        _, root = self.program()
        block, state = divmod(root, self._layouts.enums["PL_X_STATES"])
        first = block * self._layouts.enums["PL_X_STATES"]
        with self._rows() as rows:

            def follow(text: bytes) -> tuple[int, int]:
                """The place of the last edge, and where it leads."""
                at, place, edge = state, 0, state
                for number, byte in enumerate(text):
                    place = (first + at) * ROW_BYTES + 2 * byte
                    edge = int.from_bytes(rows[place : place + 2], "little")
                    at = edge & ~MARKS
                    assert at > PUNT or number == len(text) - 1, f"{text!r} is no way"
                return place, edge

            place, old = follow(to)
            _, new = follow(like)
        assert old != new, "nothing would change"

        def write(edge: int) -> None:
            with self._rows() as rows:
                rows[place : place + 2] = edge.to_bytes(2, "little")

        return partial(write, new), partial(write, old)

    def statistics(self, *, more: int = 0, status: int = 0) -> None:
        """One of the program's counters made wrong: `more` requests, or counted as another status."""
        index, _ = self.program()
        cpus = possible_cpus()
        layout = self._layouts["pl_xstat_key"]
        with self._open("xstats") as stats:
            keys = [key for key in stats if layout.unpack(key)["program"] == index]
            key = next(key for key in keys if layout.unpack(key)["status"] == 200)
            values = stats.get_percpu(key, cpus)
            assert values is not None
            requests = int.from_bytes(values[:8], "little")
            if status:
                stats.delete(key)
                key = layout.pack(**{**layout.unpack(key), "status": status})
            changed = (requests + more).to_bytes(8, "little") + values[8:]
            result = _libbpf.bpf_map_update_elem(stats.fd, key, changed, 0)
            assert result == 0, os.strerror(-result)
