"""Links, pins and maps through libbpf: attach once, replace atomically, remove. A link outlives the process by its pin
and is updated in place, so a reload leaves no moment without programs."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from nodeagent.libbpf import MapInfo, describe, libbpf


class LoadError(Exception):
    """Nothing new is attached; the text says what to do."""


class SchemaError(LoadError):
    """The pins are another version's."""


class Hook(NamedTuple):
    """Numbers of uapi/linux/bpf.h: enum bpf_prog_type, enum bpf_attach_type."""

    prog_type: int
    attach_type: int


HOOKS = {
    # What admits nothing by itself comes first: a half-attached set denies, it does not leak
    "egress": Hook(8, 1),
    "ingress": Hook(8, 0),
    "create": Hook(9, 2),
    "release": Hook(9, 34),
    "sockops": Hook(13, 3),
    "bind4": Hook(18, 8),
    "bind6": Hook(18, 9),
    "connect4": Hook(18, 10),
    "connect6": Hook(18, 11),
    "sendmsg4": Hook(18, 14),
    "sendmsg6": Hook(18, 15),
    "recvmsg4": Hook(18, 19),
    "recvmsg6": Hook(18, 20),
    "getpeername4": Hook(18, 29),
    "getpeername6": Hook(18, 30),
    "getsockopt": Hook(25, 21),
    "setsockopt": Hook(25, 22),
}


class LinkInfo(ctypes.Structure):
    """struct bpf_link_info of a cgroup link"""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("cgroup_id", ctypes.c_uint64),
        ("attach_type", ctypes.c_uint32),
        ("rest", ctypes.c_uint32 * 16),
    )


def check(result: int, what: str) -> int:
    """libbpf 1.x answers -errno."""
    if result < 0:
        raise LoadError(f"{what}: {os.strerror(-result)}")
    return result


def open_pin(path: Path) -> int | None:
    """A descriptor, None when there is no such pin."""
    fd = int(libbpf.bpf_obj_get(os.fsencode(path)))
    if fd == -errno.ENOENT:
        return None
    return check(fd, str(path))


def pin(fd: int, path: Path) -> None:
    """Pin, in place of what is pinned there."""
    fresh = path.with_name(path.name + "-new")
    fresh.unlink(missing_ok=True)
    check(libbpf.bpf_obj_pin(fd, os.fsencode(fresh)), f"pin {path}")
    os.rename(fresh, path)


def map_info(fd: int) -> MapInfo:
    """Type and sizes."""
    info = MapInfo()
    check(describe(fd, info), "map info")
    return info


def link_cgroup(fd: int) -> int:
    """The id of the cgroup a link is on; 0 when that is gone."""
    info = LinkInfo()
    check(describe(fd, info), "link info")
    return int(info.cgroup_id)


def read_map(fd: int, key: bytes, size: int) -> bytes | None:
    """One value."""
    value = ctypes.create_string_buffer(size)
    return value.raw if libbpf.bpf_map_lookup_elem(fd, key, value) == 0 else None


def write_map(fd: int, key: bytes, value: bytes) -> None:
    """One entry."""
    check(libbpf.bpf_map_update_elem(fd, key, value, 0), "map update")


def attach(name: str, prog_fd: int, cgroup: Path, directory: Path) -> None:
    """Put the program behind this hook's pinned link: in place if it is on this cgroup, else by a new link."""
    path = directory / "links" / name
    cgroup_fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    old = open_pin(path)
    try:
        if old is not None and link_cgroup(old) == os.fstat(cgroup_fd).st_ino:
            result = libbpf.bpf_link_update(old, prog_fd, None)
            if result == 0:
                return
            if result != -errno.ENOLINK:
                check(result, f"{name}: replace the program")
        link = check(libbpf.bpf_link_create(prog_fd, cgroup_fd, HOOKS[name].attach_type, None), f"{name}: attach to {cgroup}")
        try:
            pin(link, path)
        finally:
            os.close(link)
    finally:
        if old is not None:
            os.close(old)
        os.close(cgroup_fd)


def unload(directory: Path) -> None:
    """Detach every program and forget every map under ``directory``. What is gone already is fine."""
    for name in ("links", "progs", "tc", "express", "maps"):
        shutil.rmtree(directory / name, ignore_errors=True)
