"""What the kernel's scheduler is told of the proxy's threads, each of itself: a worker's loop is what everybody waits for. No
thread gets a larger share of the processors by this, only an earlier turn or a smaller share, so it takes no capability."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from l7proxy.seccomp import NUMBERS

SLICE_NS = 100_000  # the shortest that the kernel takes; by default it is 14 or more of these
PATIENT_NICE, NICE_MAX = 5, 19  # about a third of what the loop gets, where there is not enough for both
_RESET_ON_FORK = 1
_libc = ctypes.CDLL(None)


def prompt(yes: bool) -> bool:
    """Woken, this thread runs before programs that compute, for which it would wait up to a tick; or it does no longer. It costs
    throughput, since less waits for it when it runs. Not so what it forks. Linux before 6.12 takes it and changes nothing.
    False: it may not ask."""
    return _tell(os.SCHED_OTHER, _RESET_ON_FORK, _nice(), SLICE_NS if yes else 0)


def patient() -> bool:
    """This thread computes: it interrupts nobody, and gives way to the loop."""
    return _tell(os.SCHED_BATCH, 0, min(NICE_MAX, _nice() + PATIENT_NICE), 0)


def _nice() -> int:
    return int(Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()[16])


def _tell(policy: int, flags: int, nice: int, slice_ns: int) -> bool:
    attributes = struct.pack("=IIQiIQQQ", 48, policy, flags, nice, 0, slice_ns, 0, 0)
    return not _libc.syscall(NUMBERS["sched_setattr"], 0, attributes, 0)
