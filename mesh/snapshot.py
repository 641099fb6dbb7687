"""Snapshots and deltas of a State, the frames of the controller's stream, and the digest both ends compare.

The digest is the sum modulo 2**256 of a SHA-256 for each item, so it depends on no order and follows a delta
at the delta's cost. It finds corruption and drift; who may write is TLS's matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from mesh.model import CONFIG_KEY, Config, Item, State, key_of

MESSAGE_BYTES_MAX = 64 << 20  # a whole snapshot at the planned scale fits
ITEMS_MAX = 500_000
_MODULUS = 1 << 256


class SnapshotError(ValueError):
    """The other end's message does not follow; ask for a whole snapshot. Nothing was changed."""


class Base(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """A frame; the tag names it."""


# ---- controller -> agent


class Snapshot(Base, frozen=True, tag="snapshot"):
    revision: int
    digest: str
    items: dict[str, Item]


class Delta(Base, frozen=True, tag="delta", rename={"from_revision": "from"}):
    """What turns revision ``from_revision`` into ``revision``; ``digest`` is of the result."""

    from_revision: int
    revision: int
    digest: str
    put: dict[str, Item] = {}
    delete: tuple[str, ...] = ()


class Ping(Base, frozen=True, tag="ping"):
    pass


# ---- agent -> controller


class Ack(Base, frozen=True, tag="ack"):
    revision: int
    digest: str


class Nack(Base, frozen=True, tag="nack"):
    revision: int
    error: str


class Ready(Base, frozen=True, tag="ready"):
    ready: bool
    detail: str = ""


class Pong(Base, frozen=True, tag="pong"):
    pass


ServerMessage = Snapshot | Delta | Ping
AgentMessage = Ack | Nack | Ready | Pong

_canonical = msgspec.json.Encoder(order="deterministic")
_encoder = msgspec.json.Encoder()
_server_decoder: msgspec.json.Decoder[ServerMessage] = msgspec.json.Decoder(ServerMessage)
_agent_decoder: msgspec.json.Decoder[AgentMessage] = msgspec.json.Decoder(AgentMessage)
_state_decoder: msgspec.json.Decoder[dict[str, Item]] = msgspec.json.Decoder(dict[str, Item])


def encode(message: ServerMessage | AgentMessage) -> bytes:
    """One JSON text frame."""
    return _encoder.encode(message)


def decode_server(data: bytes | str) -> ServerMessage:
    """A frame the controller sent. Raises SnapshotError."""
    _check_size(data)
    try:
        return _server_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise SnapshotError(f"not a frame of the stream: {error}") from error


def decode_agent(data: bytes | str) -> AgentMessage:
    """A frame an agent sent. Raises SnapshotError."""
    _check_size(data)
    try:
        return _agent_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise SnapshotError(f"not a frame of an agent: {error}") from error


def encode_state(state: State) -> bytes:
    """A State as JSON, for a file or the operator API; keys sorted."""
    return _canonical.encode(state)


def decode_state(data: bytes | str) -> State:
    """The reverse of `encode_state`; items under wrong keys are refused. Raises SnapshotError."""
    _check_size(data)
    try:
        state = _state_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise SnapshotError(f"not a state: {error}") from error
    _check_items(state)
    return state


def item_digest(key: str, item: Item) -> int:
    """One item's share of the digest."""
    return int.from_bytes(hashlib.sha256(key.encode() + b"\0" + _canonical.encode(item)).digest(), "big")


def summed(shares: Iterable[int]) -> int:
    """The digest as a number, from each item's share."""
    return sum(shares) % _MODULUS


def digest_sum(state: Mapping[str, Item]) -> int:
    """The digest as a number, to be carried on with `advance`."""
    return summed(item_digest(key, item) for key, item in state.items())


def digest_hex(value: int) -> str:
    """64 hex digits."""
    return f"{value % _MODULUS:064x}"


def digest(state: Mapping[str, Item]) -> str:
    """64 hex digits over every key and item, in whatever order they come."""
    return digest_hex(digest_sum(state))


def advance(value: int, old: Mapping[str, Item], put: Mapping[str, Item], delete: Iterable[str]) -> int:
    """The digest number after ``put`` and ``delete`` on ``old``, whose number is ``value``."""
    for key in delete:
        if key in old:
            value -= item_digest(key, old[key])
    for key, item in put.items():
        if key in old:
            value -= item_digest(key, old[key])
        value += item_digest(key, item)
    return value % _MODULUS


def changed(state: State, put: Mapping[str, Item], delete: Iterable[str]) -> State:
    """A new State, after ``put`` and ``delete``."""
    gone = set(delete)
    return {**{key: item for key, item in state.items() if key not in gone}, **put}


def make_snapshot(state: State, revision: int) -> Snapshot:
    """The whole of ``state``."""
    return Snapshot(revision, digest(state), state)


def make_delta(old: State, new: State, from_revision: int = 0, revision: int = 0, *, new_digest: str = "") -> Delta:
    """What turns ``old`` into ``new``. ``new_digest`` saves computing it again."""
    put = {key: item for key, item in new.items() if old.get(key) != item}
    gone = tuple(sorted(key for key in old if key not in new))
    return Delta(from_revision, revision, new_digest or digest(new), put, gone)


@dataclass(frozen=True, slots=True)
class Versioned:
    """A State with its revision and digest number; what each end of a stream holds. Treat ``state`` as read-only."""

    revision: int
    state: State
    sum: int

    @property
    def digest(self) -> str:
        return digest_hex(self.sum)

    @classmethod
    def empty(cls) -> Versioned:
        return cls(0, {}, 0)

    @classmethod
    def of(cls, state: State, revision: int) -> Versioned:
        return cls(revision, state, digest_sum(state))

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot) -> Versioned:
        """Raises SnapshotError when the content is not what the digest promises."""
        _check_items(snapshot.items)
        value = digest_sum(snapshot.items)
        if digest_hex(value) != snapshot.digest:
            raise SnapshotError(f"snapshot {snapshot.revision} is corrupt: its digest does not match its content")
        return cls(snapshot.revision, snapshot.items, value)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.revision, self.digest, self.state)

    def next(self, state: State, revision: int) -> tuple[Versioned, Delta]:
        """The successor and the delta that leads there, at the price of what changed."""
        put = {key: item for key, item in state.items() if self.state.get(key) != item}
        gone = tuple(sorted(key for key in self.state if key not in state))
        value = advance(self.sum, self.state, put, gone)
        return Versioned(revision, state, value), Delta(self.revision, revision, digest_hex(value), put, gone)

    def apply(self, delta: Delta) -> Versioned:
        """The successor. Raises SnapshotError if the delta begins elsewhere, an item is under a wrong key, a deleted key is
        not there, or the result's digest is not the promised one; nothing is changed then."""
        if delta.from_revision != self.revision:
            raise SnapshotError(f"delta starts at revision {delta.from_revision}, this end has {self.revision}")
        if delta.revision < delta.from_revision:
            raise SnapshotError(f"delta goes back from revision {delta.from_revision} to {delta.revision}")
        _check_items(delta.put)
        if missing := [key for key in delta.delete if key not in self.state]:
            raise SnapshotError(f"delta {delta.revision} deletes {missing[0]}, which is not there")
        if len(set(delta.delete)) != len(delta.delete) or not delta.put.keys().isdisjoint(delta.delete):
            raise SnapshotError(f"delta {delta.revision} names a key twice")
        value = advance(self.sum, self.state, delta.put, delta.delete)
        if digest_hex(value) != delta.digest:
            raise SnapshotError(f"delta {delta.revision} leads to another digest than it promises")
        state = changed(self.state, delta.put, delta.delete)
        if len(state) > ITEMS_MAX:
            raise SnapshotError(f"delta {delta.revision} makes {len(state)} items; at most {ITEMS_MAX}")
        return Versioned(delta.revision, state, value)


def _check_size(data: bytes | str) -> None:
    if len(data) > MESSAGE_BYTES_MAX:
        raise SnapshotError(f"frame of {len(data)} bytes; at most {MESSAGE_BYTES_MAX}")


def _check_items(items: Mapping[str, Item]) -> None:
    if len(items) > ITEMS_MAX:
        raise SnapshotError(f"{len(items)} items; at most {ITEMS_MAX}")
    for key, item in items.items():
        if key_of(item) != key:
            raise SnapshotError(f"item under {key[:200]!r} belongs under {key_of(item)[:200]!r}")


def config_of(state: State) -> Config:
    """The mesh's configuration. Raises SnapshotError when the state has none: nothing can be decided then."""
    config = state.get(CONFIG_KEY)
    if not isinstance(config, Config):
        raise SnapshotError(f"the state has no {CONFIG_KEY}")
    return config
