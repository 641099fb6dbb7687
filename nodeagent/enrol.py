"""What stood in a netns before the programs watched it. Hooks run when a socket is made, connected or accepted; a
socket that is older, or came from outside the attached cgroup, was never asked. Such connections are ended when their
netns is enrolled. Listeners: for one of a cgroup outside no hook will ever run, so it is ended too; one that is merely
older is reported (what it accepts, the ingress hook judges)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from nodeagent import cgroups
from nodeagent.datapath_api import EnrolReport
from nodeagent.sockdiag import ANY_STATE, BOTH, TCP, UDP, Sock, SockDiag, State

ROUNDS = 3  # a foreign process may open another while we look; past this the netns is not ours


def inodes_of(pids: Iterable[int]) -> set[int]:
    """Inodes of the sockets these processes hold; those that exit meanwhile hold none."""
    found: set[int] = set()
    for pid in pids:
        try:
            for entry in os.scandir(f"/proc/{pid}/fd"):
                info = entry.stat()
                if stat.S_ISSOCK(info.st_mode):
                    found.add(info.st_ino)
        except OSError:
            continue
    return found


def foreign(sock: Sock, seen_ids: frozenset[int], cgroup_ids: frozenset[int]) -> bool:
    """Whether no program saw this socket being made. Pure.

    ``seen_ids``: ids of the sk_storage maps of which one has an entry for every socket made, connected or accepted under
    the programs; ``cgroup_ids``: the attached cgroup and all below it, and those that former agents had there.
    """
    if sock.state in (State.TIME_WAIT, State.SYN_RECV):  # no socket yet or any more: nothing is stored on it
        return False
    if sock.cgroup not in cgroup_ids:
        return True
    # The kernel lists no storage of UDP sockets; the egress hook asks for a record with each of their datagrams
    return sock.protocol == TCP and seen_ids.isdisjoint(sock.storage)


def plan(
    socks: Iterable[Sock], seen_ids: frozenset[int], cgroup_ids: frozenset[int], held: set[int] | None
) -> tuple[list[Sock], list[Sock]]:
    """(to destroy, listeners to report). Pure. ``held``: only sockets of these inodes; None: all of the netns."""
    destroy: list[Sock] = []
    listeners: list[Sock] = []
    for sock in socks:
        if (held is not None and sock.inode not in held) or not foreign(sock, seen_ids, cgroup_ids):
            continue
        waits = sock.state == State.LISTEN or (sock.protocol == UDP and not sock.remote_port)
        (listeners if waits and sock.cgroup in cgroup_ids else destroy).append(sock)
    return destroy, listeners


def enrol(diag: SockDiag, seen_by: Mapping[int, int], ids: frozenset[int], held_by: Path | None) -> EnrolReport:
    """End what is foreign in the netns of ``diag``. ``seen_by``: id -> descriptor of the maps that `foreign` tells of, and
    ``ids`` its cgroups; ``held_by``: only what processes of this cgroup hold. A second run finds nothing: safe to repeat,
    also after a restart. Raises OSError."""
    ended: list[str] = []
    listeners: dict[str, None] = {}  # in the order seen; ending connections may end their owner
    rest: list[Sock] = []
    for _ in range(ROUNDS):
        held = inodes_of(cgroups.pids(held_by)) if held_by is not None else None
        rest, old = plan(diag.dump(ANY_STATE, BOTH, tuple(seen_by.values())), frozenset(seen_by), ids, held)
        listeners |= dict.fromkeys(str(sock) for sock in old)
        if not rest:
            break
        ended += [str(sock) for sock in rest if diag.destroy(sock)]
    return EnrolReport(tuple(ended), tuple(listeners), tuple(str(sock) for sock in rest))
