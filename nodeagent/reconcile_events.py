"""What happens to the agent (events) and what it does about it (commands): the language of `reconcile`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh import link, snapshot
from mesh.model import State, Workload
from nodeagent.workloads import Spec


@dataclass(frozen=True, slots=True)
class Placed:
    """A spec with what the kernel calls it; ``error`` when its netns or cgroup is not there (then the numbers are 0)."""

    spec: Spec
    netns: int = 0  # cookie
    cgroup: int = 0  # id
    error: str = ""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A workload to be enforced and served: placed here, and in the controller's state with the identity it asked for."""

    spec: Spec
    netns: int
    cgroup: int
    item: Workload


# ---- events


@dataclass(frozen=True, slots=True)
class Restored:
    """The state of a former run, read from disk."""

    state: snapshot.Versioned
    generation: int


@dataclass(frozen=True, slots=True)
class Started:
    """The programs are loaded and attached: name -> whether."""

    programs: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class ControllerUp:
    """A stream is open."""


@dataclass(frozen=True, slots=True)
class ControllerDown:
    pass


@dataclass(frozen=True, slots=True)
class Received:
    message: snapshot.Snapshot | snapshot.Delta


@dataclass(frozen=True, slots=True)
class Garbled:
    """A frame of the stream that is none."""

    error: str


@dataclass(frozen=True, slots=True)
class CutOff:
    """The controller told this node, over TLS, that it is cut: it gets no state that could say so."""


@dataclass(frozen=True, slots=True)
class SpecsChanged:
    """The workloads this node shall run, always complete, by key."""

    placed: Mapping[str, Placed]
    error: str = ""  # why they are not known: the node is not ready then


@dataclass(frozen=True, slots=True)
class Registered:
    spec: Spec
    revision: int  # the first state that holds it


@dataclass(frozen=True, slots=True)
class RegisterRefused:
    spec: Spec
    reason: str  # the controller's enum: identity_not_granted, …
    message: str


@dataclass(frozen=True, slots=True)
class RegisterFailed:
    """No answer, or one that says nothing about the workload."""

    spec: Spec
    error: str


@dataclass(frozen=True, slots=True)
class Unregistered:
    key: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class KernelApplied:
    token: int
    digest: str  # observed, read back
    serving: frozenset[str]  # keys of workloads with all their listeners
    errors: Mapping[str, str]  # key -> why it has none


@dataclass(frozen=True, slots=True)
class KernelFailed:
    """The former content is still in force."""

    token: int
    error: str


@dataclass(frozen=True, slots=True)
class Ended:
    token: int
    connections: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Persisted:
    token: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Observed:
    """The answer to Repair."""

    digest: str
    repaired: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A proxy worker said Ready; it knows nothing yet."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLeaving:
    """It ends by plan, and serves what it has; whether it takes new connections is its proxy's next generation's matter."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """The link is closed. ``gone``: nothing listens there any more, so nothing serves by an old state either."""

    worker: str
    gone: bool = False


@dataclass(frozen=True, slots=True)
class WorkerAcked:
    worker: str
    revision: int
    digest: str


@dataclass(frozen=True, slots=True)
class WorkerRefused:
    worker: str
    revision: int
    error: str


@dataclass(frozen=True, slots=True)
class SvidsChanged:
    held: frozenset[str]  # SPIFFE ids
    errors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes; about every half second."""


Event = (
    Restored | Started | ControllerUp | ControllerDown | Received | Garbled | CutOff | SpecsChanged | Registered | RegisterRefused
    | RegisterFailed | Unregistered | KernelApplied | KernelFailed | Ended | Persisted | Observed | WorkerUp
    | WorkerLeaving | WorkerDown | WorkerAcked | WorkerRefused | SvidsChanged | Tick
)  # fmt: skip


# ---- commands


@dataclass(frozen=True, slots=True)
class Send:
    """To the controller, if the stream is open."""

    message: snapshot.AgentMessage


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Open the stream anew."""


@dataclass(frozen=True, slots=True)
class Register:
    spec: Spec


@dataclass(frozen=True, slots=True)
class Unregister:
    key: str


@dataclass(frozen=True, slots=True)
class ApplyKernel:
    """Plan, members, listeners, maps, generation, in the data path's order. One at a time; answered by KernelApplied or
    KernelFailed."""

    token: int
    revision: int
    state: State
    enrolled: tuple[Enrolled, ...]
    generation: int


@dataclass(frozen=True, slots=True)
class EndDenied:
    """End native connections that the plan applied last denies. Answered by Ended."""

    token: int


@dataclass(frozen=True, slots=True)
class Persist:
    """Answered by Persisted."""

    token: int
    state: snapshot.Versioned
    generation: int


@dataclass(frozen=True, slots=True)
class Repair:
    """Answered by Observed."""


@dataclass(frozen=True, slots=True)
class UpdateWorker:
    worker: str
    update: link.Update


@dataclass(frozen=True, slots=True)
class EquipWorker:
    """Its state stands: what it lacks of listeners, certificates and sockets may follow."""

    worker: str


@dataclass(frozen=True, slots=True)
class DropWorker:
    """Close the link and dial again."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class WantSvids:
    """Exactly these certificates."""

    spiffes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Revoke:
    """Serials (hex) whose certificates may serve no longer."""

    serials: frozenset[str]


@dataclass(frozen=True, slots=True)
class TrustRoots:
    """The mesh's bundle, PEM, for the agent's own TLS."""

    roots: tuple[str, ...]


Command = (
    Send | Reconnect | Register | Unregister | ApplyKernel | EndDenied | Persist | Repair | UpdateWorker | EquipWorker
    | DropWorker | WantSvids | Revoke | TrustRoots
)  # fmt: skip
