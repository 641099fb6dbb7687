from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from controller.streams import PING_INTERVAL_S, NodeStream
from mesh.model import CONFIG_KEY, Config


@pytest.mark.parametrize(("lease_s", "interval_s"), [(0.0, PING_INTERVAL_S), (3600.0, PING_INTERVAL_S), (4.0, 1.0), (3.0, 0.75)])
def test_nodes_hear_from_it_several_times_within_a_lease(lease_s: float, interval_s: float) -> None:
    publisher: Any = SimpleNamespace(state={CONFIG_KEY: Config("mesh.local", policy_lease_s=lease_s)})
    none: Any = None
    assert NodeStream(publisher, none, none, 0.0, lambda: False)._ping_interval_s() == interval_s
