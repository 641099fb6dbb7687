"""The include tree that lets BCC compile network programs on a node without kernel headers.

BCC brings its own linux/bpf.h; the rest it asks for is either empty for us or comes from linux-libc-dev.
"""

from __future__ import annotations

import platform
from pathlib import Path

INCLUDE = Path("/usr/include")
ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}  # uname's name -> the kernel's folder
FROM_LIBC = ("bpf_common", "stddef", "posix_types", "version")
TYPES = """#pragma once
#include "{types}"
typedef __s8 s8; typedef __u8 u8; typedef __s16 s16; typedef __u16 u16;
typedef __s32 s32; typedef __u32 u32; typedef __s64 s64; typedef __u64 u64;
typedef _Bool bool; typedef unsigned long size_t; typedef unsigned long uintptr_t;
#ifndef NULL
#define NULL ((void *)0)
#endif
"""


def make_tree(root: Path, machine: str | None = None) -> Path:
    """Write the tree under ``root`` and return what BCC_KERNEL_SOURCE shall be. Raises FileNotFoundError: no linux-libc-dev."""
    machine = machine or platform.machine()
    folder = ARCHITECTURES.get(machine, machine)
    include, arch = root / "include", root / "arch" / folder / "include"
    for directory in (include / "linux", include / "generated", include / "uapi" / "linux", arch / "asm", arch / "generated"):
        directory.mkdir(parents=True, exist_ok=True)
    (include / "linux" / "kconfig.h").write_text("#define CONFIG_BPF_SYSCALL 1\n")
    (arch / "asm" / "page.h").write_text("")
    for empty in ("uapi/linux/bpf.h", "uapi/linux/if_packet.h", "linux/log2.h"):
        (include / empty).write_text("#pragma once\n")
    asm = INCLUDE / f"{machine}-linux-gnu" / "asm"
    wanted = {include / "asm": asm, include / "asm-generic": INCLUDE / "asm-generic"}
    wanted |= {include / "linux" / f"{name}.h": INCLUDE / "linux" / f"{name}.h" for name in FROM_LIBC}
    for link, target in wanted.items():
        if not target.exists():
            raise FileNotFoundError(f"{target} is missing: install linux-libc-dev")
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    (include / "linux" / "types.h").write_text(TYPES.format(types=INCLUDE / "linux" / "types.h"))
    return root
