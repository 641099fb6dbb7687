"""A copy of the product, for a lab to run in place of this tree (`Lab(…, code=…)`): to be patched, or because its agents start
sooner. They load eBPF that some agent of this run has compiled before from the same text (lab/vm/precompiled), where those of
this tree compile, two seconds of a CPU and more. What is loaded, and the verifier's judgement of it, is the same."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.vm.stage import PROJECT, STAND_IN

PRODUCT = ("bpf", "mesh", "nodeagent", "l7proxy", "controller", "pillion")
COMPILED = "PILLION_COMPILED"  # in the environment: where they keep it, see tests/conftest.py


def copied(tree: Path) -> Path:
    for source in (*(PROJECT / package for package in PRODUCT), PROJECT / STAND_IN):
        shutil.copytree(source, tree / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tree
