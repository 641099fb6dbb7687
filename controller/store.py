"""Where the controller's state lives: a small ordered key-value store with revisions, as etcd has them.

Every transaction that changes something gets the next revision; a write that was answered is on disk. Keys are
``<prefix>/<rest>`` text, values bytes (JSON). One implementation today: `controller.sqlite.SqliteStore`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class StoreError(Exception):
    """The store cannot be used; the message names the file and what to do next."""


class Conflict(Exception):
    """A compare-and-swap lost: ``key`` is not at the expected revision. Nothing was written."""

    def __init__(self, key: str, expected: int, found: int) -> None:
        super().__init__(f"{key} is at revision {found}, expected {expected}")
        self.key, self.expected, self.found = key, expected, found


class Compacted(Exception):
    """The history before this revision is gone: list anew, then watch from the listed revision."""


@dataclass(frozen=True)
class Entry:
    key: str
    value: bytes
    created: int  # revision of the transaction that made it
    revision: int  # revision of the last change


@dataclass(frozen=True)
class Change:
    """``value`` None: deleted. A value overwritten since is skipped, its later change follows."""

    revision: int
    key: str
    value: bytes | None


@dataclass(frozen=True)
class Check:
    """``key`` must be at ``revision``; 0: must not exist."""

    key: str
    revision: int


@dataclass(frozen=True)
class Put:
    key: str
    value: bytes


@dataclass(frozen=True)
class Delete:
    """Deleting what is not there changes nothing."""

    key: str


Op = Put | Delete


class Store(Protocol):
    async def revision(self) -> int:
        """The revision of the last transaction, 0 for an empty store."""

    async def get(self, key: str) -> Entry | None: ...

    async def list(self, prefix: str) -> tuple[int, list[Entry]]:
        """All entries whose key starts with ``prefix``, by key, and the revision they were read at."""

    async def put(self, key: str, value: bytes, expect: int | None = None) -> int:
        """Writes one key; with ``expect`` only if it is at that revision (0: absent), else Conflict."""

    async def transaction(self, checks: Sequence[Check], ops: Sequence[Op]) -> int:
        """All or nothing, durable when it returns; its revision. Raises Conflict."""

    def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        """Every change with a revision greater than ``after``, in order, then as they come. Raises Compacted."""

    async def close(self) -> None: ...
