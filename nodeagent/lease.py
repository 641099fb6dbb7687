"""How old this node's policy is, and until when new connections may be let in by it.

The lease runs from the last word of the controller. It is not extended while the kernel refuses the newest state: what is
enforced then is not what the controller says. A new agent that has not heard anything yet keeps to what the former one
granted, as it stands in the kernel; on a machine that started anew, to the age of the state on disk.
"""

from __future__ import annotations

import time


def boot_s() -> float:
    """Seconds since boot, also those the machine slept: a clock nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """All times are `boot_s`, unless named otherwise."""

    def __init__(self) -> None:
        self._fresh_at = 0.0  # 0: nothing heard yet
        self._restored_at = 0.0
        self._granted_ns = 0  # by a former agent

    def heard(self, at: float) -> None:
        """The controller's last word, while what it says is in force; 0: it never spoke."""
        self._fresh_at = max(self._fresh_at, at)

    def restored(self, written_unix: float) -> None:
        """There is a state on disk of this time."""
        self._restored_at = boot_s() - max(0.0, time.time() - written_unix)

    def granted(self, until_ns: int) -> None:
        """What stands in the kernel at the start; 0: nothing."""
        self._granted_ns = until_ns

    def age_s(self) -> float | None:
        """Of the policy: seconds since the controller confirmed it; None: there is none."""
        if self._fresh_at:
            return boot_s() - self._fresh_at
        return boot_s() - self._restored_at if self._restored_at else None

    def until_ns(self, lease_s: float) -> int:
        """The end of a lease of ``lease_s`` seconds, in ns of `boot_s`; 0: there is none, for 0 seconds."""
        if not lease_s:
            return 0
        if not self._fresh_at and self._granted_ns:
            return min(self._granted_ns, int((boot_s() + lease_s) * 1e9))
        return max(1, int(((self._fresh_at or self._restored_at) + lease_s) * 1e9))
