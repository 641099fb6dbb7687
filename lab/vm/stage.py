"""The project as it is now, for a quick VM: it sees this copy in the project's place, whatever is edited meanwhile. Compiled,
Python and eBPF, for in emulation compiling is most of a start. The virtual environment is copied by hard links: it may be made
anew meanwhile.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lab import cgroups
from lab.state import LabError
from lab.vm.handle import VmHandle
from lab.vm.kernels import CACHE, tool
from lab.vm.precompiled import bcc as stand_in

PROJECT = Path(__file__).resolve().parents[2]
STAND_IN = Path("lab/vm/precompiled/bcc")
IN_THE_VM = "/var/tmp/pillion-compiled"
BCC = "/usr/lib/python3/dist-packages/bcc"  # of a machine
LEFT_OUT = (".venv", ".git", ".mypy_cache", ".ruff_cache", ".hypothesis", ".pytest_cache", "__pycache__", "build", "dist")

# The product's own loader, once, on this machine's kernel and a cgroup nobody is in; with the mounts all of it goes
_LOAD = """
mount --make-rprivate / && mount -t bpf bpf "$1" || exit 1
"$2" -m nodeagent.loader --bpf-dir "$1" --cgroup "$3" --src "$4/bpf" --layouts "$1.json" &&
"$2" -m nodeagent.tc_load --bpf-dir "$1" --src "$4/bpf" --layouts "$1.json"
"""

_FLAGS = "import json; from nodeagent import express_load; print(json.dumps(express_load.flags()))"
# Before an install there is the distribution's Python alone, and this takes one package that it has not
_FLAGS_OF_A_MACHINE = """
home=$(mktemp -d); python3 -m zipfile -e "$1"/msgspec-*.whl "$home"
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$home:. python3 -c "$2"; rm -r "$home"
"""
_ASIDE = '[ -e "$2" ] || { mkdir "$2" && mv "$1" "$2"; }'
_COMPILE = 'mount --make-rprivate / && mkdir -p "$1/fs" && mount -t bpf bpf "$1/fs" && exec "$2" -c "$3" "$1/fs" "$4" "$5"'
_EXPRESS = """
import json, sys
from pathlib import Path
from nodeagent import express_load
from nodeagent.loader import child, source
pins, folder = Path(sys.argv[1]) / "maps", Path(sys.argv[2])
pins.mkdir()
express_load.make_tables(pins, source.constants((folder / "types.h").read_text()))
with child.compiled(child.join(folder, pins, express_load.FILES), json.loads(sys.argv[3])):
    pass
"""


def snapshots_of(lab: str) -> Path:
    return CACHE / "snapshots" / lab


def take(lab: str, vm: str) -> Path:
    place = snapshots_of(lab) / vm
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(PROJECT, place, ignore=shutil.ignore_patterns(*LEFT_OUT))
    tool(sys.executable, "-m", "compileall", "-q", "-s", str(place), "-p", str(PROJECT), str(place))
    venv = (PROJECT / ".venv").resolve()  # a link copied as a link would lead out of the copy
    if venv.is_dir():
        linked = ["-l"] if venv.stat().st_dev == place.stat().st_dev else []
        tool("cp", "-a", *linked, str(venv), str(place / ".venv"))
        compile_programs(place, cgroups.mount_point() / f"pillion-vm-{lab}" / f"{vm}-compile")
    return place


def compile_programs(place: Path, cgroup: Path) -> None:
    """What the VM's loaders will ask for; its `import bcc` finds it. What does not load here, the VM compiles, and says so."""
    ours, scratch = place / STAND_IN, place / ".compile"
    scratch.mkdir()
    cgroup.mkdir(parents=True)
    try:
        env = [f"PILLION_COMPILED={ours / 'compiled'}", f"PYTHONPATH={ours.parent}:{place}", "PYTHONDONTWRITEBYTECODE=1"]
        load = ["sh", "-c", _LOAD, "sh", str(scratch), sys.executable, str(cgroup), str(place)]
        tool("env", "-C", str(place), *env, "unshare", "--mount", *load)
    except LabError as error:
        print(f"eBPF is not compiled beforehand: {error}", file=sys.stderr)
    finally:
        cgroup.rmdir()
    for bcc in (place / ".venv").glob("lib/python3*/site-packages/bcc"):
        bcc.unlink()
        bcc.symlink_to(PROJECT / STAND_IN)


def compile_express(lab: str, vm: VmHandle) -> None:
    """Express's programs take offsets and an address from the VM's kernel; here they are compiled, there they are loaded."""
    asked = vm.run([f"{PROJECT}/.venv/bin/python", "-c", _FLAGS], cwd=str(PROJECT), timeout=600)
    _express(snapshots_of(lab) / vm.name, vm, asked, IN_THE_VM)


def compile_for_machine(vm: VmHandle, release: str, wheels: str) -> None:
    """The same for a machine that has them unpacked, before an install: what is compiled here takes the place of its BCC, which
    steps aside. Its kernel is where it was after a reboot too (see `qemu_argv`)."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "project"
        shutil.copytree(PROJECT, place, ignore=shutil.ignore_patterns(*LEFT_OUT))
        compile_programs(place, vm.cgroup.with_name(f"{vm.name}-compile"))
        vm.run(["sh", "-ec", _ASIDE, "sh", BCC, stand_in.ASIDE], check=True)
        vm.copy_in(place / STAND_IN, BCC)
        asked = vm.run(["sh", "-ec", _FLAGS_OF_A_MACHINE, "sh", wheels, _FLAGS], cwd=release, timeout=600)
        _express(place, vm, asked, f"{BCC}/compiled")


def _express(place: Path, vm: VmHandle, asked: subprocess.CompletedProcess[str], target: str) -> None:
    scratch = place / ".express"
    scratch.mkdir(exist_ok=True)
    try:
        if asked.returncode != 0:
            raise LabError(f"this kernel has no types for it: {asked.stderr[-300:]}")
        python_path = f"{(place / STAND_IN).parent}:{place}"
        env = [f"PILLION_COMPILED={scratch / 'made'}", f"PYTHONPATH={python_path}", "PYTHONDONTWRITEBYTECODE=1"]
        compile_it = ["sh", "-c", _COMPILE, "sh", str(scratch), sys.executable, _EXPRESS, str(place / "bpf"), asked.stdout]
        tool("env", "-C", str(place), *env, "unshare", "--mount", *compile_it)
        vm.copy_in(scratch / "made", target)
    except LabError as error:
        print(f"express is not compiled beforehand: {error}", file=sys.stderr)
