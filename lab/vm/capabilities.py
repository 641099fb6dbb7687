"""What a kernel can be seen to do, and the tests that see it. Pure: test results in, a table out."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

REASON_CHARS_MAX = 160
LISTED_MAX = 20


@dataclass(frozen=True)
class Capability:
    name: str
    what: str
    tests: tuple[str, ...]  # files, or the beginnings of their paths
    without: str  # what happens where it is off
    needed: bool = True  # off fails the run


CAPABILITIES = (
    Capability(
        "load",
        "every program verifies, is pinned behind a link and replaced without a gap",
        ("tests/bpf/test_loader.py",),
        "the agent is not ready and says why; no workload is enrolled",
    ),
    Capability(
        "capture",
        "connect() and bind() are decided by identity, addresses rewritten",
        ("tests/bpf/test_connect.py", "tests/bpf/test_bind.py", "tests/bpf/test_probe_connect.py"),
        "as without `load`",
    ),
    Capability(
        "origin",
        "an accepted socket knows where its caller wanted to go and who it is",
        ("tests/bpf/test_origin.py", "tests/bpf/test_sockops.py"),
        "the proxy closes what it can not attribute",
    ),
    Capability(
        "ingress",
        "nothing reaches a workload's socket without a record",
        ("tests/bpf/test_ingress.py", "tests/bpf/test_source.py"),
        "as without `load`",
    ),
    Capability(
        "egress",
        "raw, packet, ping and foreign sockets and sources stop",
        ("tests/bpf/test_egress.py", "tests/bpf/test_create.py"),
        "as without `load`",
    ),
    Capability("UDP", "datagrams are decided and told as connections are", ("tests/bpf/test_datagram.py",), "as without `load`"),
    Capability(
        "flows",
        "verdicts are counted exactly and told within a budget",
        ("tests/bpf/test_events.py", "tests/bpf/test_budget.py", "tests/nodeagent/test_ring.py"),
        "`pillion flows` is empty; decisions do not depend on it",
    ),
    Capability(
        "veth filter",
        "the host's end of a pod's veth drops what no hook saw (tc)",
        ("tests/nodeagent/test_tc.py",),
        "the workload is not enrolled",
    ),
    Capability(
        "end denied",
        "open native connections end when policy denies them (SOCK_DESTROY)",
        ("tests/nodeagent/test_denied.py", "tests/nodeagent/test_sockdiag.py"),
        "their packets are dropped from the next generation on; the sockets time out",
    ),
    Capability(
        "maps",
        "a plan is written, read back and repaired",
        ("tests/nodeagent/test_datapath_live.py", "tests/nodeagent/test_maps.py"),
        "as without `load`",
    ),
    Capability(
        "express",
        "HTTP exchanges short-cut between paired sockets (sk_msg), probes, the same bytes as user space",
        ("tests/bpf/test_express", "tests/nodeagent/test_express_path.py", "tests/e2e/test_express_differential.py"),
        "user space carries every exchange",
    ),
    Capability("attacks", "what gets around a mesh, on a whole mesh", ("tests/attacks/",), "a hole: do not use this kernel"),
)


@dataclass
class Outcome:
    """One test; `message` empty: it passed."""

    path: str
    name: str
    message: str = ""
    again: bool = False  # it passed when run a second time
    noted: dict[str, str] = field(default_factory=dict)  # what the test recorded

    @property
    def id(self) -> str:
        return f"{self.path}::{self.name}"


@dataclass
class Run:
    """One suite on one kernel."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    day: str = ""
    error: str = ""  # it did not come to its end


@dataclass
class Seen:
    """One kernel: what ran on it, by suite."""

    kernel: str
    release: str
    runs: dict[str, Run] = field(default_factory=dict)
    error: str = ""  # nothing could run on it

    @property
    def outcomes(self) -> list[Outcome]:
        """Of each test the last."""
        return list({each.id: each for run in self.runs.values() for each in run.outcomes}.values())

    @property
    def errors(self) -> list[str]:
        return [
            text for text in (self.error, *(run.error and f"{suite}: {run.error}" for suite, run in self.runs.items())) if text
        ]

    def of(self, capability: Capability) -> list[Outcome]:
        return [each for each in self.outcomes if each.path.startswith(capability.tests)]

    def on(self, capability: Capability) -> bool:
        found = self.of(capability)
        return bool(found) and not any(each.message for each in found)


def read_junit(text: str) -> list[Outcome]:
    """pytest's --junitxml. Skipped tests count as failures: privilege is there, so nothing may be skipped."""
    found: dict[str, Outcome] = {}  # a test whose fixture fails afterwards is told twice
    for case in ElementTree.fromstring(text).iter("testcase"):  # noqa: S314  # written by our own run
        path = str(PurePosixPath(*(case.get("classname") or "").split("."))) + ".py"
        message = ""
        for kind in ("failure", "error", "skipped"):
            if (element := case.find(kind)) is not None:
                message = " ".join((element.get("message") or kind).split())[:REASON_CHARS_MAX] or kind
        noted = {each.get("name") or "": each.get("value") or "" for each in case.iter("property")}
        outcome = Outcome(path, case.get("name") or "", message, noted=noted)
        if outcome.id not in found or message:
            found[outcome.id] = outcome
    return list(found.values())


_LINE = re.compile(r"^(tests/\S+\.py)::(.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)


def read_lines(text: str) -> list[Outcome]:
    """What `pytest -v` printed, of a run that did not live to write its report."""
    return [
        Outcome(path, name, "" if said == "PASSED" else f"{said.lower()}, in a run that was broken off")
        for path, name, said in _LINE.findall(text)
    ]


def merge(first: Sequence[Outcome], second: Iterable[Outcome]) -> list[Outcome]:
    """The second run is of what failed in the first: emulation is slow enough to miss a deadline once."""
    later = {each.id: each for each in second}
    merged = []
    for each in first:
        again = later.get(each.id)
        if each.message and again is not None:
            each = Outcome(each.path, each.name, again.message, again=not again.message, noted=again.noted or each.noted)
        merged.append(each)
    return merged


def cell(seen: Seen, capability: Capability) -> str:
    found = seen.of(capability)
    if not found:
        return "not run"
    failed = [each for each in found if each.message]
    if not failed:
        twice = sum(each.again for each in found)
        last = any(
            run.error and run.outcomes and run.outcomes[-1].path.startswith(capability.tests) for run in seen.runs.values()
        )
        return f"{'not seen to its end: ' if last else ''}on ({len(found)}{f', {twice} at the second try' if twice else ''})"
    return f"**off** ({len(failed)} of {len(found)}) [{seen.kernel}]"


def amount(run: Run | None) -> str:
    if run is None:
        return "not run"
    return f"{len(run.outcomes)} tests, {run.seconds:.0f} s, {run.day}"


def table(kernels: Sequence[Seen], extra: Sequence[str] = (), suites: Mapping[str, str] | None = None) -> str:
    """docs/kernels.md; `extra`: lines of further sections; `suites`: those to tell of, run or not, and what each is."""
    lines = [
        "# Kernels",
        "",
        "Written by `make test-kernels` from what it saw; no line comes from a version number. *on (n)*: all n tests of that",
        "capability passed on that kernel; *off*: some did not, and below is which and why. *-amd64* are Debian's stock kernels,",
        "*-generic* Ubuntu's, in VMs (`lab/vm`); the other is the one the run was started on. Suites that were not run this time",
        "are shown as that machine last saw them, with the day. To look: `pillion lab vm up --kernels 6.1,ubuntu-6.8`",
        "and `pillion lab vm run 6.1 -- COMMAND`; `--machine` boots systemd on a disk.",
        "",
        "| capability | what it is | " + " | ".join(seen.release for seen in kernels) + " | where it is off |",
        "|---|---|" + "---|" * len(kernels) + "---|",
    ]
    for capability in CAPABILITIES:
        cells = " | ".join(cell(seen, capability) for seen in kernels)
        lines.append(f"| {capability.name} | {capability.what} | {cells} | {capability.without} |")
    known = dict(suites or {})
    about = known | {suite: "" for seen in kernels for suite in seen.runs if suite not in known}
    lines += ["", "| suite | what it runs | " + " | ".join(seen.release for seen in kernels) + " |"]
    lines.append("|---|---|" + "---|" * len(kernels))
    for suite, what in about.items():
        lines.append(f"| {suite} | {what} | " + " | ".join(amount(seen.runs.get(suite)) for seen in kernels) + " |")
    for seen in kernels:
        failed = [each for each in seen.outcomes if each.message]
        if not failed and not seen.errors:
            continue
        lines += ["", f"## Off, or not seen to its end, on {seen.release}", ""]
        for error in seen.errors:
            lines.append(f"- not seen to its end: {error}")
        lines += [f"- `{each.id}`: {each.message.replace('|', '¦')}" for each in failed[:LISTED_MAX]]
        lines += [f"- and {len(failed) - LISTED_MAX} more"] if len(failed) > LISTED_MAX else []
    return "\n".join([*lines, *extra]) + "\n"


def missing(kernels: Iterable[Seen], *, all_ran: bool) -> list[str]:
    """What must be on and is not, as "kernel: capability"; where not all was run, of what was."""
    return [
        f"{seen.release}: {each.name}"
        for seen in kernels
        for each in CAPABILITIES
        if each.needed and not seen.on(each) and (all_ran or seen.of(each))
    ]
