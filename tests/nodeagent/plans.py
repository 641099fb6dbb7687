"""A plan for the two workloads of `kernel_world`: a may reach b's 8080 by a virtual address of each family."""

from __future__ import annotations

from dataclasses import replace

from mesh.dataplane import (
    BackendEntry,
    BackendKey,
    Dest,
    DestKey,
    DestKind,
    KernelVerdict,
    Member,
    NodePlan,
    PolicyEntry,
    PolicyKey,
)
from tests.nodeagent.kernel_world import World

VIPS = {4: "240.0.0.9", 6: "fd50:494c::9"}
PORT, TARGET = 80, 8080
A, B = 501, 502  # workload ids
ID_A, ID_B = 301, 302


def plan(world: World, cookies: tuple[int, int], allowed: bool = True) -> NodePlan:
    """Natively, if ``allowed``."""
    dests = {DestKey(address, 0, "tcp"): Dest(DestKind.DENY, reason="port_undeclared") for address in world.b.addresses}
    backends = {}
    for family, address in zip((4, 6), world.b.addresses, strict=True):
        group = 1000 + family
        dests[DestKey(VIPS[family], PORT, "tcp")] = Dest(DestKind.NATIVE, group, 1)
        backends[BackendKey(group, PORT, 0)] = BackendEntry(address, TARGET, B)
    policy = {PolicyKey(B, ID_A, TARGET, "tcp"): PolicyEntry(KernelVerdict.ALLOW, 7)}
    return NodePlan(
        members={world.a.cgroup_id: Member(A, ID_A, cookies[0], False), world.b.cgroup_id: Member(B, ID_B, cookies[1], False)},
        dests=dests,
        backends=backends,
        policy=policy if allowed else {},
    )


def wider(base: NodePlan, count: int) -> NodePlan:
    """The same and ``count`` verdicts more."""
    more = {PolicyKey(10_000 + n, ID_A, TARGET, "tcp"): PolicyEntry(KernelVerdict.ALLOW, 1) for n in range(count)}
    return replace(base, policy=base.policy | more)
