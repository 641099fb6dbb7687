"""The loader's pure parts: names out of types.h, the joined text, struct layouts, the header tree."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import pytest

from nodeagent.loader import child, headers, source
from nodeagent.loader.layouts import layout_of, nested
from nodeagent.loader.run import pack
from tests.bpf.world import ROOT

TYPES = (ROOT / "bpf" / "types.h").read_text()


class Inner(ctypes.Structure):
    _fields_ = (("w", ctypes.c_uint32 * 4),)


Inner.__name__ = "pl_addr"


class Outer(ctypes.Structure):
    _fields_ = (("small", ctypes.c_uint8), ("big", ctypes.c_uint64), ("where", Inner), ("ports", ctypes.c_uint16 * 3))


def test_enumerators_and_defines_are_numbers() -> None:
    found = source.constants(
        "#define PL_A 0x10 /* x */\n#define PL_B 3u\n#define PL_C PL_A\nenum e { PL_X, PL_Y = 5, /* c, d */ PL_Z };"
    )
    assert found == {"PL_A": 16, "PL_B": 3, "PL_X": 0, "PL_Y": 5, "PL_Z": 6}


def test_reasons_are_in_the_order_of_their_numbers() -> None:
    names = source.reasons(TYPES)
    constants = source.constants(TYPES)
    assert len(names) == constants["PL_R_COUNT"]
    assert all(constants[f"PL_R_{name.upper()}"] == number for number, name in enumerate(names))
    with pytest.raises(ValueError, match="pl_reason"):
        source.reasons("enum other { A };")


def test_the_text_names_files_and_pins() -> None:
    joined = child.join(ROOT / "bpf", Path("/sys/fs/bpf/x/maps"), source.FILES)
    assert '#define PL_PINS "/sys/fs/bpf/x/maps/"' in joined
    assert [line for line in joined.splitlines() if line.startswith("#line")] == [
        f'#line 1 "bpf/{name}"' for name in source.FILES
    ]
    with pytest.raises(ValueError, match="quotes"):
        child.join(ROOT / "bpf", Path('/tmp/"x'), source.FILES)


def test_padding_is_explicit_and_arrays_are_bytes() -> None:
    layout = layout_of(Outer)
    assert layout["format"] == "<B7xQ16s6s2x"
    assert layout["size"] == struct.calcsize(layout["format"]) == ctypes.sizeof(Outer)
    assert layout["fields"] == [["small", 0, 1, "u8"], ["big", 8, 8, "u64"], ["where", 16, 16, "addr"], ["ports", 32, 6, "bytes"]]
    assert layout_of(ctypes.c_uint)["fields"] == [["value", 0, 4, "u32"]]
    assert set(nested(Outer)) == {"Outer", "pl_addr"}
    assert pack({"format": "<IxxxxQ", "fields": [["a", 0, 4, "u32"], ["b", 8, 8, "u64"]]}, {"b": 2}) == struct.pack(
        "<IxxxxQ", 0, 2
    )


def test_the_header_tree_is_whole_and_can_be_made_again(tmp_path: Path) -> None:
    for _ in range(2):
        root = headers.make_tree(tmp_path)
    assert (root / "include/linux/kconfig.h").read_text().startswith("#define CONFIG_BPF_SYSCALL")
    assert (root / "include/asm/types.h").exists()
    with pytest.raises(FileNotFoundError, match="linux-libc-dev"):
        headers.make_tree(tmp_path / "other", machine="pdp11")
