"""The layouts as the compiler sees bpf/types.h, made once for a test run, without attaching anything."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile

from nodeagent.layouts import Layouts
from nodeagent.loading import PROJECT, SOURCES

_CHILD = """
import json, sys
from nodeagent.loader import child, run, source
from pathlib import Path
bpf_dir, src = Path(sys.argv[1]), Path(sys.argv[2])
(bpf_dir / "maps").mkdir()
with child.compiled(child.join(src, bpf_dir / "maps", source.FILES)) as module:
    tables = {name: run.types_of(module, name) for name in run.MAPS if name not in run.WITHOUT_LAYOUT}
    print(json.dumps(run.describe(tables, (src / "types.h").read_text())))
"""


@functools.cache
def compiled_layouts() -> Layouts:
    """In a child: the compiler stays there. Its maps are pinned on a bpffs of their own, gone with it."""
    with tempfile.TemporaryDirectory(prefix="pillion-kern-") as directory:
        subprocess.run(["mount", "-t", "bpf", "bpf", directory, "-o", "mode=0700"], check=True)
        try:
            child = subprocess.run(
                [sys.executable, "-c", _CHILD, directory, str(SOURCES)], cwd=PROJECT, capture_output=True, text=True, check=False
            )
        finally:
            subprocess.run(["umount", directory], check=True)
    assert child.returncode == 0, child.stderr
    return Layouts.of(json.loads(child.stdout))
