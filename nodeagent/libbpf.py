"""The C libraries that the agent and its loader call by hand, and what both ask of them. What a result means is the caller's
to say: libbpf answers -errno."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

BPFFS_MAGIC = 0xCAFE4A11

libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
libc = ctypes.CDLL(None, use_errno=True)


class MapInfo(ctypes.Structure):
    """The head of struct bpf_map_info (uapi/linux/bpf.h)."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
    )


def describe(fd: int, info: ctypes.Structure) -> int:
    """Fills ``info``, the struct bpf_…_info of what the descriptor is of. 0 or -errno."""
    length = ctypes.c_uint32(ctypes.sizeof(info))
    return int(libbpf.bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(length)))


def is_bpffs(path: Path) -> bool:
    """Whether the path lies on a BPF filesystem."""
    answer = (ctypes.c_long * 32)()  # struct statfs begins with f_type
    return libc.statfs(os.fsencode(path), answer) == 0 and answer[0] == BPFFS_MAGIC
