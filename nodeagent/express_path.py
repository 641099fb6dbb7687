"""Express in the kernel: the programs of bpf/express*.c, loaded by a child, and everything the agent writes or reads around
them. Decides nothing: which connections are paired, and what tables say, comes from its caller. Every call may come from
any thread; those that touch sockets run on one thread of its own, in the sockets' network namespace."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nodeagent import counters, express_count, express_probes
from nodeagent.datapath_api import DatapathError, MapFull
from nodeagent.express_ops import OK, Enrolment, Operations
from nodeagent.express_stats import Name, Stat, Stats, bucket_floor_ns
from nodeagent.layouts import Layout, Layouts
from nodeagent.libbpf import libc
from nodeagent.loading import SOURCES, run_child
from nodeagent.maps import close_all, open_all

__all__ = ["OK", "Enrolment", "ExpressPath", "Stat", "Verdict", "bucket_floor_ns", "duplicate", "ends"]

MAPS = ("xrecords", "xheads", "xlegs", "xprograms", "xbuckets", "xloads", "xrows", "xacts", "xverdicts", "xstats", "xcounters")
ROW_FIRST = 2  # states 0 and 1 of each block have no row
NEXT_BYTES, ACTION_BYTES = 512, 4  # of a row: its edges, and behind them its action
SAMPLE_ALL = 65536  # `sample` is so many of these
SAMPLE = SAMPLE_ALL // 100
GROUPS_MAX = 4
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
MACHINE = "x86_64"  # elsewhere writes may be seen in another order, and system calls have other numbers
_MEMBARRIER, _MEMBARRIER_GLOBAL = 324, 1


class TableLike(Protocol):
    """mesh.express.dfa.Table"""

    @property
    def rows(self) -> Sequence[Any]: ...

    def relocate(self, base: int) -> list[bytes]: ...


class Verdict(NamedTuple):
    """name: what `stats` calls it; groups: (weight, bits of the endpoints) by weight, at most 4."""

    name: int
    groups: tuple[tuple[int, int], ...]


class ExpressPath:
    """``bpf_dir``: the bpffs with the node's pins; ``run_dir``: for layouts-express.json. Raises DatapathError with a
    reason for people where the kernel can not: express is off then, and nothing else."""

    def __init__(self, bpf_dir: Path, run_dir: Path) -> None:
        if platform.machine() != MACHINE:
            raise DatapathError(f"what its programs see of each other's writes was thought through for {MACHINE} alone")
        path = run_dir / "layouts-express.json"
        self._arguments = ["--bpf-dir", str(bpf_dir), "--src", str(SOURCES), "--layouts", str(path)]
        run_child("nodeagent.express_load", self._arguments)
        self._layouts = Layouts.read(path)
        self._maps = open_all(bpf_dir / "maps", MAPS)
        self._maps["xrecords"].expect(4, self._layouts["pl_xrecord"].size)
        self._maps["xprograms"].expect(4, self._layouts["pl_xprogram"].size)
        self._bpf_dir = bpf_dir
        self._lock = threading.Lock()
        self._cpus = counters.possible_cpus()
        self._ops = Operations(bpf_dir / "express" / "control", self._layouts)
        self._block = self._layouts.enums["PL_X_STATES"]  # rows; a table lies within one block
        blocks = range(0, self._maps["xrows"].entries_max * self._block, self._block)
        self._free = [(start + ROW_FIRST, start + self._block) for start in blocks]  # [from, to) without rows
        self._edges = mmap.mmap(self._maps["xrows"].fd, len(blocks) * self._block * NEXT_BYTES)
        self._actions = mmap.mmap(self._maps["xacts"].fd, len(blocks) * self._block * ACTION_BYTES)
        self._installed: dict[int, int] = {}  # base -> rows
        self._released: list[int] = []  # bases that programs may still step
        self._forgotten: list[int] = []  # records that programs may still write
        self._emptied: list[int] = []  # places that programs may still look at
        taken = {self._place(record) for record in self.records()}
        self._places = [place for place in reversed(range(self._maps["xrecords"].entries_max)) if place not in taken]
        self._stats = Stats(self._maps["xstats"], self._layouts, self._cpus)
        self._valid: dict[int, bool] = {}  # programs: False, no more, but their requests may be on their way
        self._verdicts: dict[int, set[bytes]] = {}
        self._start_afresh()

    def close(self) -> None:
        """The pairs go on; what needs an agent stops."""
        self._ops.close()
        self._edges.close()
        self._actions.close()
        close_all(self._maps)

    def _start_afresh(self) -> None:
        """A former agent's programs and verdicts are void: its tables are ours to overwrite, its numbers ours to give again,
        so what it counted under them is nobody's. Its records stay, its legs do not: workers ask anew."""
        for leg in list(self._maps["xlegs"]):
            self._maps["xlegs"].delete(leg)
        layout = self._layouts["pl_xprogram"]
        for index in range(self._maps["xprograms"].entries_max):
            key = _U32.pack(index)
            if layout.unpack(self._maps["xprograms"].get(key) or bytes(layout.size))["generation"]:
                self._maps["xprograms"].put(key, bytes(layout.size))
        for key in list(self._maps["xverdicts"]):
            self._maps["xverdicts"].delete(key)
        _grace()
        self._stats.clear()

    # ---- tables

    def install(self, table: TableLike) -> int:
        """Write a table's rows where there is room; their base. Raises MapFull."""
        count = len(table.rows)
        with self._lock:
            for index, (first, end) in enumerate(self._free):
                if end - first >= count:
                    self._free[index] = (first + count, end)
                    break
            else:
                raise MapFull(f"xrows: no {count} rows in one piece; {self.rows_free()} are free")
            for place, row in enumerate(table.relocate(first % self._block), first):
                self._edges[place * NEXT_BYTES : (place + 1) * NEXT_BYTES] = row[:NEXT_BYTES]
                self._actions[place * ACTION_BYTES : (place + 1) * ACTION_BYTES] = row[NEXT_BYTES:][:ACTION_BYTES]
            self._installed[first] = count
            return first

    def release(self, base: int) -> None:
        """No program that is valid uses these rows any more; their room is free after the next `reap`."""
        with self._lock:
            self._released.append(base)

    def rows_free(self) -> int:
        return sum(end - first for first, end in self._free)

    # ---- programs

    def put_program(
        self,
        index: int,
        *,
        generation: int,
        root: int,
        response: int,
        service: int,
        endpoints: Sequence[int],
        rate_per_s: int = 0,
        burst: int = 1,
        sample: int = SAMPLE,
        chooses: bool = True,
    ) -> None:
        """Valid from now on, under that generation alone. ``root``, ``response``: states (`Table.root_at(base)`);
        ``endpoints``: workload ids, at most 8; ``chooses``: by their load, for some verdict: then it is counted. An index in
        use may be put again under another generation only."""
        layout = self._layouts["pl_xprogram"]
        slots = self._layouts.enums["PL_X_SLOTS"]
        if not 0 < index < self._maps["xprograms"].entries_max or len(endpoints) > slots:
            raise DatapathError(f"program {index} with {len(endpoints)} endpoints: no such program; this is a bug")
        value = layout.pack(
            generation=generation,
            root=root,
            response=response,
            service=service,
            nendpoints=len(endpoints),
            sample=sample,
            rate_per_s=rate_per_s,
            burst=max(1, burst),
            endpoints=struct.pack(f"={slots}I", *endpoints, *(0,) * (slots - len(endpoints))),
            stamp=self._stamp(),
            chooses=chooses,
        )
        with self._lock:
            self._maps["xprograms"].put(_U32.pack(index), value)
            self._valid[index] = True

    def _stamp(self) -> int:
        """One that no program had, of a former agent's neither. The last is kept where no program is."""
        layout = self._layouts["pl_xprogram"]
        with self._lock:
            last = layout.unpack(self._maps["xprograms"].get(_U32.pack(0)) or bytes(layout.size))["stamp"]
            stamp: int = last % 0xFFFFFFFF + 1
            self._maps["xprograms"].put(_U32.pack(0), layout.pack(stamp=stamp))
        return stamp

    def drop_program(self, index: int) -> None:
        """Its records' requests go to user space; its verdicts are gone."""
        with self._lock:
            self._maps["xprograms"].put(_U32.pack(index), bytes(self._layouts["pl_xprogram"].size))
            if index in self._valid:
                self._valid[index] = False
        self.set_verdicts(index, {})

    def set_verdicts(self, index: int, verdicts: Mapping[tuple[int, int], Verdict]) -> None:
        """All of a program's, in place of those before: while the program is not valid, or with the same meaning.
        Keys are (rule, seen). Raises MapFull."""
        wanted = {
            self._layouts["pl_xverdict_key"].pack(program=index, rule=rule, seen=seen): self._verdict(verdict)
            for (rule, seen), verdict in verdicts.items()
        }
        with self._lock:
            for key in self._verdicts.pop(index, set()) - wanted.keys():
                self._maps["xverdicts"].delete(key)
            self._verdicts[index] = set(wanted)
            self._maps["xverdicts"].put_many(list(wanted.items()))

    def _verdict(self, verdict: Verdict) -> bytes:
        if not 0 < len(verdict.groups) <= GROUPS_MAX:
            raise DatapathError(f"a verdict has {len(verdict.groups)} groups, it may have 1 to {GROUPS_MAX}; this is a bug")
        total, flat = 0, []
        for weight, mask in verdict.groups:
            total += weight
            flat += [total, mask]
        group = struct.pack(f"={2 * GROUPS_MAX}I", *flat, *(0,) * (2 * GROUPS_MAX - len(flat)))
        return self._layouts["pl_xverdict"].pack(name=verdict.name, total=total, group=group)

    # ---- pairs

    def create_record(self, program: int, identity: int) -> int:
        """A record without sockets; its id. Raises MapFull."""
        record = secrets.randbits(63) | 1
        with self._lock:
            if not self._places:
                raise MapFull("xrecords: no place is free")
            place = self._places.pop()
        value = self._layouts["pl_xrecord"].pack(id=record, program=program, identity=identity, place=place)
        try:
            self._maps["xheads"].put(_U64.pack(record), self._layouts["pl_xhead"].pack(place=place))
        except DatapathError:
            with self._lock:
                self._places.append(place)
            raise
        self._maps["xrecords"].put(_U32.pack(place), value)
        return record

    def _place(self, record: int) -> int:
        """-1: there is no such record."""
        raw = self._maps["xheads"].get(_U64.pack(record))
        return -1 if raw is None else int(_U32.unpack_from(raw)[0])

    def create_leg(self) -> int:
        """A leg without sockets; its id. Raises MapFull."""
        leg = secrets.randbits(63) | 1
        self._maps["xlegs"].put(_U64.pack(leg), bytes(self._layouts["pl_xleg"].size))
        return leg

    def forget_leg(self, leg: int) -> None:
        """From now on everything of its sockets goes by TCP."""
        self._maps["xlegs"].delete(_U64.pack(leg))

    def enrol(self, netns_fd: int, enrolment: Enrolment) -> tuple[str, int]:
        """`enrol_all` of one."""
        return self._ops.enrol([(netns_fd, enrolment)])[0]

    def enrol_all(self, items: Sequence[tuple[int, Enrolment]]) -> list[tuple[str, int]]:
        """Enter connections into a record, each given with a descriptor of its netns: for each (OK or why not, key of the
        application's socket). Blocks for 1 to 2 ms, during which the proxy should pass nothing on. Requests go fast when
        both ends are settled as well: now, or by itself after a thread that sleeps in recv() has had a slow exchange."""
        return self._ops.enrol(items)

    def check(self, netns_fd: int, enrolment: Enrolment) -> str:
        """OK when the proxy has read and written nothing on its socket since it was armed; bytes may wait there."""
        return self._ops.check(netns_fd, enrolment)

    def set_program(self, record: int, program: int) -> str:
        """Judge the record's requests by another program from its next arm on. OK or no_record."""
        return self._ops.change("PROGRAM", record, program)

    def forget_record(self, record: int) -> None:
        """From now on everything of its sockets goes to user space. Its memory is free after the next `reap`."""
        self._ops.change("FORGET", record)
        with self._lock:
            self._forgotten.append(record)

    def reap(self) -> None:
        """Free what was forgotten, released and dropped. Waits some 10 ms for programs that may still run: call it each
        second or so, not on an event loop."""
        with self._lock:
            records, self._forgotten = self._forgotten, []
            emptied, self._emptied = self._emptied, []
            bases, self._released = self._released, []
            dropped = {index for index, valid in self._valid.items() if not valid}
            for index in dropped:
                del self._valid[index]
        if not records and not bases and not dropped and not emptied:
            return
        _grace()
        with self._lock:
            self._places += emptied
        for record in records:
            self._ops.change("FORGET", record)  # once more: a request that was being judged may have been counted since
            place = self._place(record)
            if place >= 0:
                self._maps["xrecords"].put(_U32.pack(place), bytes(self._layouts["pl_xrecord"].size))
                self._maps["xheads"].delete(_U64.pack(record))
                with self._lock:
                    self._emptied.append(place)
        with self._lock:
            dropped.difference_update(self._valid)
            self._stats.put_aside(dropped)
            pieces = sorted([*self._free, *((base, base + self._installed.pop(base)) for base in bases)])
            self._free = [pieces[0]]
            for first, end in pieces[1:]:
                if first == self._free[-1][1]:  # blocks never touch: their first rows are nobody's
                    self._free[-1] = (self._free[-1][0], end)
                else:
                    self._free.append((first, end))

    def records(self) -> list[int]:
        """Ids of all, a former agent's too."""
        return [int(_U64.unpack(key)[0]) for key in self._maps["xheads"]]

    def read_record(self, record: int) -> dict[str, Any] | None:
        """Fields of struct pl_xrecord; ``slots`` is a list of struct pl_xslot's."""
        place = self._place(record)
        raw = self._maps["xrecords"].get(_U32.pack(place)) if place >= 0 else None
        if raw is None:
            return None
        found = self._layouts["pl_xrecord"].unpack(raw)
        slot: Layout = self._layouts["pl_xslot"]
        found["slots"] = [slot.unpack(found["slots"][at:]) for at in range(0, len(found["slots"]), slot.size)]
        return found

    # ---- telling

    def probes(self) -> dict[str, str]:
        """Name -> "ok" or why not, of what this kernel does with redirected bytes. One that fails disqualifies the node.
        Takes some ms; seconds when something is wrong."""
        found = express_probes.run(self._bpf_dir / "maps", self._layouts["pl_xend"])
        if found["fionread"] == "ok" or self.counts:
            return found
        try:
            self.count()
        except DatapathError as error:
            return {**found, "fionread": f"{found['fionread']}; it can not be told: {str(error)[-200:]}"}
        return express_probes.run(self._bpf_dir / "maps", self._layouts["pl_xend"])

    @property
    def counts(self) -> bool:
        """Whether FIONREAD is told of redirected bytes, by a program of this node's, on a kernel that does not by itself."""
        return (self._bpf_dir / express_count.PINNED).exists()

    def count(self) -> None:
        """From now on. Raises DatapathError."""
        run_child("nodeagent.express_count", self._arguments)

    def counters(self) -> dict[str, int]:
        """By pl_xreason, lower case."""
        return counters.read(self._maps["xcounters"], self._layouts.reasons, self._cpus)

    def reasons(self) -> tuple[str, ...]:
        """Names of enum pl_xreason by number: what pl_xview.punt says."""
        return self._layouts.reasons

    def stats(self) -> dict[Name, Stat]:
        """(program, name, status) -> totals since the agent began."""
        return self._stats.read()

    def hello_layouts(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Struct name (pl_xview, pl_xarm) -> (`struct` format, field names), for mesh.link.Hello."""
        return {name: (self._layouts[name].format, self._layouts[name].fields) for name in ("pl_xview", "pl_xarm")}

    @property
    def option(self) -> int:
        """PL_OPT_EXPRESS"""
        return self._layouts.enums["PL_OPT_EXPRESS"]


def duplicate(fd: int) -> socket.socket:
    """Of a descriptor that a worker gave. Raises OSError for what is no socket of IP."""
    copy = os.dup(fd)
    try:
        sock = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        sock.close()
        raise OSError("not a socket of IP")
    return sock


def ends(fd: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """(local, remote) of a proxy's TCP socket, IPv4 in its short form."""
    with duplicate(fd) as sock:
        local, remote = (_plain(place) for place in (sock.getsockname(), sock.getpeername()))
    return local, remote


def _plain(place: tuple[Any, ...]) -> tuple[str, int]:
    return str(place[0]).removeprefix("::ffff:") if "." in place[0] else str(place[0]), int(place[1])


def _grace() -> None:
    """Every program that runs now has returned. membarrier's global form waits for just that."""
    if libc.syscall(_MEMBARRIER, _MEMBARRIER_GLOBAL, 0, 0):
        raise DatapathError(f"membarrier: {os.strerror(ctypes.get_errno())}")
