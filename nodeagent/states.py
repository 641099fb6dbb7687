"""States as they come from the controller or from disk: checked, compared, and read for what concerns the agent itself.
A part of the core, without I/O."""

from __future__ import annotations

import msgspec

from mesh import snapshot
from mesh.model import CONFIG_KEY, Config, Identity, Policy, Service, ServiceEntry, State, Workload
from mesh.snapshot import SnapshotError, Versioned
from nodeagent import reconcile_events as ev

GARBLED_MAX = 3  # in a row, then the stream is opened anew


def generation_changes(old: State, new: State) -> bool:
    """Whether a decision made by ``old`` may be another by ``new``: then open connections are judged anew. New
    workloads, services and routes decide nothing about connections that exist."""
    if old is new:
        return False
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if before is after or before == after:
            continue
        if isinstance(before or after, (Policy, Config, Identity, ServiceEntry)):
            return True
        if isinstance(before, Workload):
            if not isinstance(after, Workload):
                return True
            if (before.identity, before.spiffe, before.labels, before.tls, before.addresses, before.node, before.ports) != (
                after.identity, after.spiffe, after.labels, after.tls, after.addresses, after.node, after.ports
            ):  # fmt: skip
                return True
        elif isinstance(before, Service):
            return True  # a policy may select by it
    return False


def is_cut(state: State, node: str) -> bool:
    """Whether the controller says that this node is not to be trusted any more."""
    config = state.get(CONFIG_KEY)
    return isinstance(config, Config) and f"node:{node}" in config.revoked


class Intake:
    """Holds the newest good state. Methods return whether it changed; commands go to ``out``."""

    def __init__(self, node: str, out: list[ev.Command]) -> None:
        self._node, self._out = node, out
        self.newest = Versioned.empty()
        self.cut = False
        self.corrupt = 0  # snapshots, deltas and frames refused
        self._garbled = 0
        self._revoked: frozenset[str] = frozenset()
        self._roots: tuple[str, ...] = ()

    def receive(self, message: snapshot.Snapshot | snapshot.Delta) -> bool:
        try:
            received = self.newest.apply(message) if isinstance(message, snapshot.Delta) else Versioned.from_snapshot(message)
            snapshot.config_of(received.state)  # without it nothing could be decided
        except SnapshotError as error:
            self.refuse(message.revision, str(error))
            return False
        self._garbled = 0
        self.take(received)
        return True

    def refuse(self, revision: int, error: str) -> None:
        """The controller answers a nack with the whole state. Again and again: perhaps this stream is at fault."""
        self.corrupt += 1
        self._garbled += 1
        self._out.append(ev.Send(snapshot.Nack(revision, error)))
        if self._garbled % GARBLED_MAX == 0:
            self._out.append(ev.Reconnect())

    def cut_off(self) -> bool:
        """As if the state said it; so it is kept on disk, and a restart does not undo it."""
        config = self.newest.state.get(CONFIG_KEY)
        if self.cut or not isinstance(config, Config):
            return False
        cut = msgspec.structs.replace(config, revoked=(*config.revoked, f"node:{self._node}"))
        self.take(Versioned.of({CONFIG_KEY: cut}, self.newest.revision))
        return True

    def take(self, state: Versioned) -> None:
        self.newest = state
        config = state.state.get(CONFIG_KEY)
        if not isinstance(config, Config):
            return
        self.cut = is_cut(state.state, self._node)
        revoked = frozenset(_serial(entry) for entry in config.revoked if not entry.startswith("node:"))
        if revoked != self._revoked:
            self._revoked = revoked
            self._out.append(ev.Revoke(revoked))
        if config.bundle and config.bundle != self._roots:
            self._roots = config.bundle
            self._out.append(ev.TrustRoots(config.bundle))


def _serial(text: str) -> str:
    """Lower-case hex without leading zeros."""
    try:
        return format(int(text, 16), "x")
    except ValueError:
        return text
