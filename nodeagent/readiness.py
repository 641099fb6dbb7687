"""When a node may be called ready: it enforces what the controller last said, everywhere, for every workload it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NAMED_MAX = 5  # of each kind in the detail


@dataclass(frozen=True, slots=True)
class Facts:
    """What readiness is judged by."""

    programs: Mapping[str, bool] = field(default_factory=dict)
    revision: int = 0  # applied; 0: no state yet
    applied: bool = False  # the newest state received is the one in the kernel
    kernel_error: str = ""
    kernel_drift: bool = False  # maps differ from what was applied and could not be repaired
    persist_error: str = ""
    cut: bool = False
    specs_error: str = ""  # the node does not know its workloads
    workers: Mapping[str, bool] = field(default_factory=dict)  # connected worker -> holds the applied state
    lagging: tuple[str, ...] = ()  # workers that were connected, did not apply, and still exist
    waiting: Mapping[str, str] = field(default_factory=dict)  # workload -> what it lacks
    refused: Mapping[str, str] = field(default_factory=dict)  # workload -> reason; told, but holds up nothing


@dataclass(frozen=True, slots=True)
class Readiness:
    ready: bool
    detail: str


def assess(facts: Facts) -> Readiness:
    """Ready, or what is missing in words an operator can act on."""
    missing: list[str] = []
    detached = _lacking(facts.programs)
    if not facts.programs:
        missing.append("the programs are not loaded yet")
    elif detached:
        missing.append(f"programs not attached: {', '.join(detached)}")
    if facts.specs_error:
        missing.append(f"no workloads are known: {facts.specs_error}")
    if facts.cut:
        missing.append("this node was cut by an operator")
    if not facts.revision and not facts.cut:
        missing.append("no state from the controller yet")
    elif not facts.applied:
        missing.append("the newest state is not applied yet")
    if facts.kernel_error:
        missing.append(f"the kernel refused the state: {facts.kernel_error}")
    if facts.kernel_drift:
        missing.append("kernel maps differ from the state and could not be repaired")
    if facts.persist_error:
        missing.append(f"the state cannot be kept on disk: {facts.persist_error}")
    behind = _lacking(facts.workers)
    if not facts.workers:
        missing.append("no proxy worker is connected")
    elif behind:
        missing.append(f"proxy workers without the state: {', '.join(behind)}")
    if facts.lagging:
        missing.append(f"proxy workers that do not answer: {', '.join(facts.lagging[:NAMED_MAX])}")
    missing += _named(facts.waiting)
    refused = _named(facts.refused)
    return Readiness(not missing, "; ".join(missing + refused))


def _lacking(has: Mapping[str, bool]) -> list[str]:
    """Names of those that have not, as many as are told."""
    return sorted(name for name, there in has.items() if not there)[:NAMED_MAX]


def _named(workloads: Mapping[str, str]) -> list[str]:
    lines = [f"{key.removeprefix('Workload/')}: {text}" for key, text in sorted(workloads.items())]
    return lines[:NAMED_MAX] + ([f"and {len(lines) - NAMED_MAX} more"] if len(lines) > NAMED_MAX else [])
