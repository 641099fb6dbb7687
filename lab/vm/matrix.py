"""`make test-kernels`: the kernel tests on this kernel and on stock ones in VMs, and the table of what each can do.

    python -m lab.vm.matrix [--kernels 6.1,6.12,running] [--suites kernel,express,attacks] [--write docs/kernels.md]

A VM works on the project as it was when it came up. What fails runs a second time; only what fails twice is off.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab.state import LabError, write_atomic
from lab.vm.capabilities import CAPABILITIES, Outcome, Seen, merge, missing, read_junit, table
from lab.vm.handle import VmHandle
from lab.vm.kernels import CACHE
from lab.vm.qemu import accelerator
from lab.vm.stage import PROJECT
from lab.vm.vms import VmLab

RUNNING = "running"
EXPRESS, ATTACKS = "tests/bpf/test_express", "tests/attacks/"
SUITES = {
    "kernel": tuple(path for each in CAPABILITIES for path in each.tests if path not in (EXPRESS, ATTACKS)),
    "express": (EXPRESS,),
    "attacks": (ATTACKS,),
    # The rows that the kernel settles and not the proxy, for when an hour is too long.
    "kernel-attacks": tuple(f"{ATTACKS}test_{row}_" for row in ("04", "05", "06", "13", "14", "16")),
}
BY_DEFAULT = ("kernel", "express", "attacks")
SUITE_LIMIT_S = {"kernel": 1800, "express": 1800, "attacks": 7200, "kernel-attacks": 3600}  # in emulation, twice what was seen
SLOW_EMULATED = 6
RETRIES_MAX = 40  # more failures than that are no accident
MEMORY_MIB = 3072
Runner = Callable[[Sequence[str], float], tuple[int, str]]  # (pytest arguments, limit) → its exit code, its JUnit report


def pytest_argv(paths: Sequence[str], junit: str, slow: float) -> list[str]:
    limit = ["--timeout", str(int(120 * slow))]
    quiet = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
    return [str(PROJECT / ".venv/bin/python"), "-m", "pytest", *quiet, *limit, "--junitxml", junit, *paths]


def files(suite: str) -> list[str]:
    """pytest's arguments: the suite's files that exist; of the attacks those on the mesh as it is, not on broken ones."""
    found: list[str] = []
    for path in SUITES[suite]:
        pattern = f"{path}test_*.py" if path.endswith("/") else f"{path.removesuffix('.py')}*.py"
        found += sorted(str(each.relative_to(PROJECT)) for each in PROJECT.glob(pattern))
    return [*dict.fromkeys(found), *(["-m", "attack"] if "attacks" in suite else [])]


def observe(seen: Seen, suites: Sequence[str], run: Runner, note: Callable[[], None]) -> None:
    """Fill `seen`. `run` is one pytest in the place that is looked at."""
    began = time.monotonic()
    try:
        for suite in suites:
            code, report = run(files(suite), SUITE_LIMIT_S[suite])
            first, second = read_junit(report), list[Outcome]()
            failed = [each.id for each in first if each.message]
            if 0 < len(failed) <= RETRIES_MAX:
                second = read_junit(run(failed, SUITE_LIMIT_S[suite])[1])
            elif code != 0 and not failed:
                seen.error = f"pytest of {suite} ended with {code} though no test failed; its log says why"
            seen.outcomes += merge(first, second)
            seen.seconds = time.monotonic() - began
            note()
    except (LabError, subprocess.TimeoutExpired) as error:
        seen.error = " ".join(str(error).split())[:300]
    seen.seconds = time.monotonic() - began


def here(log: Path) -> Runner:
    def run(arguments: Sequence[str], limit_s: float) -> tuple[int, str]:
        with tempfile.TemporaryDirectory() as scratch, log.open("ab") as output:
            junit = Path(scratch) / "junit.xml"
            argv = pytest_argv(arguments, str(junit), 1)
            done = subprocess.run(argv, cwd=PROJECT, stdout=output, stderr=output, timeout=limit_s, check=False)
            if not junit.exists():
                raise LabError("pytest wrote no report", f"see {log}")
            return done.returncode, junit.read_text()

    return run


def inside(vm: VmHandle, log: Path) -> Runner:
    slow = SLOW_EMULATED if accelerator() == "tcg" else 1

    def run(arguments: Sequence[str], limit_s: float) -> tuple[int, str]:
        env = {"PYTHONDONTWRITEBYTECODE": "1", "PILLION_SLOW": str(slow)}
        with log.open("ab", buffering=0) as output:
            argv = pytest_argv(arguments, "/tmp/junit.xml", slow)
            vm.run(["rm", "-f", "/tmp/junit.xml"], check=True)  # else a run that never came so far leaves the one before
            code = vm.stream(argv, cwd=str(PROJECT), env=env, timeout=limit_s, stdout=output, stderr=output)
        return code, vm.get("/tmp/junit.xml").decode()

    return run


def kernel_run(
    seen: Seen, suites: Sequence[str], lab: VmLab, cpus: int, say: Callable[[str], None], note: Callable[[], None]
) -> None:
    logs = CACHE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    kernel = seen.kernel
    log = logs / f"{kernel}.log"
    log.write_bytes(b"")
    say(f"{seen.release}: {', '.join(suites)}; its log: {log}")
    if kernel == RUNNING:
        observe(seen, suites, here(log), note)
    else:
        try:
            limit = 600 + 2 * sum(SUITE_LIMIT_S[suite] for suite in suites)
            vm = lab.start(f"k{kernel.replace('.', '-')}", kernel, cpus=cpus, memory_mib=MEMORY_MIB, limit_s=limit, network=False)
            seen.release = vm.release
            observe(seen, suites, inside(vm, log), note)
            lab.stop(vm.name)
        except LabError as error:
            seen.error = " ".join(str(error).split())[:300]
    off = sum(bool(each.message) for each in seen.outcomes)
    say(f"{seen.release}: {len(seen.outcomes)} tests, {off} off, {seen.seconds:.0f} s {seen.error}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.vm.matrix", description="what each kernel can do, seen by the tests")
    parser.add_argument("--kernels", default=f"6.1,6.12,{RUNNING}")
    parser.add_argument("--suites", default=",".join(BY_DEFAULT), help=f"of {', '.join(SUITES)}")
    parser.add_argument("--write", default=None, help="the table goes to this file")
    parser.add_argument("--name", default="kernels", help="which VM lab")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="VMs at the same time")
    options = parser.parse_args(arguments)
    kernels, suites = options.kernels.split(","), options.suites.split(",")

    def say(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    seen = {
        kernel: Seen(kernel, f"{os.uname().release.partition('-')[0]} (running)" if kernel == RUNNING else kernel)
        for kernel in kernels
    }
    others = [kernel for kernel in kernels if kernel != RUNNING]

    def note() -> None:  # after each suite: a run that is broken off leaves what it saw
        if options.write:
            write_atomic(Path(options.write), table(list(seen.values())).encode())

    with VmLab(options.name, say) as lab:
        if RUNNING in kernels:  # alone: its tests have the deadlines of a machine at rest
            kernel_run(seen[RUNNING], suites, lab, 0, say, note)
        jobs = max(1, min(options.jobs, len(others)))
        cpus = max(1, min(4, (os.cpu_count() or 1) // jobs))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda each: kernel_run(seen[each], suites, lab, cpus, say, note), others))
    note()
    ordered = list(seen.values())
    if options.write:
        say(f"wrote {options.write}")
    else:
        print(table(ordered))
    left = missing(ordered) if set(suites) >= set(BY_DEFAULT) else [seen.error for seen in ordered if seen.error]
    for line in left:
        print(f"off: {line}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
