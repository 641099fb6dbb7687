"""``python -m nodeagent.express_load``: compile and verify bpf/express*.c for the running kernel, pin the programs, attach
them to the sockhashes, write the layouts, exit. Uses the node's own maps by their pins, so the loader must have run."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from nodeagent import btf
from nodeagent.loader import attach, headers, source
from nodeagent.loader.layouts import nested
from nodeagent.loader.run import types_of
from nodeagent.maps import MAPPABLE, BpfMap, MapType

FILES = (
    "types.h", "maps.h", "common.h", "express.h", "express_map.h", "express_match.h", "express_choice.h", "express_client.h",
    "express_server.h", "express.c", "express_control.c",
)  # fmt: skip
SK_MSG, SCHED_CLS, SK_SKB = 16, 3, 14  # BPF_PROG_TYPE_*
MSG_VERDICT, SKB_VERDICT = 7, 38  # BPF_SK_*: attach types
ATTACHED = (
    ("xsocks", "express", MSG_VERDICT),
    ("xreads", "read", SKB_VERDICT),
    ("xprobes", "probe", MSG_VERDICT),
    ("xprobereads", "read", SKB_VERDICT),
)
ROWS = {"xrows": 512, "xacts": 4}  # bytes of a state
DESCRIBED = ("xrecords", "xends", "xprograms", "xverdicts", "xstats", "shapes")

_libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)


def join(folder: Path, pins: Path) -> str:
    """The programs with the maps they share, as one text."""
    parts = ["#include <uapi/linux/bpf.h>\n", f'#define PL_PINS "{pins}/"\n']
    for name in FILES:
        parts += [f'#line 1 "bpf/{name}"\n', (folder / name).read_text()]
    return "".join(parts)


def flags() -> list[str]:
    """What the C text takes from the running kernel. Raises btf.NoTypes."""
    found = {**btf.offsets(), "WOKEN_WAKE": btf.symbol("woken_wake_function")}
    return ["-Wno-macro-redefined", "-Wno-unused-function", *(f"-D{name}={value:#x}" for name, value in found.items())]


def describe(module: Any, types: str) -> dict[str, Any]:
    """Layouts and numbers, as nodeagent/layouts.py reads them."""
    structs: dict[str, Any] = {}
    for name in DESCRIBED:
        key, leaf = types_of(module, name)
        structs |= nested(key) | nested(leaf)
    constants = source.constants(types)
    count = constants["PL_XR_COUNT"]
    reasons = {value: name for name, value in constants.items() if name.startswith("PL_XR_") and name != "PL_XR_COUNT"}
    return {
        "structs": structs,
        "constants": constants,
        "reasons": [reasons[number].removeprefix("PL_XR_").lower() for number in range(count)],
    }


def make_tables(pins: Path, constants: dict[str, int]) -> None:
    """The two maps whose values are whole blocks, unless they are there."""
    for name, row_bytes in ROWS.items():
        if not (pins / name).exists():
            made = BpfMap.create(MapType.ARRAY, name, 4, constants["PL_X_STATES"] * row_bytes, constants["PL_X_BLOCKS"], MAPPABLE)
            made.pin(pins / name)
            made.close()


def load(bpf_dir: Path, folder: Path, layouts: Path) -> None:
    """Raises what BCC raises, LoadError and NoTypes; what was attached before then still is."""
    with tempfile.TemporaryDirectory(prefix="pillion-headers-") as tree:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers.make_tree(Path(tree)))
        make_tables(bpf_dir / "maps", source.constants((folder / "types.h").read_text()))
        from bcc import BPF, lib  # here, so that importing this module costs no LLVM

        home = Path.cwd()
        module = BPF(text=join(folder, bpf_dir / "maps"), cflags=flags())
        os.chdir(home)
        fds = {
            "express": module.load_func("express", SK_MSG).fd,
            "probe": module.load_func("express_probe", SK_MSG).fd,
            "read": module.load_func("express_read", SK_SKB).fd,
            "control": module.load_func("express_control", SCHED_CLS).fd,
        }
    described = describe(module, (folder / "types.h").read_text())
    fresh = layouts.with_name(layouts.name + ".new")
    fresh.write_text(json.dumps(described))
    os.replace(fresh, layouts)
    for name, program, kind in ATTACHED:
        table = lib.bpf_table_fd(module.module, name.encode())
        attach.check(_libbpf.bpf_prog_attach(fds[program], table, kind, 0), f"attach {program} to {name}")
    (bpf_dir / "express").mkdir(mode=0o700, exist_ok=True)
    for name, fd in fds.items():
        attach.pin(fd, bpf_dir / "express" / name)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="nodeagent.express_load", description=__doc__)
    parser.add_argument("--bpf-dir", type=Path, required=True)
    parser.add_argument("--src", type=Path, required=True)
    parser.add_argument("--layouts", type=Path, required=True)
    args = parser.parse_args()
    try:
        load(args.bpf_dir, args.src, args.layouts)
    except Exception as error:  # BCC raises bare Exception
        print(f"express does not load here: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
