"""BPF maps by their pinned paths: whole-map reads and writes in batches, through libbpf's thin wrappers of bpf(2).
Keys and values are bytes here; layouts.py says what is in them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path

from nodeagent.datapath_api import DatapathError, MapFull, SchemaMismatch
from nodeagent.libbpf import MapInfo, describe, libbpf

BATCH_ENTRIES = 4096
FULL = (errno.E2BIG, errno.ENOSPC)


class MapType(IntEnum):
    """enum bpf_map_type, as far as we use it."""

    HASH = 1
    ARRAY = 2
    PERCPU_ARRAY = 6
    LPM_TRIE = 11
    SK_STORAGE = 24
    RINGBUF = 27


_NO_PREALLOC = 1
MAPPABLE = 1 << 10  # BPF_F_MMAPABLE


class _BatchOpts(ctypes.Structure):
    """struct bpf_map_batch_opts (libbpf)"""

    _fields_ = (("sz", ctypes.c_size_t), ("elem_flags", ctypes.c_uint64), ("flags", ctypes.c_uint64))


def check(result: int, what: str) -> int:
    """libbpf 1.x returns -errno. Raises MapFull or DatapathError."""
    if result >= 0:
        return result
    if -result in FULL:
        raise MapFull(f"{what}: the map is full")
    raise DatapathError(f"{what}: {os.strerror(-result)}")


class BpfMap:
    """An open map. Not for concurrent use of one object; the kernel side is."""

    def __init__(self, fd: int, name: str = "") -> None:
        info = MapInfo()
        check(describe(fd, info), f"map {name}: info")
        self.fd = fd
        self.name = name or info.name.decode()
        self.type, self.id = info.type, info.id
        self.key_size, self.value_size, self.entries_max = info.key_size, info.value_size, info.max_entries
        self._batches = self.type in (MapType.HASH, MapType.ARRAY, MapType.LPM_TRIE)

    @classmethod
    def open(cls, path: Path) -> BpfMap:
        """By pin. Raises DatapathError."""
        fd = check(libbpf.bpf_obj_get(os.fsencode(path)), f"map {path}")
        os.set_inheritable(fd, False)
        return cls(fd, path.name)

    @classmethod
    def create(cls, kind: MapType, name: str, key_size: int, value_size: int, entries_max: int, flags: int = 0) -> BpfMap:
        """A map that nothing but this descriptor holds, until it is pinned. Raises DatapathError."""
        flags |= _NO_PREALLOC if kind == MapType.LPM_TRIE else 0

        class Opts(ctypes.Structure):  # struct bpf_map_create_opts up to map_flags
            _fields_ = (("sz", ctypes.c_size_t), ("before", ctypes.c_uint32 * 5), ("map_flags", ctypes.c_uint32))

        opts = Opts(ctypes.sizeof(Opts), (ctypes.c_uint32 * 5)(), flags)
        fd = libbpf.bpf_map_create(int(kind), name.encode()[:15], key_size, value_size, entries_max, ctypes.byref(opts))
        return cls(check(fd, f"make map {name}"), name)

    def pin(self, path: Path) -> None:
        """Keep the map under a bpffs path. Raises DatapathError."""
        check(libbpf.bpf_obj_pin(self.fd, os.fsencode(path)), f"pin {path}")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def expect(self, key_size: int, value_size: int) -> None:
        """Raises SchemaMismatch unless the map has these sizes (bytes)."""
        if (self.key_size, self.value_size) != (key_size, value_size):
            raise SchemaMismatch(
                f"map {self.name} has keys of {self.key_size} and values of {self.value_size} bytes, this version has "
                f"{key_size} and {value_size}: stop the other agent, then remove its bpf directory"
            )

    def get(self, key: bytes) -> bytes | None:
        """The value, or None. For per-CPU maps use `get_percpu`."""
        return self._lookup(key, self.value_size)

    def get_percpu(self, key: bytes, cpus: int) -> bytes | None:
        """The values of all possible CPUs, each padded to 8 bytes."""
        return self._lookup(key, (self.value_size + 7 & ~7) * cpus)

    def _lookup(self, key: bytes, size: int) -> bytes | None:
        value = ctypes.create_string_buffer(size)
        result = libbpf.bpf_map_lookup_elem(self.fd, key, value)
        if result == -errno.ENOENT:
            return None
        check(result, f"map {self.name}: lookup")
        return value.raw

    def put(self, key: bytes, value: bytes) -> None:
        """Raises MapFull, DatapathError."""
        self._sizes(key, value)
        check(libbpf.bpf_map_update_elem(self.fd, key, value, 0), f"map {self.name} (max {self.entries_max} entries): put")

    def delete(self, key: bytes) -> bool:
        """Whether it was there."""
        result = libbpf.bpf_map_delete_elem(self.fd, key)
        if result == -errno.ENOENT:
            return False
        check(result, f"map {self.name}: delete")
        return True

    def put_many(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """In order; stops at the first failure, those before it are in. Raises MapFull, DatapathError."""
        if not self._batches or len(entries) < 4:
            for key, value in entries:
                self.put(key, value)
            return
        for start in range(0, len(entries), BATCH_ENTRIES):
            part = entries[start : start + BATCH_ENTRIES]
            for key, value in part[:1]:
                self._sizes(key, value)
            keys, values = b"".join(key for key, _ in part), b"".join(value for _, value in part)
            if len(keys) != len(part) * self.key_size or len(values) != len(part) * self.value_size:
                raise DatapathError(f"map {self.name}: an entry has the wrong size; this is a bug")
            count = ctypes.c_uint32(len(part))
            opts = _BatchOpts(ctypes.sizeof(_BatchOpts), 0, 0)
            result = libbpf.bpf_map_update_batch(self.fd, keys, values, ctypes.byref(count), ctypes.byref(opts))
            check(result, f"map {self.name} (max {self.entries_max} entries): put {len(part)}")

    def _sizes(self, key: bytes, value: bytes) -> None:
        if len(key) != self.key_size or len(value) != self.value_size:
            raise DatapathError(
                f"map {self.name}: {len(key)}/{len(value)} bytes for {self.key_size}/{self.value_size}; this is a bug"
            )

    def __iter__(self) -> Iterator[bytes]:
        """Every key, one call each. Safe against changes: at worst some keys come twice or not at all."""
        previous: bytes | None = None
        seen = 0
        while seen <= 2 * self.entries_max:
            following = ctypes.create_string_buffer(self.key_size)
            result = libbpf.bpf_map_get_next_key(self.fd, previous, following)
            if result == -errno.ENOENT:
                return
            check(result, f"map {self.name}: next key")
            previous = following.raw
            seen += 1
            yield previous

    def items(self) -> dict[bytes, bytes]:
        """Everything in the map (not for per-CPU maps)."""
        if self.type != MapType.HASH:
            pairs = ((key, self.get(key)) for key in self)
            return {key: value for key, value in pairs if value is not None}
        return self._items_batch()

    def _items_batch(self) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        size = BATCH_ENTRIES
        opts = _BatchOpts(ctypes.sizeof(_BatchOpts), 0, 0)
        token, has_token = ctypes.create_string_buffer(max(4, self.key_size)), False
        keys = ctypes.create_string_buffer(self.key_size * size)
        values = ctypes.create_string_buffer(self.value_size * size)
        while True:
            count = ctypes.c_uint32(size)
            at = token if has_token else None
            result = libbpf.bpf_map_lookup_batch(self.fd, at, token, keys, values, ctypes.byref(count), ctypes.byref(opts))
            if result == -errno.ENOSPC:  # one bucket holds more than a batch
                size *= 2
                keys = ctypes.create_string_buffer(self.key_size * size)
                values = ctypes.create_string_buffer(self.value_size * size)
                continue
            if result != -errno.ENOENT:
                check(result, f"map {self.name}: read")
            has_token = True
            raw_keys, raw_values = keys.raw, values.raw
            for index in range(count.value):
                key = raw_keys[index * self.key_size : (index + 1) * self.key_size]
                found[key] = raw_values[index * self.value_size : (index + 1) * self.value_size]
            if result == -errno.ENOENT:
                return found

    def count(self) -> int:
        """Entries now."""
        return len(self.items()) if self.type == MapType.HASH else sum(1 for _ in self)


def open_all(directory: Path, names: Sequence[str]) -> dict[str, BpfMap]:
    """The pinned maps of these names. Raises DatapathError, none left open."""
    opened: dict[str, BpfMap] = {}
    try:
        for name in names:
            opened[name] = BpfMap.open(directory / name)
    except DatapathError:
        close_all(opened)
        raise
    return opened


def close_all(maps: Mapping[str, BpfMap]) -> None:
    """Close each."""
    for bpf_map in maps.values():
        bpf_map.close()
