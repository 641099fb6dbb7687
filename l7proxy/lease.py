"""Until when this worker may let in anything new: the agent says it again and again while its policy is fresh. A worker whose
agent is frozen or dead runs out of it by itself. What is open goes on: it was let in by a policy that was good.
"""

from __future__ import annotations

import time

from mesh import link


class Lease:
    """Before the first word of the agent it has ended already."""

    def __init__(self) -> None:
        self.until_ns = 0  # CLOCK_BOOTTIME, as bpf/common.h compares it

    def hear(self, message: link.Message) -> bool:
        """Whether it was about the lease."""
        if isinstance(message, link.Lease):
            self.until_ns = message.until_ns
            return True
        return False

    def over(self, lease_s: float) -> bool:
        """Nothing new may begin. ``lease_s``: the limit the operator set; 0: none."""
        return lease_s > 0 and time.clock_gettime_ns(time.CLOCK_BOOTTIME) > self.until_ns
