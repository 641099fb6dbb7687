"""One state on its way through the node, and what is counted of all of them."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.snapshot import Versioned
from nodeagent import reconcile_events as ev


@dataclass(slots=True)
class Rollout:
    """``token`` names it in commands and answers."""

    token: int
    received: Versioned  # as the controller knows it
    enforced: Versioned  # the same, but for a cut node
    enrolled: tuple[ev.Enrolled, ...]
    generation: int
    stage: str = "kernel"  # kernel | workers | end | done
    started_at: float = 0.0
    deadline: float = 0.0
    persisting: bool = True


@dataclass(slots=True)
class Counts:
    """For the metrics."""

    rollouts: int = 0
    kernel_failed: int = 0
    repaired: int = 0
    ended: int = 0  # native connections
