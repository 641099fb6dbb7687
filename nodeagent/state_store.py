"""The last good state on disk, so that an agent that starts without its controller still knows what to enforce.

One file: a line ``pillion-state 1 <sha256 of the rest>``, then JSON. What does not match its own digest is refused:
a node with half a policy is worse than a node with none (none denies).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from mesh.model import State
from mesh.snapshot import Versioned
from nodeagent.files import write_atomically

_MAGIC = b"pillion-state 1 "
STATE_BYTES_MAX = 256 << 20


class StateCorrupt(ValueError):
    """The file is not what was written. It is left in place for a person to look at; the agent starts without it."""


class Saved(msgspec.Struct, frozen=True):
    """What is kept. ``generation`` is the one the kernel maps were given together with this state."""

    node: str
    revision: int
    digest: str
    generation: int
    items: State


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Saved] = msgspec.json.Decoder(Saved)


def pack(saved: Saved) -> bytes:
    """The file's content."""
    body = _encoder.encode(saved)
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unpack(data: bytes) -> Saved:
    """Inverse of `pack`. Raises StateCorrupt."""
    head, newline, body = data.partition(b"\n")
    if not newline or not head.startswith(_MAGIC):
        raise StateCorrupt("not a state file of this version")
    if hashlib.sha256(body).hexdigest().encode() != head[len(_MAGIC) :]:
        raise StateCorrupt("its content does not match its digest")
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise StateCorrupt(f"not a state: {error}") from error


class StateStore:
    """The file ``state`` in the agent's state directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "state"

    def load(self, node: str) -> Saved | None:
        """The saved state, None if there is none yet. Raises StateCorrupt, also for another node's state."""
        try:
            if self.path.stat().st_size > STATE_BYTES_MAX:
                raise StateCorrupt(f"larger than {STATE_BYTES_MAX} bytes")
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateCorrupt(f"cannot be read: {error}") from error
        saved = unpack(data)
        if saved.node != node:
            raise StateCorrupt(f"it belongs to node {saved.node}")
        return saved

    def save(self, saved: Saved) -> None:
        """Durable when it returns. Raises OSError; the former file is then still whole."""
        write_atomically(self.path, pack(saved))

    def keep(self, node: str, state: Versioned, generation: int) -> None:
        """As `save`."""
        self.save(Saved(node, state.revision, state.digest, generation, state.state))

    def restore(self, node: str) -> tuple[Versioned, int, float] | None:
        """The state, its generation, and when (unix seconds) it was written. Raises StateCorrupt."""
        saved = self.load(node)
        if saved is None:
            return None
        state = Versioned.of(saved.items, saved.revision)
        if state.digest != saved.digest:
            raise StateCorrupt("its items do not match their digest")
        return state, saved.generation, self.path.stat().st_mtime
