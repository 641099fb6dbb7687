"""What the short-lived children that load programs have in common: one text out of several files, the compiler, the layouts
file; and the command line of those that load onto the node's own maps."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nodeagent.loader import headers

FLAGS = ("-Wno-macro-redefined", "-Wno-unused-function")


def join(folder: Path, pins: Path, files: Sequence[str]) -> str:
    """The programs with the maps pinned under ``pins``, as one text: BCC rewrites map calls in the main file only. Errors keep
    file and line by #line. Raises ValueError."""
    pinned = f"{pins}/"
    if '"' in pinned or "\\" in pinned:
        raise ValueError(f"{pinned}: quotes and backslashes cannot be in the pin directory's name")
    parts = ["#include <uapi/linux/bpf.h>\n", f'#define PL_PINS "{pinned}"\n']
    for name in files:
        parts += [f'#line 1 "bpf/{name}"\n', (folder / name).read_text()]
    return "".join(parts)


@contextmanager
def compiled(text: str, flags: Sequence[str] = ()) -> Iterator[Any]:
    """BCC's module of a text; its maps are made or taken from their pins here. Raises what BCC raises."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="pillion-headers-") as tree:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers.make_tree(Path(tree)))
        from bcc import BPF  # here, so that nothing but a load pays for LLVM

        try:
            yield BPF(text=text, cflags=[*FLAGS, *flags])
        finally:
            os.chdir(home)  # compilation leaves the process elsewhere


def write_layouts(path: Path, content: dict[str, Any]) -> None:
    """JSON, by rename."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(content, indent=1))
    os.replace(fresh, path)


def main(module: str, about: str | None, load: Callable[[Path, Path, Path], None], what: str) -> int:
    """``load``: called with --bpf-dir, --src and --layouts. The exit code; what went wrong goes to stderr."""
    parser = argparse.ArgumentParser(prog=module, description=about)
    parser.add_argument("--bpf-dir", type=Path, required=True)
    parser.add_argument("--src", type=Path, required=True)
    parser.add_argument("--layouts", type=Path, required=True)
    args = parser.parse_args()
    try:
        load(args.bpf_dir, args.src, args.layouts)
    except Exception as error:  # BCC raises bare Exception
        print(f"{what} does not load here: {error}", file=sys.stderr)
        return 1
    return 0
