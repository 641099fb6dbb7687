"""What the agent writes and reads around the express programs: rows, programs, verdicts, records, probes. What the programs do
with it is in tests/bpf/test_express*.py."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from lab.pace import SLOW
from mesh.express.dfa import Builder, Table
from mesh.express.response import RESPONSE
from nodeagent import btf, express_probes
from nodeagent.datapath_api import DatapathError, MapFull
from nodeagent.express_path import ExpressPath, Verdict, bucket_floor_ns
from nodeagent.express_probes import PROBES, Four
from nodeagent.layouts import Layout
from nodeagent.libbpf import libbpf
from nodeagent.maps import BpfMap, close_all, open_all
from tests.bpf.world import ROOT, cgroup_root

SO_COOKIE = 57
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """The ordinary programs' maps, pinned, with nobody under them."""
    tmp = Path(tempfile.mkdtemp(prefix="pillion-expresstest-"))
    cgroup = cgroup_root() / f"pillion-expresstest-{os.getpid()}" / "n1"
    (cgroup / "agent").mkdir(parents=True)
    (tmp / "bpf").mkdir()
    assert _libc.mount(b"bpf", os.fsencode(tmp / "bpf"), b"bpf", 0, b"mode=0700") == 0
    loader = [sys.executable, "-m", "nodeagent.loader", "--bpf-dir", str(tmp / "bpf")]
    try:
        more = ["--cgroup", str(cgroup), "--src", str(ROOT / "bpf"), "--layouts", str(tmp / "layouts.json")]
        subprocess.run([*loader, *more], cwd=ROOT, check=True, capture_output=True, timeout=60 * SLOW)
        yield tmp
    finally:
        subprocess.run([*loader, "--unload"], cwd=ROOT, check=False, capture_output=True, timeout=60 * SLOW)
        _libc.umount2(os.fsencode(tmp / "bpf"), 2)
        shutil.rmtree(tmp, ignore_errors=True)
        for path in (cgroup / "agent", cgroup, cgroup.parent):
            path.rmdir()


@pytest.fixture(scope="module")
def path(place: Path) -> Iterator[ExpressPath]:
    made = ExpressPath(place / "bpf", place)
    yield made
    made.close()


def chain(length: int) -> Table:
    """A table of ``length`` rows."""
    builder = Builder()
    root = builder.state()
    builder.chain(root, bytes(97 + index % 26 for index in range(length)), 1)
    table = builder.unminimised(root)
    assert len(table.rows) == length
    return table


def test_machines_of_another_kind_do_without(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(DatapathError, match="x86_64"):
        ExpressPath(place / "bpf", place)


def test_rows_are_written_where_there_is_room_and_come_back(path: ExpressPath) -> None:
    free, block = path.rows_free(), path._layouts.enums["PL_X_STATES"]
    assert free == 2 * block - 4
    bases = [path.install(chain(2000)) for _ in range(5)]
    assert bases == [2, 2002, 4002, 6002, block + 2]  # a table lies within one block
    assert path.rows_free() == free - 10_000
    for base in bases[1], bases[4]:
        row = chain(2000).relocate(base % block)[0]
        assert path._edges[base * 512 : base * 512 + 512] + path._actions[base * 4 : base * 4 + 4] == row[:516]
    with pytest.raises(MapFull, match="rows"):
        path.install(chain(block - 2001))
    path.release(bases[1])
    assert path.rows_free() == free - 10_000  # not before programs have left them
    path.reap()
    assert path.rows_free() == free - 8000
    assert path.install(chain(1500)) == bases[1]
    assert path.install(chain(500)) == bases[1] + 1500
    for base in (bases[0], bases[1], bases[1] + 1500, *bases[2:]):
        path.release(base)
    path.reap()
    assert path.rows_free() == free
    for base in [path.install(chain(block - 2)) for _ in range(2)]:  # each in one piece again
        path.release(base)
    path.reap()


def test_programs_have_limits(path: ExpressPath) -> None:
    fields = {"generation": 1, "root": 2, "response": 3, "service": 4}
    path.put_program(7, endpoints=[1, 2, 3], **fields)
    raw = path._maps["xprograms"].get(struct.pack("=I", 7))
    assert raw is not None
    found = path._layouts["pl_xprogram"].unpack(raw)
    assert (found["nendpoints"], found["endpoints"][:12], found["burst"]) == (3, struct.pack("=3I", 1, 2, 3), 1)
    for index, endpoints in ((0, [1]), (4096, [1]), (7, list(range(9)))):
        with pytest.raises(DatapathError, match="this is a bug"):
            path.put_program(index, endpoints=endpoints, **fields)


def test_verdicts_are_replaced_whole(path: ExpressPath) -> None:
    path.set_verdicts(9, {(1, 0): Verdict(5, ((1, 1),)), (2, 3): Verdict(6, ((1, 1), (9, 2)))})
    mine = {key: value for key, value in path._maps["xverdicts"].items().items() if key[:4] == struct.pack("=I", 9)}
    assert len(mine) == 2
    layout = path._layouts["pl_xverdict"]
    found = {layout.unpack(value)["name"]: layout.unpack(value) for value in mine.values()}
    assert found[6]["total"] == 10 and found[6]["group"][:16] == struct.pack("=4I", 1, 1, 10, 2)
    path.set_verdicts(9, {(1, 0): Verdict(7, ((1, 1),))})
    assert sum(key[:4] == struct.pack("=I", 9) for key in path._maps["xverdicts"]) == 1
    path.drop_program(9)
    assert not any(key[:4] == struct.pack("=I", 9) for key in path._maps["xverdicts"])
    with pytest.raises(DatapathError, match="groups"):
        path.set_verdicts(9, {(1, 0): Verdict(7, ())})


def test_records_come_and_go(path: ExpressPath) -> None:
    one, two = path.create_record(1, 301), path.create_record(2, 302)
    assert {one, two} <= set(path.records())
    record = path.read_record(one)
    assert record is not None and (record["program"], record["identity"], len(record["slots"])) == (1, 301, 8)
    assert path.set_program(one, 5) == "ok"
    record = path.read_record(one)
    assert record is not None and record["program"] == 5
    path.forget_record(one)
    record = path.read_record(one)
    assert record is not None and record["off"] == 1  # what still runs may write there
    path.reap()
    assert path.read_record(one) is None and path.read_record(two) is not None
    assert path.set_program(one, 5) == "no_record"
    path.forget_record(two)
    path.reap()


def test_a_new_agent_voids_the_programs_and_keeps_the_records(place: Path, path: ExpressPath) -> None:
    path.put_program(11, generation=3, root=2, response=3, service=4, endpoints=[1])
    path.set_verdicts(11, {(1, 0): Verdict(5, ((1, 1),))})
    record = path.create_record(11, 301)
    (place / "second").mkdir()
    fresh = ExpressPath(place / "bpf", place / "second")
    try:
        assert record in fresh.records()
        assert not any(fresh._maps["xprograms"].get(struct.pack("=I", 11)) or b"")
        assert not list(fresh._maps["xverdicts"])
        fresh.install(RESPONSE)
    finally:
        fresh.forget_record(record)
        fresh.reap()
        fresh.close()


def test_a_new_agent_does_not_count_what_a_former_one_numbered(place: Path, path: ExpressPath) -> None:
    """Program 1 is another caller's or service's now: what it carried then would be told as this one's."""
    key = path._layouts["pl_xstat_key"].pack(program=1, name=0, status=200)
    value = path._layouts["pl_xstat"].pack(requests=7) * path._cpus
    assert libbpf.bpf_map_update_elem(path._maps["xstats"].fd, key, value, 0) == 0
    (place / "third").mkdir()
    fresh = ExpressPath(place / "bpf", place / "third")
    assert not fresh.stats()
    fresh.close()


def test_without_the_ordinary_programs_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DatapathError, match="express does not load here"):
        ExpressPath(tmp_path, tmp_path)


def test_buckets_are_good_to_ten_percent(path: ExpressPath) -> None:
    floors = [bucket_floor_ns(index) for index in range(path._layouts.enums["PL_X_BUCKETS"])]
    assert floors == sorted(set(floors)) and floors[0] == 0
    assert all((high - low) / 2 / low <= 0.0626 for low, high in pairwise(floors[8:]))
    assert floors[8] == 1024 and floors[-1] > 100 * 10**9


# ---- probes


def test_every_probe_passes_here(path: ExpressPath) -> None:
    assert path.probes() == dict.fromkeys(PROBES, "ok")


def run(path: ExpressPath, place: Path, make: Callable[[dict[str, BpfMap], Layout], Four]) -> dict[str, str]:
    return express_probes.run(place / "bpf" / "maps", path._layouts["pl_xend"], make)


def test_without_redirection_no_probe_passes(path: ExpressPath, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Four):
        def redirect(self) -> None:
            """Leave them as they are."""

        read_all = redirect

    monkeypatch.setattr(express_probes, "WAIT_S", 0.1)
    found = run(path, place, Plain)
    assert set(found) == set(PROBES) and "ok" not in found.values()
    assert found["epoll"] == "no event for redirected"


class Wrong:
    """A socket of which something is not as it should be."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


class Deaf(Wrong):
    """Its end comes before its bytes."""

    def recv(self, count: int) -> bytes:
        return b""


class Cut(Wrong):
    """Closing one direction closes both."""

    cut = False

    def shutdown(self, how: int) -> None:
        self._sock.shutdown(how)
        self.cut = True

    def recv(self, count: int) -> bytes:
        return b"" if self.cut else self._sock.recv(count)


class Again(Wrong):
    """Reads what it has read."""

    def recv(self, count: int) -> bytes:
        return bytes(self._sock.recv(count).replace(b" last", b" and last"))


class Loud(Wrong):
    """A send to a dead target fails, as an unchecked redirect makes it."""

    count = 0

    def sendall(self, data: bytes) -> None:
        self.count += 1
        if self.count > 1:
            raise PermissionError(13, "Permission denied")
        self._sock.sendall(data)


@pytest.mark.parametrize(
    ("probe", "kind", "says"),
    [
        ("fin_order", Deaf, "before the end"),
        ("half_close", Cut, "the response"),
        ("dead_target", Loud, "heard Permission denied"),
        ("data_before", Deaf, "what came before"),
        ("sent_again", Again, "bytes sent twice"),
    ],
)
def test_each_probe_sees_its_fault(
    path: ExpressPath, place: Path, monkeypatch: pytest.MonkeyPatch, probe: str, kind: type[Wrong], says: str
) -> None:
    class Faulty(Four):
        def read_all(self) -> None:
            super().read_all()
            self.client = kind(self.client)  # type: ignore[assignment]  # a stand-in

    monkeypatch.setattr(express_probes, "WAIT_S", 0.2)
    monkeypatch.setattr(express_probes, "PROBES", {probe: PROBES[probe]})
    assert says in run(path, place, Faulty)[probe]


def test_a_count_of_bytes_that_is_wrong_is_seen(path: ExpressPath, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Linux 6.1 with redirected bytes, and on 6.18 with TCP's own where there is no second map."""
    ioctl = fcntl.ioctl

    def none(sock: socket.socket, what: int, number: object) -> object:
        return 0 if what == termios.FIONREAD else ioctl(sock, what, number)  # type: ignore[call-overload]  # as it came

    monkeypatch.setattr(express_probes, "WAIT_S", 0.2)
    monkeypatch.setattr(express_probes, "PROBES", {"fionread": PROBES["fionread"]})
    monkeypatch.setattr(fcntl, "ioctl", none)
    assert run(path, place, Four) == {"fionread": "redirected bytes: FIONREAD says 0 of 10 bytes"}


def test_where_the_count_is_wrong_it_is_told_and_tried_again(path: ExpressPath, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [{"fionread": "FIONREAD says 0", "epoll": "ok"}, {"fionread": "ok", "epoll": "ok"}]
    asked: list[str] = []
    monkeypatch.setattr(express_probes, "run", lambda *_: said[len(asked)])
    monkeypatch.setattr(ExpressPath, "counts", False)
    monkeypatch.setattr(ExpressPath, "count", lambda self: asked.append("count"))
    assert path.probes() == said[1] and asked == ["count"]

    def refused(self: ExpressPath) -> None:
        raise DatapathError("lockdown")

    asked.clear()
    monkeypatch.setattr(ExpressPath, "count", refused)
    assert path.probes() == {"fionread": "FIONREAD says 0; it can not be told: lockdown", "epoll": "ok"}


def test_most_of_a_long_segment_sent_again_is_read_once(path: ExpressPath, place: Path) -> None:
    """The kernel cuts some 4 KB at a time."""
    data, got = os.urandom(35_000), bytearray()
    maps = open_all(place / "bpf" / "maps", express_probes.MAPS)

    def work() -> None:
        four = Four(maps, path._layouts["pl_xend"])
        four.redirect()
        four.read_all()
        four.accepted.sendall(data[:30_000])
        four.accepted = express_probes.rewound(four.accepted, 25_000)
        four.accepted.sendall(data[5000:])
        while len(got) < len(data) and (piece := four.client.recv(1 << 16)):
            got.extend(piece)
        four.close()

    before = path.counters()["sent_again"]
    express_probes.alone(work)
    close_all(maps)
    assert bytes(got) == data
    assert path.counters()["sent_again"] == before + 1


@pytest.mark.parametrize("read", [0, 4, 9])
def test_what_is_sent_again_to_a_socket_that_was_forgotten(path: ExpressPath, place: Path, read: int) -> None:
    """As the map forgets the one not heard of for longest; of what it was sent, something may wait unread."""
    maps = open_all(place / "bpf" / "maps", (*express_probes.MAPS, "xnexts"))
    said = bytearray()

    def work() -> None:
        four = Four(maps, path._layouts["pl_xend"])
        four.redirect()
        four.read_all()
        four.server.sendall(b"redirected")
        assert four.client.recv(10) == b"redirected"
        four.accepted.sendall(b"first and")
        four.server.sendall(b" then")
        said.extend(four.client.recv(read) if read else b"")
        assert maps["xnexts"].delete(four.client.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
        four.accepted = express_probes.rewound(four.accepted, 4)
        four.accepted.sendall(b" and last")
        while len(said) < len("first and then last") and (piece := four.client.recv(1 << 16)):
            said.extend(piece)
        four.close()

    express_probes.alone(work)
    close_all(maps)
    assert said == b"first and then last"


def test_epoll_without_events_is_seen(path: ExpressPath, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def __enter__(self) -> Silent:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def register(self, *_: object) -> None:
            pass

        def poll(self, _timeout: float) -> list[tuple[int, int]]:
            return []

    monkeypatch.setattr(select, "epoll", Silent)
    monkeypatch.setattr(express_probes, "PROBES", {"epoll": PROBES["epoll"]})
    assert run(path, place, Four)["epoll"] == "no event for redirected"


# ---- the kernel's own types


def test_every_offset_is_found_on_this_kernel() -> None:
    found = btf.offsets()
    assert set(found) == set(btf.WANTED)
    assert all(0 <= offset < 4096 for offset in found.values())


@pytest.mark.parametrize(("struct_", "field"), [("pl_nothing", "x"), ("tcp_sock", "inet_conn.nothing"), ("tcp_sock", "nothing")])
def test_what_the_kernel_does_not_have_is_named(struct_: str, field: str) -> None:
    types = btf.Btf()
    with pytest.raises(btf.NoTypes, match=f"{struct_}"):
        types.offset(struct_, field)
    types.close()


def test_symbols(tmp_path: Path) -> None:
    table = tmp_path / "kallsyms"
    table.write_text("ffffffff00000010 t other\nffffffff00000020 T woken_wake_function\nffffffff30 T woken_wake_function\t[m]\n")
    assert btf.symbol("woken_wake_function", table) == 0xFFFFFFFF00000020
    table.write_text("0000000000000000 T woken_wake_function\n")
    assert btf.symbol("woken_wake_function", table) == 0
    assert btf.symbol("nothing", table) == 0
