"""``python -m nodeagent.tc_load``: compile and verify bpf/veth.c, pin it, write its layouts, exit. Its maps are the node's
own, by their pins, so the loader must have run. The pinned program is what `tc` attaches to each veth."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from nodeagent.loader import attach, headers
from nodeagent.loader.layouts import nested

FILES = ("types.h", "maps.h", "common.h", "veth.c")
SCHED_CLS = 3  # BPF_PROG_TYPE_SCHED_CLS


def join(folder: Path, pins: Path) -> str:
    """The program with the maps it shares, as one text."""
    parts = ["#include <uapi/linux/bpf.h>\n", f'#define PL_PINS "{pins}/"\n']
    for name in FILES:
        parts += [f'#line 1 "bpf/{name}"\n', (folder / name).read_text()]
    return "".join(parts)


def load(bpf_dir: Path, folder: Path, layouts: Path) -> None:
    """Raises what BCC raises; an earlier program stays pinned then."""
    with tempfile.TemporaryDirectory(prefix="pillion-headers-") as tree:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers.make_tree(Path(tree)))
        from bcc import BPF  # here, so that importing this module costs no LLVM

        home = Path.cwd()
        module = BPF(text=join(folder, bpf_dir / "maps"), cflags=["-Wno-macro-redefined", "-Wno-unused-function"])
        os.chdir(home)
        fd = module.load_func("veth", SCHED_CLS).fd
    table = module.get_table("veths")
    (bpf_dir / "tc").mkdir(mode=0o700, exist_ok=True)
    fresh = layouts.with_name(layouts.name + ".new")
    fresh.write_text(json.dumps(nested(table.Key) | nested(table.Leaf)))
    os.replace(fresh, layouts)
    attach.pin(fd, bpf_dir / "tc" / "veth")


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="nodeagent.tc_load", description=__doc__)
    parser.add_argument("--bpf-dir", type=Path, required=True)
    parser.add_argument("--src", type=Path, required=True)
    parser.add_argument("--layouts", type=Path, required=True)
    args = parser.parse_args()
    try:
        load(args.bpf_dir, args.src, args.layouts)
    except Exception as error:  # BCC raises bare Exception
        print(f"veth.c does not load: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
