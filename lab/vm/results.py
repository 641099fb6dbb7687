"""What was seen of each kernel, kept from one run of the matrix to the next: a run of one suite leaves the others' lines."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from lab.state import write_atomic
from lab.vm.capabilities import Outcome, Run, Seen
from lab.vm.kernels import CACHE

FOLDER = CACHE / "seen"


def keep(seen: Seen, folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{seen.kernel}.json", json.dumps(asdict(seen), indent=1).encode())


def recall(kernel: str, folder: Path = FOLDER) -> Seen | None:
    """As it was kept; None: never, or by another version of this."""
    try:
        data = json.loads((folder / f"{kernel}.json").read_text())
        runs = {
            suite: Run(**{**run, "outcomes": [Outcome(**each) for each in run["outcomes"]]})
            for suite, run in data["runs"].items()
        }
        return Seen(data["kernel"], data["release"], runs)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def with_earlier(seen: Seen, folder: Path = FOLDER) -> Seen:
    """`seen`, and what it does not have of an earlier run on the same release."""
    seen = replace(seen, runs={suite: run for suite, run in seen.runs.items() if run.outcomes or run.error})  # not those that run
    earlier = recall(seen.kernel, folder)
    if earlier is None or (seen.runs and earlier.release != seen.release):
        return seen
    kept = {suite: run for suite, run in earlier.runs.items() if suite not in seen.runs}
    return Seen(seen.kernel, earlier.release, kept | seen.runs, seen.error)
