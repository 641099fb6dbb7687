"""``python -m nodeagent.express_load``: compile and verify bpf/express*.c for the running kernel, pin the programs, attach
them to the sockhashes, write the layouts, exit. Uses the node's own maps by their pins, so the loader must have run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nodeagent import btf
from nodeagent.libbpf import libbpf
from nodeagent.loader import attach, child, source
from nodeagent.loader.layouts import nested
from nodeagent.loader.run import types_of
from nodeagent.maps import MAPPABLE, BpfMap, MapType

FILES = (
    "types.h", "maps.h", "common.h", "express.h", "express_map.h", "express_match.h", "express_choice.h", "express_client.h",
    "express_server.h", "express_leg.h", "express.c", "express_control.c", "express_leg_control.c",
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
DESCRIBED = ("xrecords", "xheads", "xlegs", "xends", "xprograms", "xverdicts", "xstats", "shapes")


def flags() -> list[str]:
    """What the C text takes from the running kernel. Raises btf.NoTypes."""
    found = {
        **btf.offsets(),
        "WOKEN_WAKE": btf.symbol("woken_wake_function"),
        "SOCK_ZEROCOPY": btf.number("sock_flags", "SOCK_ZEROCOPY"),
    }
    return [f"-D{name}={value:#x}" for name, value in found.items()]


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
    make_tables(bpf_dir / "maps", source.constants((folder / "types.h").read_text()))
    with child.compiled(child.join(folder, bpf_dir / "maps", FILES), flags()) as module:
        fds = {
            "express": module.load_func("express", SK_MSG).fd,
            "probe": module.load_func("express_probe", SK_MSG).fd,
            "read": module.load_func("express_read", SK_SKB).fd,
            "control": module.load_func("express_control", SCHED_CLS).fd,
        }
        child.write_layouts(layouts, describe(module, (folder / "types.h").read_text()))
        from bcc import lib  # loaded by now

        for name, program, kind in ATTACHED:
            table = lib.bpf_table_fd(module.module, name.encode())
            attach.check(libbpf.bpf_prog_attach(fds[program], table, kind, 0), f"attach {program} to {name}")
        (bpf_dir / "express").mkdir(mode=0o700, exist_ok=True)
        for name, fd in fds.items():
            attach.pin(fd, bpf_dir / "express" / name)


if __name__ == "__main__":
    raise SystemExit(child.main("nodeagent.express_load", __doc__, load, "express"))
