"""`make test-kernels`: the kernel tests on this kernel and on stock ones in VMs, and the table of what each can do.

    python -m lab.vm.matrix [--kernels 6.1,6.12,running] [--suites kernel,express,attacks,hosts] [--resume] [--write FILE]

A VM works on the project as it was when it came up. What fails runs a second time; only what fails twice is off. What is not
run this time is shown as it was last seen. What is cut (SIGINT, SIGTERM, a limit) keeps what it saw; `--resume` goes on there.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lab.state import LabError, write_atomic
from lab.vm import machines, results, stage
from lab.vm.capabilities import CAPABILITIES, Outcome, Run, Seen, merge, missing, read_junit, read_lines, table
from lab.vm.channel import ChannelLost
from lab.vm.handle import VmHandle
from lab.vm.kernels import CACHE
from lab.vm.qemu import accelerator
from lab.vm.rest import joined, rest
from lab.vm.stage import PROJECT
from lab.vm.vms import VmLab

RUNNING, HOSTS = "running", "hosts"
EXPRESS, ATTACKS = "tests/bpf/test_express", "tests/attacks/"
DIFFERENTIAL = "tests/e2e/test_express_differential.py::test_same_bytes_same_verdicts_same_counts"
SUITES = {
    "kernel": tuple(path for each in CAPABILITIES for path in each.tests if each.name not in ("express", "attacks")),
    "express": (EXPRESS, "tests/nodeagent/test_express_path.py", DIFFERENTIAL),
    "attacks": (ATTACKS,),
    # The rows that the kernel settles and not the proxy
    "kernel-attacks": tuple(f"{ATTACKS}test_{each}" for each in ("04_", "05_foreign", "06_", "13_", "14_", "16_")),
    HOSTS: ("tests/kernels/",),  # of two machines, not of a kernel
}
# On one family of addresses: what a kernel can do, before it is known how well
SUITES["short"] = SUITES["kernel"][1:]
SUITES["short-express"] = (SUITES["kernel"][0], EXPRESS, "tests/nodeagent/test_express_path.py")
SUITES["short-attacks"] = tuple(f"{ATTACKS}test_{each}" for each in ("04_", "05_foreign", "06_", "13_", "16_"))
SUITES["other-attacks"] = tuple(  # what takes labs or hosts of its own last: a run that is cut has the rest
    f"{ATTACKS}test_{each}"
    for each in ("02_", "03_", *(f"{row:02}_" for row in (7, 8, 9, 10, 12, 15, 17, 18, 1, 11)), "05_hosts")
)
SUITES["differential"] = ("tests/nodeagent/test_express_path.py", DIFFERENTIAL)  # what express rests on, and what it comes to
SUITES["probes"] = ("tests/nodeagent/test_express_path.py",)
SHORT = ("-k", "not v6 and not mapped and not full_map and not second_set")
ONLY = {
    "attacks": ("-m", "attack"),  # those on the mesh as it is, not on broken ones
    "kernel-attacks": ("-m", "attack"),
    "short": SHORT,
    "short-express": SHORT,
    "short-attacks": ("-m", "attack", *SHORT),
    "other-attacks": ("-m", "attack", "-p", "lab.vm.one_of_each"),
}
ABOUT = {
    "kernel": "programs and maps, every family of addresses",
    "short": "the same, one family",
    "express": "its programs, its probes, exchanges compared with user space",
    "short-express": "its programs and probes, one family",
    "probes": "its programs load, its probes",
    "differential": "its probes, exchanges compared with user space",
    "attacks": "all of tests/attacks on the mesh as it is",
    "kernel-attacks": "rows 4, 5, 6, 13, 14, 16, those without a host with systemd, every variant",
    "short-attacks": "rows 4, 5, 6, 13, 16, one family, those without a host with systemd",
    "other-attacks": "the rows that kernel-attacks leaves out, one variant of each attack",
}
BY_DEFAULT = ("kernel", "express", "kernel-attacks", "other-attacks", HOSTS)  # of attacks, what emulation can do in an hour
# In emulation, twice what was seen
SUITE_LIMIT_S = {
    "kernel": 1800,
    "express": 1800,
    "attacks": 7200,
    "kernel-attacks": 3600,
    HOSTS: 7200,
    "short": 1200,
    "short-express": 1200,
    "short-attacks": 1800,
    "other-attacks": 3600,
    "differential": 1200,
    "probes": 600,
}
SLOW_EMULATED = 6
# Of the differential: the whole corpus and some that are drawn; 8 s on a machine at rest, many times that on a busy one
EXCHANGES_EMULATED, DRAWN_EMULATED = 3000, 800
RETRIES_MAX = 40  # more failures than that are no accident
MEMORY_MIB = 3072
CPUS_MIN = 2  # of a VM: express is tried by threads that meet
END_S = 120.0  # until a pytest that is asked to end has taken its labs down
INTERRUPTED, NOTHING_CHOSEN = 2, 5  # pytest's exit codes


@dataclass
class Report:
    """One pytest: its exit code, what it saw, and why it did not come to its end."""

    code: int
    outcomes: list[Outcome] = field(default_factory=list)
    error: str = ""
    asked: bool = False  # to end: nothing else is to run


Runner = Callable[[Sequence[str], float], Report]  # (pytest arguments, limit)


def pytest_argv(paths: Sequence[str], junit: str, slow: float) -> list[str]:
    limit = ["--timeout", str(int(120 * slow))]
    told = ["-v", "--tb=short", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
    return [str(PROJECT / ".venv/bin/python"), "-m", "pytest", *told, *limit, "--junitxml", junit, *paths]


def files(suite: str) -> list[str]:
    """pytest's arguments: the suite's files that exist, and which of their tests."""
    found: list[str] = []
    for path in SUITES[suite]:
        pattern = f"{path}test_*.py" if path.endswith("/") else f"{path.removesuffix('.py')}*.py"
        found += [path] if "::" in path else sorted(str(each.relative_to(PROJECT)) for each in PROJECT.glob(pattern))
    return [*dict.fromkeys(found), *ONLY.get(suite, ())]


def observe(
    seen: Seen,
    suites: Sequence[str],
    run: Runner,
    note: Callable[[], None],
    slow: float = 1.0,
    earlier: Mapping[str, Run] | None = None,
) -> None:
    """Fill `seen`. `run` is one pytest in the place that is looked at, so much slower than usual. It goes on with `earlier`."""
    known = {suite: files(suite) for suite in suites}  # a file that is made later is not in the place
    for suite in suites:
        before = (earlier or {}).get(suite, Run())
        arguments, kept = rest(known[suite], before)
        if not arguments:
            seen.runs[suite] = before if kept else Run(error="none of its files is there")
            note()
            continue
        began = time.monotonic()
        told = seen.runs[suite] = Run(kept, before.seconds, time.strftime("%-d %B %Y"), before.error)
        try:
            first = run(arguments, SUITE_LIMIT_S[suite] * slow)
            told.outcomes, told.error = joined(kept, first.outcomes), first.error
            failed = [each.id for each in first.outcomes if each.message]
            if first.asked:
                raise KeyboardInterrupt
            if first.code == INTERRUPTED:
                told.error = f"interrupted after {len(first.outcomes)} tests"
            elif not first.error and first.code not in (0, NOTHING_CHOSEN if kept else 0) and not failed:
                told.error = f"pytest ended with {first.code} though no test failed; its log says why"
            elif not first.error and 0 < len(failed) <= RETRIES_MAX and suite != HOSTS:  # there, a step rests on those before
                told.outcomes = merge(told.outcomes, run(failed, SUITE_LIMIT_S[suite] * slow).outcomes)
        except LabError as error:
            told.error = " ".join(str(error).split())[:300]
            return
        finally:
            told.seconds = before.seconds + time.monotonic() - began
            note()


def here(log: Path, extra: Mapping[str, str] | None = None) -> Runner:
    def run(arguments: Sequence[str], limit_s: float) -> Report:
        with tempfile.TemporaryDirectory() as scratch, log.open("ab") as output:
            junit, start = Path(scratch) / "junit.xml", output.tell()
            argv = pytest_argv(arguments, str(junit), 1)
            env = {**os.environ, **(extra or {})}
            # A session of its own: a ^C is for us, who ask it to end once
            child = subprocess.Popen(argv, cwd=PROJECT, env=env, stdout=output, stderr=output, start_new_session=True)
            try:
                code = child.wait(limit_s)
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as cut:
                ended(child)
                why = "stopped" if isinstance(cut, KeyboardInterrupt) else f"not done within {limit_s:.0f} s"
                return broken_off(log, start, why, asked=isinstance(cut, KeyboardInterrupt))
            if not junit.exists():
                raise LabError("pytest wrote no report", f"see {log}")
            return Report(code, read_junit(junit.read_text()))

    return run


def inside(vm: VmHandle, log: Path, more: float) -> Runner:
    """`more`: how much slower than in emulation alone."""
    slow = (SLOW_EMULATED if accelerator() == "tcg" else 1) * more

    def run(arguments: Sequence[str], limit_s: float) -> Report:
        env = {"PYTHONDONTWRITEBYTECODE": "1", "PILLION_SLOW": str(slow)}
        if slow > 1:
            env |= {"PILLION_DIFFERENTIAL_EXCHANGES": str(EXCHANGES_EMULATED), "PILLION_DIFFERENTIAL_DRAWN": str(DRAWN_EMULATED)}
        with log.open("ab", buffering=0) as output:
            start = output.tell()
            argv = pytest_argv(arguments, "/tmp/junit.xml", slow)
            vm.run(["rm", "-f", "/tmp/junit.xml"], check=True)  # else a run that never came so far leaves the one before
            try:
                code = vm.stream(argv, cwd=str(PROJECT), env=env, timeout=limit_s, stdout=output, stderr=output)
            except subprocess.TimeoutExpired:
                return broken_off(log, start, f"not done within {limit_s:.0f} s")
            except ChannelLost as lost:  # the VM ended, or was ended
                return broken_off(log, start, lost.what if vm.folder.exists() else "stopped")
        return Report(code, read_junit(vm.get("/tmp/junit.xml").decode()))

    return run


def ended(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGINT)
    try:
        child.wait(END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def broken_off(log: Path, start: int, why: str, asked: bool = False) -> Report:
    """What the log tells of a run that was killed."""
    with log.open("rb") as file:
        file.seek(start)
        outcomes = read_lines(file.read().decode(errors="replace"))
    return Report(-9, outcomes, f"{why}, after {len(outcomes)} tests", asked)


def log_of(what: str) -> Path:
    folder = CACHE / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{what}.log").write_bytes(b"")
    return folder / f"{what}.log"


def to_go_on(seen: Seen, resume: bool) -> Mapping[str, Run]:
    earlier = results.recall(seen.kernel) if resume else None
    return earlier.runs if earlier and earlier.release == seen.release else {}


def kernel_run(
    seen: Seen,
    suites: Sequence[str],
    lab: VmLab,
    cpus: int,
    say: Callable[[str], None],
    note: Callable[[], None],
    slow: float,
    resume: bool,
) -> None:
    kernel, log = seen.kernel, log_of(seen.kernel)
    say(f"{seen.release}: {', '.join(suites)}; its log: {log}")
    if kernel == RUNNING:
        observe(seen, suites, here(log), note, slow, to_go_on(seen, resume))
    else:
        try:
            limit = int(slow * (600 + 2 * sum(SUITE_LIMIT_S[suite] for suite in suites)))
            vm = lab.start(f"k{kernel.replace('.', '-')}", kernel, cpus=cpus, memory_mib=MEMORY_MIB, limit_s=limit, network=False)
            seen.release = vm.release
            stage.compile_express(lab.name, vm)
            observe(seen, suites, inside(vm, log, slow), note, slow, to_go_on(seen, resume))
            lab.stop(vm.name)
        except LabError as error:
            seen.error = " ".join(str(error).split())[:300]
    off = sum(bool(each.message) for each in seen.outcomes)
    seconds = sum(run.seconds for run in seen.runs.values())
    say(f"{seen.release}: {len(seen.outcomes)} tests, {off} off, {seconds:.0f} s {' '.join(seen.errors)}")


def hosts_run(seen: Seen, kernels: Sequence[str], say: Callable[[str], None], note: Callable[[], None], slow: float) -> None:
    """The mesh of two machines, started from here."""
    log = log_of(HOSTS)
    say(f"two machines on {seen.release}; their log: {log}")
    observe(seen, [HOSTS], here(log, {"PILLION_HOSTS": ",".join(kernels), "PILLION_SLOW": str(slow)}), note, slow)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.vm.matrix", description="what each kernel can do, seen by the tests")
    parser.add_argument("--kernels", default=f"6.1,6.12,{RUNNING}")
    parser.add_argument("--suites", default=",".join(BY_DEFAULT), help=f"of {', '.join(SUITES)}")
    parser.add_argument("--write", default=None, help="the table goes to this file")
    parser.add_argument("--name", default="kernels", help="which VM lab")
    parser.add_argument("--resume", action="store_true", help="go on with suites that were cut, and try again what failed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="VMs at the same time, at most")
    parser.add_argument("--slow", type=float, default=1.0, help="deadlines so many times as long, on a machine with other work")
    options = parser.parse_args(arguments)
    kernels, suites = options.kernels.split(","), [each for each in options.suites.split(",") if each != HOSTS]

    def say(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    here_release = f"{os.uname().release.partition('-')[0]} (running)"
    seen = {kernel: Seen(kernel, here_release if kernel == RUNNING else kernel) for kernel in kernels}
    others = [kernel for kernel in kernels if kernel != RUNNING]
    pair = Seen(HOSTS, " and ".join((others * 2)[:2]))

    lock = threading.Lock()

    def note() -> None:  # after each suite: a run that is broken off leaves what it saw
        with lock:
            for each in (*seen.values(), pair):
                if each.runs:
                    results.keep(results.with_earlier(each))

    with VmLab(options.name, say) as lab:
        if RUNNING in kernels and suites:  # alone: its tests have the deadlines of a machine at rest
            kernel_run(seen[RUNNING], suites, lab, 0, say, note, options.slow, options.resume)
        jobs, processors = max(1, min(options.jobs, len(others))), os.cpu_count() or 1
        cpus = max(CPUS_MIN, min(4, processors // jobs))
        # Two VMs on two processors are done sooner than one after the other: most tests wait, or keep one processor
        slow = options.slow * max(1.0, jobs * cpus / processors)

        def in_a_vm(kernel: str) -> None:
            kernel_run(seen[kernel], suites, lab, cpus, say, note, slow, options.resume)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                list(pool.map(in_a_vm, others if suites else []))
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                lab.down()  # who waits for a VM keeps what it saw
                raise
    if HOSTS in options.suites.split(",") and others:
        hosts_run(pair, others, say, note, options.slow)
    note()
    if options.write:
        write_atomic(Path(options.write), document(seen, pair).encode())
        say(f"wrote {options.write}")
    else:
        print(document(seen, pair))
    left = missing(seen.values(), all_ran=set(suites) >= set(BY_DEFAULT) - {HOSTS}) if suites else []
    left += [text for each in (*seen.values(), pair) for text in each.errors]
    left += [f"two machines: {each.name}: {each.message}" for each in pair.outcomes if each.message]
    for line in left:
        print(f"off: {line}", file=sys.stderr)
    return 1 if left else 0


def document(seen: Mapping[str, Seen], pair: Seen) -> str:
    """The kernels of this run first, then those known from earlier ones."""
    everyone = {kernel: results.with_earlier(each) for kernel, each in seen.items()}
    for place in sorted(results.FOLDER.glob("*.json")):
        if place.stem not in (*everyone, HOSTS) and (earlier := results.recall(place.stem)):
            everyone[place.stem] = earlier
    ordered = sorted(
        everyone.values(), key=lambda each: (each.kernel == RUNNING, [int(n) for n in each.kernel.split(".") if n.isdigit()])
    )
    return table(ordered, machines.section(results.with_earlier(pair).runs.get(HOSTS)), ABOUT)


def terminated(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; what was seen is kept: --resume (make test-kernels RESUME=1) goes on there")
