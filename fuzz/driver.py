"""Runs a target in several processes, watches them, stores what they find, and says how many cases it was."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fuzz import worker
from fuzz.http1.nginx import Nginx
from fuzz.http1.requests import HttpRequests
from fuzz.target import CORPUS
from fuzz.targets import make
from fuzz.worker import Finding, Slot

HANG_S = 30.0  # on one case
PROGRESS_S = 10.0


class _Lines:
    """What `worker.run` prints to, on a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def write(self, text: str) -> None:
        if text.strip():
            self.pipe.send(text)

    def flush(self) -> None:
        pass


class _Process:
    """A worker and what is known of it."""

    def __init__(self, name: str, seed: str, count: int, seconds: float, nginx: Nginx | None) -> None:
        self.slot = Slot()
        self.pipe, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(name, seed, count, seconds, nginx, self.slot, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.summary: dict[str, Any] | None = None
        self.count, self.moved = 0, time.monotonic()

    def stuck(self) -> bool:
        count = self.slot.read()[0]
        if count != self.count:
            self.count, self.moved = count, time.monotonic()
        return time.monotonic() - self.moved > HANG_S


def _work(name: str, seed: str, count: int, seconds: float, nginx: Nginx | None, slot: Slot, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends us
    worker.run(make(name, nginx), seed, count, seconds, slot, _Lines(pipe))  # type: ignore[arg-type]  # all that print needs


def run(name: str, count: int, seconds: float, processes: int, seed: str, *, keep: bool) -> int:
    """Cases of one target, shared out. Prints progress, findings and a summary; returns the number of findings."""
    findings: dict[str, Finding] = {}
    started = time.monotonic()
    with ExitStack() as stack:
        nginx = None
        if name == HttpRequests.name:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pillion-fuzz-"))
            nginx = stack.enter_context(Nginx(Path(folder)))
        workers = [_Process(name, f"{seed}/{n}", -(-count // processes), seconds, nginx) for n in range(processes)]
        stack.callback(_end, workers)
        _watch(name, workers, findings, keep=keep)
    elapsed = time.monotonic() - started
    done = [one.summary for one in workers if one.summary]
    cases = sum(int(one["cases"]) for one in done)
    print(f"{name}: {cases:,} cases in {elapsed:.0f} s, {cases / elapsed:,.0f}/s on {processes} processes", flush=True)
    compared = {reader: sum(one["compared"].get(reader, 0) for one in done) for reader in (done[0]["compared"] if done else ())}
    if compared:
        print("  " + ", ".join(f"{reader} {number:,}" for reader, number in compared.items()), flush=True)
    crashes = sum(finding.kind != "disagreement" for finding in findings.values())
    print(f"  {crashes} crashes, {len(findings) - crashes} disagreements", flush=True)
    return len(findings)


def _watch(name: str, workers: list[_Process], findings: dict[str, Finding], *, keep: bool) -> None:
    open_pipes = {one.pipe: one for one in workers}
    said = time.monotonic()
    while open_pipes:
        for ready in wait(list(open_pipes), timeout=1.0):
            assert isinstance(ready, Connection)  # noqa: S101  # all we wait for
            one = open_pipes[ready]
            try:
                line = json.loads(ready.recv())
            except EOFError:
                del open_pipes[ready]
                one.process.join()
                if one.summary is None:
                    count, case = one.slot.read()
                    _found(name, Finding("crash", f"exit {one.process.exitcode}", f"after {count} cases", case), findings, keep)
                continue
            if line.pop("type") == "done":
                one.summary = line
            else:
                line["case"] = bytes.fromhex(line["case"])
                _found(name, Finding(**line), findings, keep)
        for pipe, one in list(open_pipes.items()):
            if one.summary is None and one.stuck():
                _found(name, Finding("hang", "hang", f"{HANG_S} s", one.slot.read()[1]), findings, keep)
                one.process.kill()
                one.summary = {"cases": one.count, "compared": {}}
                del open_pipes[pipe]
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            print(f"{name}: {sum(one.slot.read()[0] for one in workers):,} cases, {len(findings)} findings", flush=True)


def _found(name: str, finding: Finding, findings: dict[str, Finding], keep: bool) -> None:
    if finding.what in findings:
        return
    findings[finding.what] = finding
    print(f"{name}: {finding.kind}: {finding.what}\n  case {finding.case[:400]!r}\n  {finding.detail.strip()[:1500]}", flush=True)
    if keep:
        print(f"  kept as {store(name, finding)}", flush=True)


def store(name: str, finding: Finding) -> Path:
    """The case as a file of the corpus; rename it to what it is once that is understood."""
    words = re.sub(r"[^a-z0-9]+", "-", finding.what.lower()).strip("-")[:60]
    path = CORPUS / name / f"{words}-{hashlib.sha256(finding.case).hexdigest()[:6]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(finding.case)
    return path


def _end(workers: list[_Process]) -> None:
    for one in workers:
        if one.process.is_alive() and one.process.pid:
            os.kill(one.process.pid, signal.SIGKILL)
        one.process.join()
