"""`make fuzz [ONLY=name,name] [CASES=N]`: cases against every target, or against those named."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from fuzz import driver
from fuzz.targets import NAMES

CASES = {"http1-requests": 7_000_000, "http1-responses": 3_000_000}  # 10**7 of the HTTP core
CASES_ELSE = 200_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--only", default=",".join(NAMES), help=f"targets: {', '.join(NAMES)}")
    parser.add_argument("--cases", type=int, default=0, help="for each target (default: 10^7 for HTTP/1.1, 200,000 elsewhere)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most, for each target")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", default=time.strftime("%Y-%m-%d"), help="the same seed makes the same cases")
    parser.add_argument("--keep", action="store_true", help="store findings in fuzz/corpus")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := set(names) - set(NAMES):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    found = 0
    for name in names:
        count = options.cases or CASES.get(name, CASES_ELSE)
        found += driver.run(name, count, options.seconds, options.processes, options.seed, keep=options.keep)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
