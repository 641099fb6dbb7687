"""One process of a run: makes cases, checks them, minimises what it finds. The case at hand lies in memory shared with
the driver, so that a crash of an extension or a hang keeps its case."""

from __future__ import annotations

import json
import mmap
import struct
import sys
import time
import traceback
from collections.abc import Hashable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import IO

from fuzz.minimise import minimise
from fuzz.mutate import mutate
from fuzz.target import Disagreement, Target

CASE_BYTES_MAX = 65536
BATCH = 500  # cases with one seed, and between two batches for readers that are asked in batches
POOL_MAX = 2000
KINDS_MAX = 40  # of findings a worker minimises
_HEAD = struct.Struct("=QI")  # cases begun, bytes of the one at hand
SLOT_BYTES = _HEAD.size + CASE_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Finding:
    kind: str  # crash | disagreement | hang
    what: str  # constant words: what two findings have in common if they are the same
    detail: str
    case: bytes


class Slot:
    """The shared memory of one worker."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, SLOT_BYTES)

    def write(self, count: int, case: bytes) -> None:
        size = len(case)
        self.memory[: _HEAD.size + size] = _HEAD.pack(count, size) + case

    def read(self) -> tuple[int, bytes]:
        count, size = _HEAD.unpack_from(self.memory)
        return count, bytes(self.memory[_HEAD.size : _HEAD.size + size])


def judge(target: Target, case: bytes, *, deep: bool = False) -> tuple[Hashable, Finding | None]:
    """(signature, None) or (None, what is wrong)."""
    try:
        return target.check(case, deep=deep), None
    except Disagreement as error:
        return None, Finding("disagreement", f"{error.reader} {error.what}", error.detail, case)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name} {frame.name}"
        return None, Finding("crash", f"{type(error).__name__} in {where}", traceback.format_exc(limit=-4), case)


def shrink(target: Target, finding: Finding) -> Finding:
    """The same finding from a smaller case."""

    def fails(case: bytes) -> bool:
        found = judge(target, case, deep=True)[1]
        return found is not None and found.what == finding.what

    if not fails(finding.case):
        return finding  # seen in company only: kept as it was
    small = minimise(finding.case, fails)
    return judge(target, small, deep=True)[1] or finding


def cases(target: Target, seed: str, pool: list[bytes]) -> Iterator[bytes]:
    """Without end: by grammar, or a mutation of what showed something new."""
    batch = 0
    while True:
        rng = Random(f"{seed}/{target.name}/{batch}")
        batch += 1
        for _ in range(BATCH):
            if pool and rng.random() < 0.4:
                one, other = pool[int(rng.random() * len(pool))], pool[int(rng.random() * len(pool))]
                yield mutate(one, rng, target.tokens, other, CASE_BYTES_MAX)
            else:
                yield target.generate(rng)[:CASE_BYTES_MAX]


def run(target: Target, seed: str, count: int, seconds: float, slot: Slot, out: IO[str]) -> None:
    """``count`` cases or ``seconds``, whichever ends first. Writes JSON lines: findings, then what was done."""
    pool = [path.read_bytes()[:CASE_BYTES_MAX] for path in target.corpus()]
    seen: set[Hashable] = set()
    known: set[str] = set()
    started, done = time.monotonic(), 0

    def report(finding: Finding) -> None:
        if finding.what in known or len(known) >= KINDS_MAX:
            return
        known.add(finding.what)
        small = shrink(target, finding)
        line = asdict(small) | {"case": small.case.hex(), "type": "finding"}
        print(json.dumps(line), file=out, flush=True)

    for case in cases(target, seed, pool):
        slot.write(done, case)
        signature, finding = judge(target, case)
        if finding is not None:
            report(finding)
        elif signature not in seen and signature is not None:
            seen.add(signature)
            if len(pool) < POOL_MAX:
                pool.append(case)
        done += 1
        if done % BATCH == 0 or done >= count:
            for wrong, disagreement in target.drain():
                report(Finding("disagreement", f"{disagreement.reader} {disagreement.what}", disagreement.detail, wrong))
            if done >= count or time.monotonic() - started > seconds:
                break
    summary = {
        "type": "done", "cases": done, "seconds": time.monotonic() - started, "kinds": len(seen), "compared": target.compared,
    }  # fmt: skip
    print(json.dumps(summary), file=out, flush=True)
    target.close()


if __name__ == "__main__":
    sys.exit("run `python -m fuzz`")
