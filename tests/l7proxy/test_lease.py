from __future__ import annotations

import time

from l7proxy.lease import Lease
from mesh import link

HOUR_NS = 3600 * 10**9


def test_before_the_agent_spoke_it_is_over_where_there_is_a_limit() -> None:
    assert Lease().over(60.0)
    assert not Lease().over(0.0)


def test_it_lasts_as_long_as_the_agent_said() -> None:
    lease, now = Lease(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert lease.hear(link.Lease(now + HOUR_NS))
    assert not lease.over(60.0)
    assert lease.hear(link.Lease(now - 1))
    assert lease.over(60.0)
    assert not lease.hear(link.Scrape())
