"""The pinned maps of one data path, open, and what the agent knows to be in those it writes. Contents and order are
`datapath`'s; here they are carried out, and undone when the kernel refuses half way. One thread at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from nodeagent.datapath import PLANNED, Contents, MapOp, check_room, diff, inverse
from nodeagent.datapath_api import DatapathError
from nodeagent.layouts import Layouts
from nodeagent.maps import BpfMap, close_all, open_all

FILLED = (*PLANNED, "sources", "members", "listeners")  # what the agent writes, besides config
OPENED = (*FILLED, "config", "grants", "arriving", "datagrams", "origins", "conns", "counters", "events")


class MapSet:
    """Falsy while closed. ``observed``: what the filled maps hold, by name."""

    def __init__(self) -> None:
        self._maps: dict[str, BpfMap] = {}
        self._openness: Callable[[str, bytes | None], int] = lambda _name, _value: 0
        self.observed: Contents = {}
        self.ops_done = 0

    def open(self, directory: Path, layouts: Layouts, openness: Callable[[str, bytes | None], int]) -> None:
        """Use the pins of ``directory``. ``openness``: see `datapath.diff`. Raises DatapathError, SchemaMismatch."""
        self.close()
        self._maps, self._openness = open_all(directory, OPENED), openness
        self["members"].expect(8, layouts["pl_member"].size)
        self["dests"].expect(layouts["pl_dest_key"].size, layouts["pl_dest"].size)
        self["policy"].expect(layouts["pl_policy_key"].size, layouts["pl_policy"].size)
        self["config"].expect(4, layouts["pl_config"].size)
        self.observe()

    def close(self) -> None:
        close_all(self._maps)
        self._maps = {}

    def __bool__(self) -> bool:
        return bool(self._maps)

    def __getitem__(self, name: str) -> BpfMap:
        return self._maps[name]

    def observe(self) -> None:
        """Read again what is in the filled maps, whoever wrote it."""
        self.observed = {name: self[name].items() for name in FILLED}

    def used(self) -> dict[str, tuple[int, int]]:
        """Entries now and at most, of each filled map."""
        return {name: (len(self.observed[name]), self[name].entries_max) for name in FILLED}

    def difference(self, wanted: Contents) -> list[MapOp]:
        """What makes the maps of ``wanted`` hold it, in the safe order."""
        return diff(wanted, self.observed, self._openness)

    def check_room(self, ops: Iterable[MapOp]) -> None:
        """Raises MapFull."""
        check_room(ops, self.observed, {name: self[name].entries_max for name in FILLED})

    def put(self, name: str, entries: Mapping[bytes, bytes]) -> None:
        self.execute([MapOp(name, key, value) for key, value in entries.items() if self.observed[name].get(key) != value])

    def remove(self, name: str, key: bytes) -> None:
        if key in self.observed.get(name, {}):
            self.execute([MapOp(name, key, None)])

    def execute(self, ops: Sequence[MapOp]) -> None:
        """In order, neighbours of one map together. On failure what was done is undone, and the error raised."""
        done = 0
        try:
            for run in _runs(ops):
                done += len(run)
                bpf_map = self[run[0].map]
                if run[0].value is None:
                    for op in run:
                        bpf_map.delete(op.key)
                else:
                    bpf_map.put_many([(op.key, op.value) for op in run if op.value is not None])
        except DatapathError:
            for op in inverse(ops[:done], self.observed):
                if op.value is None:
                    self[op.map].delete(op.key)
                else:
                    self[op.map].put(op.key, op.value)
            raise
        for op in ops:
            if op.value is None:
                self.observed[op.map].pop(op.key, None)
            else:
                self.observed[op.map][op.key] = op.value
        self.ops_done += len(ops)


def _runs(ops: Sequence[MapOp]) -> Iterable[list[MapOp]]:
    """Neighbours of the same map and kind."""
    run: list[MapOp] = []
    for op in ops:
        if run and (op.map, op.value is None) != (run[0].map, run[0].value is None):
            yield run
            run = []
        run.append(op)
    if run:
        yield run
