"""One VM with a stock kernel: it boots, takes commands, writes nothing to this machine; the programs load and decide there."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import LabError, cgroups
from lab.vm import VmHandle, VmLab
from lab.vm.matrix import SLOW_EMULATED, pytest_argv
from lab.vm.qemu import accelerator
from lab.vm.stage import PROJECT
from tests.conftest import SESSION

KERNEL = "6.1"
LIMIT_S = 300
pytestmark = pytest.mark.timeout(LIMIT_S)
SHORT = (  # loads every program, then a decision of each kind
    "tests/bpf/test_loader.py::test_every_program_stands_behind_a_pinned_link",
    "tests/bpf/test_ingress.py",
    "tests/bpf/test_egress.py",
    "tests/bpf/test_origin.py",
)


@pytest.fixture(scope="module")
def lab() -> Iterator[VmLab]:
    made = VmLab(f"{SESSION}v", print)
    yield made
    made.down()


@pytest.fixture(scope="module")
def vm(lab: VmLab) -> VmHandle:
    return lab.start("old", KERNEL, limit_s=LIMIT_S)


def test_it_runs_that_kernel(vm: VmHandle) -> None:
    release = vm.run(["uname", "-r"]).stdout.strip()
    assert release.startswith(f"{KERNEL}.") and release == vm.release != os.uname().release


def test_commands_have_input_output_and_a_code(vm: VmHandle) -> None:
    data = os.urandom(300_000)
    vm.put("/tmp/data", data, 0o600)
    assert vm.get("/tmp/data") == data
    done = vm.run(["sh", "-c", "cat; echo no >&2; stat -c %a /tmp/data; exit 7"], input="yes\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "yes\n600\n", "no\n")
    assert vm.run(["sh", "-c", "kill -9 $$"]).returncode == -9
    missing = vm.run(["/no/such/program"])
    assert missing.returncode == 127 and "/no/such/program" in missing.stderr
    with pytest.raises(LabError, match="exit code 1"):
        vm.run(["false"], check=True)


def test_what_takes_too_long_dies_there(vm: VmHandle) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        vm.run(["sleep", "7654"], timeout=3)
    deadline = time.monotonic() + 60
    while vm.run(["pgrep", "-f", "^sleep 7654"]).returncode == 0:
        assert time.monotonic() < deadline
    daemon = vm.run(["sh", "-c", "(sleep 30 >/dev/null 2>&1 &); echo left"])
    assert daemon.stdout == "left\n"


def test_folders_go_in_and_come_out(vm: VmHandle, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("here")
    (tmp_path / "a" / "left").write_text("not this")
    vm.copy_in(tmp_path / "a", "/tmp/a", exclude=["./left"])
    assert vm.run(["sh", "-c", "find /tmp/a -type f"]).stdout == "/tmp/a/b/c\n"
    vm.copy_out("/tmp/a", tmp_path / "back")
    assert (tmp_path / "back" / "b" / "c").read_text() == "here"


def test_nothing_is_written_to_this_machine(vm: VmHandle, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    vm.run(["sh", "-c", 'mkdir -p "$(dirname "$1")" && echo there >"$1"', "sh", str(mark)], check=True)
    assert vm.run(["cat", str(mark)]).stdout == "there\n"
    assert not mark.exists()
    behind = vm.run(["sh", "-c", 'mkdir -p /mnt/low && mount -t virtiofs root /mnt/low && touch "/mnt/low/$1"', "sh", str(mark)])
    assert behind.returncode != 0 and "Read-only" in behind.stderr
    assert not mark.exists()


def test_the_programs_load_and_decide_there(vm: VmHandle, tmp_path: Path) -> None:
    slow = SLOW_EMULATED if accelerator() == "tcg" else 1
    argv = [*pytest_argv(SHORT, "/tmp/junit.xml", slow), "-k", "not v6 and not mapped and not full_map"]
    with (tmp_path / "log").open("wb") as log:
        env = {"PILLION_SLOW": str(slow), "PYTHONDONTWRITEBYTECODE": "1"}
        code = vm.stream(argv, cwd=str(PROJECT), env=env, timeout=LIMIT_S, stdout=log, stderr=log)
    said = (tmp_path / "log").read_text()
    print(said[-3000:])
    assert code == 0 and " passed" in said and "skipped" not in said


def test_nothing_is_left(lab: VmLab, vm: VmHandle) -> None:
    assert vm.running
    pids = [int(pid) for path in cgroups.tree(lab.cgroup) for pid in cgroups.pids(path)]
    assert pids
    lab.down()
    assert not lab.cgroup.exists() and not lab.folder.exists() and not vm.running
    assert not [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]
    with pytest.raises(LabError, match="has no"):
        lab.vm("old")
