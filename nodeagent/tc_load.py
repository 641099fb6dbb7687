"""``python -m nodeagent.tc_load``: compile and verify bpf/veth.c, pin it, write its layouts, exit. Its maps are the node's
own, by their pins, so the loader must have run. The pinned program is what `tc` attaches to each veth."""

from __future__ import annotations

from pathlib import Path

from nodeagent.loader import attach, child
from nodeagent.loader.layouts import nested

FILES = ("types.h", "maps.h", "common.h", "veth.c")
SCHED_CLS = 3  # BPF_PROG_TYPE_SCHED_CLS


def load(bpf_dir: Path, folder: Path, layouts: Path) -> None:
    """Raises what BCC raises; an earlier program stays pinned then."""
    with child.compiled(child.join(folder, bpf_dir / "maps", FILES)) as module:
        fd = module.load_func("veth", SCHED_CLS).fd
        table, way = module.get_table("veths"), module.get_table("ways").Leaf
        (bpf_dir / "tc").mkdir(mode=0o700, exist_ok=True)
        child.write_layouts(layouts, nested(table.Key) | nested(table.Leaf) | nested(way))
        attach.pin(fd, bpf_dir / "tc" / "veth")


if __name__ == "__main__":
    raise SystemExit(child.main("nodeagent.tc_load", __doc__, load, "veth.c"))
