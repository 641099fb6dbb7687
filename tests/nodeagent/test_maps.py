"""BPF maps by batches, and what happens when they are full."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from nodeagent import counters
from nodeagent.datapath_api import DatapathError, MapFull, SchemaMismatch
from nodeagent.maps import BpfMap, MapType, open_all


@pytest.fixture
def hash_map() -> Iterator[BpfMap]:
    with closing(BpfMap.create(MapType.HASH, "t_hash", 8, 4, 10_000)) as made:
        yield made


def entries(count: int, first: int = 0) -> list[tuple[bytes, bytes]]:
    return [(struct.pack("=Q", n), struct.pack("=I", n)) for n in range(first, first + count)]


def test_what_is_written_is_read(hash_map: BpfMap) -> None:
    hash_map.put_many(entries(9000))
    assert hash_map.items() == dict(entries(9000))
    assert set(hash_map) == set(dict(entries(9000)))
    assert hash_map.get(struct.pack("=Q", 17)) == struct.pack("=I", 17)
    assert hash_map.delete(struct.pack("=Q", 17)) and not hash_map.delete(struct.pack("=Q", 17))
    assert hash_map.get(struct.pack("=Q", 17)) is None
    assert hash_map.count() == 8999


def test_a_full_map_says_so(hash_map: BpfMap) -> None:
    with pytest.raises(MapFull, match=r"t_hash \(max 10000 entries\)"):
        hash_map.put_many(entries(10_001))
    with pytest.raises(MapFull):
        hash_map.put(*entries(1, 20_000)[0])
    assert hash_map.count() == 10_000


def test_wrong_sizes_never_reach_the_kernel(hash_map: BpfMap) -> None:
    with pytest.raises(DatapathError, match="bug"):
        hash_map.put(b"short", b"1234")
    with pytest.raises(DatapathError, match="bug"):
        hash_map.put_many([*entries(8), (b"12345678", b"123")])
    with pytest.raises(SchemaMismatch, match="keys of 8"):
        hash_map.expect(12, 4)


def test_tries_and_arrays() -> None:
    with closing(BpfMap.create(MapType.LPM_TRIE, "t_lpm", 20, 4, 16)) as trie:
        content = {struct.pack("=I16s", 96 + n, bytes([n] * 16)): struct.pack("=I", n) for n in range(1, 6)}
        trie.put_many(list(content.items()))
        assert trie.items() == content and trie.count() == 5
    with closing(BpfMap.create(MapType.ARRAY, "t_array", 4, 8, 1)) as array:
        array.put(bytes(4), b"12345678")
        assert array.items() == {bytes(4): b"12345678"}


def test_counters_add_up_over_cpus() -> None:
    cpus = counters.possible_cpus()
    with closing(BpfMap.create(MapType.PERCPU_ARRAY, "t_percpu", 4, 8, 2)) as made:
        made._sizes = lambda *_: None  # type: ignore[method-assign]  # a per-CPU value is one for each
        made.put(struct.pack("=I", 1), struct.pack(f"={cpus}Q", *range(1, cpus + 1)))
        assert counters.read(made, ("first", "second"), cpus) == {"first": 0, "second": sum(range(1, cpus + 1))}


@pytest.mark.parametrize(("text", "count"), [("0\n", 1), ("0-3", 4), ("0-3,8,10-11", 7)])
def test_cpu_lists(text: str, count: int) -> None:
    assert counters.parse_cpus(text) == count


def test_the_exposition() -> None:
    text = counters.text({"captured": 3}, {"policy": (2, 10)}, {"map_full": 1})
    assert 'pillion_datapath_total{reason="captured"} 3\n' in text
    assert 'pillion_map_entries{map="policy"} 2\n' in text and 'pillion_map_entries_max{map="policy"} 10\n' in text
    assert "pillion_datapath_map_full 1\n" in text
    assert counters.text({"captured": 12_345_678}, {}, {}).count(" 12345678\n") == 1


def test_missing_pins_leave_nothing_open(tmp_path: object) -> None:
    from pathlib import Path

    with pytest.raises(DatapathError, match="config"):
        open_all(Path(str(tmp_path)), ("config",))
