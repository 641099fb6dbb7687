"""What the kernel's scheduler is told of the proxy's threads, each of itself: a worker's loop is what everybody waits for. No
thread gets a larger share of the processors by this, only an earlier turn or a smaller share, so it takes no capability."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path

from l7proxy.seccomp import NUMBERS

SLICE_NS = 100_000  # the shortest that the kernel takes; by default it is 14 or more of these
PATIENT_NICE, NICE_MAX = 5, 19  # about a third of what the loop gets, where there is not enough for both
LOOK_S = 0.25
BUSY_SHARE, STILL_BUSY_SHARE = 0.4, 0.3  # of the time on a processor, to begin and to go on to give way
WAITED_SHARE_MAX = 0.7  # of its time on a processor, spent waiting for one: above, others compute here
TRIED_AGAIN_S = 60.0  # after it had to wait
_RESET_ON_FORK = 1
_libc = ctypes.CDLL(None)


class LoopThread:
    """The thread of a worker's loop, which makes this and calls it.

    While several identities are at work (`crowd`) it runs soon after it is woken, before programs that compute, for which it
    would wait up to a tick; not so what it forks. Linux before 6.12 takes that and changes nothing. While it is busy and has
    processors enough it interrupts nobody it could wait for: the program that sends goes on, and more waits when the loop
    runs. Where programs compute beside it, that would be a long wait; what it waited lately tells.

    ``told``: the seconds it has run and those it has waited, both since it began."""

    def __init__(self, told: Callable[[], tuple[float, float]] | None = None) -> None:
        self._told = told or ran_and_waited
        self._at, (self._ran, self._waited) = float("-inf"), self._told()  # the first look decides nothing
        self._crowded = self.yields = False
        self._not_before = 0.0

    def crowd(self, yes: bool) -> bool:
        """See `Budgets.on_crowd`. False: it may not ask."""
        self._crowded = yes
        self.yields = False
        return _tell(os.SCHED_OTHER, _RESET_ON_FORK, _nice(), SLICE_NS if yes else 0)

    def look(self, now: float) -> None:
        """Each `LOOK_S`; ``now`` in seconds of any clock."""
        passed, self._at = now - self._at, now
        before = self._ran, self._waited
        self._ran, self._waited = self._told()
        ran, waited = self._ran - before[0], self._waited - before[1]
        if self._crowded:
            return
        waits = waited > WAITED_SHARE_MAX * ran
        if self.yields and waits:
            self._not_before = now + TRIED_AGAIN_S
        busy = ran > (STILL_BUSY_SHARE if self.yields else BUSY_SHARE) * passed
        yields = busy and not waits and now >= self._not_before
        if yields != self.yields:
            self.yields = yields
            _tell(os.SCHED_BATCH if yields else os.SCHED_OTHER, _RESET_ON_FORK, _nice(), 0)


def patient() -> bool:
    """This thread computes: it interrupts nobody, and gives way to the loop."""
    return _tell(os.SCHED_BATCH, 0, min(NICE_MAX, _nice() + PATIENT_NICE), 0)


def ran_and_waited() -> tuple[float, float]:
    """Of this thread. A kernel without CONFIG_SCHED_INFO tells nothing: then it never seems busy."""
    try:
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0.0, 0.0
    return int(ran) / 1e9, int(waited) / 1e9


def _nice() -> int:
    return int(Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()[16])


def _tell(policy: int, flags: int, nice: int, slice_ns: int) -> bool:
    attributes = struct.pack("=IIQiIQQQ", 48, policy, flags, nice, 0, slice_ns, 0, 0)
    return not _libc.syscall(NUMBERS["sched_setattr"], 0, attributes, 0)
