"""What the agent asks of a data path, and its answers as data. `datapath_live.Datapath` does it in the kernel,
`datapath_fake.FakeDatapath` in memory (an agent without kernel: dry runs, tests, development on a laptop).

Every call but `flows` is synchronous, may be made from any thread (one lock inside) and is idempotent where a
restart needs it. `load` takes about a second, `apply` some ms per thousand changed entries: use `asyncio.to_thread`.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from mesh.dataplane import NodePlan
from mesh.link import Flow, Grant, Listener

if TYPE_CHECKING:
    from nodeagent.express_path import ExpressPath

# (source identity, destination workload, address and port as asked, protocol) -> the rule, or ""
DeniedBy = Callable[[int, int, str, int, str], str]


class DatapathError(Exception):
    """The kernel refused; the message says what and what to do. Nothing was opened by the failed call."""


class MapFull(DatapathError):
    """The plan does not fit a kernel map. The content before the call is still in force."""


class SchemaMismatch(DatapathError):
    """Pinned maps have other layouts than this version's: they belong to another Pillion."""


class Role(IntEnum):
    """enum pl_role"""

    WORKLOAD = 1
    AGENT = 2
    PROXY = 3


class Member(msgspec.Struct, frozen=True):
    """Who the processes of a cgroup (and all below it) are."""

    cgroup: int  # cgroup id: `cgroups.cgroup_id(path)`
    role: Role
    workload: int = 0  # numeric ids from the controller; 0 for agent and proxy
    identity: int = 0
    netns: int = 0  # netns cookie; 0: not bound to one (agent, proxy)
    permissive: bool = False
    express: bool = True


class OpenListener(NamedTuple):
    """A bound, listening (TCP) socket inside a netns, and what workers are told of it. `fd` is the data path's: send it
    (SCM_RIGHTS duplicates it), never close it."""

    frame: Listener
    fd: int


class EnrolReport(msgspec.Struct, frozen=True):
    """What stood in a workload's netns before the programs watched it."""

    destroyed: tuple[str, ...] = ()  # "tcp 10.77.1.2:5000 -> 10.0.0.1:80 (established)"
    old_listeners: tuple[str, ...] = ()  # older than the enrolment: connections they accept are refused; restart their owner
    survived: tuple[str, ...] = ()  # could not be destroyed: the workload must not be declared ready


class DatapathApi(Protocol):
    """The order of a start: `load`, `adopt` each netns, `set_members`, `open_listeners`, `apply`, then `enrol`."""

    def load(self) -> dict[str, bool]:
        """Run the loader child, open the pinned maps, read what they hold. Program name -> attached.

        Raises DatapathError (loader failed: its last line of stderr inside), SchemaMismatch.
        """

    def off(self) -> dict[str, str]:
        """Optional parts that this kernel has not, as `load` saw: part of nodeagent/optional.py -> why. Never waits."""

    def adopt(self, netns: Path | None) -> int:
        """Remember a netns (None: the agent's own) and return its cookie. Again: the same cookie. Raises OSError."""

    def forget(self, netns: int) -> None:
        """Close listeners and handles of this netns cookie, so that it can be deleted. Unknown: nothing."""

    def set_members(self, members: Iterable[Member]) -> None:
        """Make exactly these cgroups members (agent, proxy, every workload). Cgroups no longer listed become unknown:
        their connects are denied. Raises MapFull."""

    def set_names(
        self,
        identities: Mapping[int, str],
        workloads: Mapping[int, str],
        services: Mapping[int, str] = {},
        denied_by: DeniedBy | None = None,
    ) -> None:
        """Numeric id -> SPIFFE URI / item key, for `flows`. Taken as is, no copy. ``denied_by``: names the rule of a
        denial, see `blame.Blame`."""

    def set_revision(self, node: str, revision: int) -> None:
        """What `flows` writes into Flow.node and Flow.revision."""

    def extend_lease(self, until_ns: int) -> None:
        """New connections pass until then (CLOCK_BOOTTIME, ns); 0: no limit. The agent calls it while its policy is fresh."""

    def leased_until_ns(self) -> int:
        """What `extend_lease` wrote last, in this run of the agent or a former one; 0: no limit."""

    def apply(self, plan: NodePlan, generation: int) -> str:
        """Make the maps say what the plan says, in an order that opens nothing early, then set the generation.
        Returns `observed_digest()` of after. Raises MapFull or DatapathError with the former content back in force."""

    def observed_digest(self) -> str:
        """Hex digest of what the kernel maps hold now (read back), without config and members; equal plans, equal digests."""

    def repair(self) -> int:
        """Read the maps, put back what differs from the last applied plan and members. Returns how many entries differed."""

    def grant(self, asked: Grant) -> str:
        """Open to who asked what the last plan's ``ways_out`` say of a name; the reason where it does not. Raises MapFull,
        DatapathError, OSError."""

    def end_denied(self, plan: NodePlan) -> int:
        """Destroy (RST both ends) established native connections the plan denies, idle ones too. Returns how many; none
        where that part is off: the programs drop their packets since the plan was applied."""

    def enrol(self, netns: int, cgroup: Path | None = None) -> EnrolReport:
        """End sockets of this netns that predate the programs or came from outside them. In the node's own netns
        give the workload's cgroup: only sockets its processes hold are touched. Safe to repeat."""

    def guard_veth(self, veth: str, addresses: Sequence[str], permissive: bool = False) -> None:
        """Filter the host side of a workload's veth: own source addresses, known protocols, egress. Raises DatapathError."""

    def set_unguarded(self, addresses: Sequence[str]) -> None:
        """Every address of this node's workloads that is behind no guarded veth (the node's own): where the others' filters
        shall let native connections through. Raises DatapathError."""

    def unguard_veth(self, veth: str) -> None:
        """Take the filter off; a veth that is gone is fine."""

    def open_listeners(self, netns: int, addresses: Sequence[str], hbone: bool = True) -> list[OpenListener]:
        """Open what is not open yet in this netns: outbound 15001 and DNS 15053 udp+tcp on 127.0.0.1 and ::1, HBONE
        15008 on each address; then mark the netns as ours in `listeners`. Returns all of them, also on repeat; addresses
        no longer given are closed. Raises OSError (EADDRINUSE: somebody in the netns has the port)."""

    def make_stock(self, netns: int, family: int, count: int) -> list[int]:
        """Descriptors of ``count`` fresh TCP client sockets of this netns (non-blocking, TCP_NODELAY); the caller owns
        them. ``family``: AF_INET or AF_INET6. Raises OSError, KeyError for a netns never adopted."""

    def express(self) -> ExpressPath:
        """Loads the programs that carry requests (nodeagent/express_path.py). Raises DatapathError: this kernel does not."""

    def origin(self, sock: socket.socket) -> dict[str, Any] | None:
        """Fields of struct pl_origin; None for a socket that was not captured."""

    def netns_fd(self, netns: int) -> int:
        """Of a netns held open, and the caller's own to close: another thread may let go of the netns meanwhile, and the number
        of its descriptor be another's. Raises KeyError."""

    def flows(self) -> AsyncIterator[Flow]:
        """Kernel verdicts as they happen (one consumer). Ends at `close`."""

    def metrics_text(self) -> str:
        """Prometheus text: ``pillion_datapath_total{reason}``, map entries and sizes, repairs, refused applies, lost events."""

    def hello_layouts(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Struct name (pl_origin, pl_caller) -> (`struct` format, field names), for mesh.link.Hello."""

    def close(self) -> None:
        """Close descriptors. The programs and maps stay pinned and keep working."""
