"""``python -m nodeagent.loader``: load or reload the programs of one node, or remove them (``--unload``).

Prints ``{"programs": {name: attached}, "errors": [text]}``. Exit codes: 0 all attached, 1 failed (what stood before still
stands), 2 usage, 3 pins of another schema.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from nodeagent.loader.attach import HOOKS, LoadError, SchemaError, unload
from nodeagent.loader.run import load


def main(argv: list[str] | None = None) -> int:
    """The exit code; prints the result."""
    parser = argparse.ArgumentParser(prog="nodeagent.loader", description=__doc__)
    parser.add_argument(
        "--bpf-dir", type=Path, required=True, help="a bpffs of this node's own; pins go under maps/, links/, progs/"
    )
    parser.add_argument("--cgroup", type=Path, help="cgroup2 directory above the agent, the proxy and every workload")
    parser.add_argument("--src", type=Path, help="the folder with types.h and the programs")
    parser.add_argument("--layouts", type=Path, help="write the struct layouts here (default: layouts.json beside --bpf-dir)")
    parser.add_argument("--unload", action="store_true", help="detach everything and remove the pins")
    args = parser.parse_args(argv)
    if not args.unload and (args.cgroup is None or args.src is None):
        parser.error("--cgroup and --src are needed to load")
    try:
        if args.unload:
            unload(args.bpf_dir)
            programs = {}
        else:
            layouts = args.layouts or args.bpf_dir.parent / "layouts.json"
            programs = load(args.cgroup, args.bpf_dir, args.src, layouts)
    except LoadError as error:
        print(json.dumps({"programs": dict.fromkeys(HOOKS, False), "errors": [str(error)]}))
        print(error, file=sys.stderr)
        return 3 if isinstance(error, SchemaError) else 1
    print(json.dumps({"programs": programs, "errors": []}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
