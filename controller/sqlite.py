"""`Store` in one SQLite file: WAL, synchronous=FULL, so that an answered write survives kill -9 and power loss."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from controller.store import Change, Check, Compacted, Conflict, Entry, Op, Put, StoreError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x50494C4E  # "PILN"
HISTORY_REVISIONS_MAX = 10_000  # older changes are compacted; a watcher that far behind lists anew
WATCH_BATCH_MAX = 1_000

_SCHEMA = """
CREATE TABLE kv (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, created INTEGER NOT NULL, revision INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE changes (revision INTEGER NOT NULL, key TEXT NOT NULL, PRIMARY KEY (revision, key)) WITHOUT ROWID;
CREATE TABLE head (one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL, compacted INTEGER NOT NULL);
INSERT INTO head VALUES (1, 0, 0);
"""

T = TypeVar("T")


class SqliteStore:
    """One writer thread owns the connection; callers wait in the event loop. Open with `SqliteStore.open`."""

    def __init__(self, path: Path, db: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self._path, self._db, self._thread = path, db, thread
        self._changed = asyncio.Condition()
        self._closed = False

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Opens or makes the file (0600). Raises StoreError when it is damaged, foreign or from a newer version."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        try:
            db = await asyncio.get_running_loop().run_in_executor(thread, _open, path)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(path, db, thread)

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}; check the disk, then restart the controller") from error

    async def revision(self) -> int:
        return await self._run(lambda: _head(self._db)[0])

    async def get(self, key: str) -> Entry | None:
        def work() -> Entry | None:
            row = self._db.execute("SELECT key, value, created, revision FROM kv WHERE key = ?", (key,)).fetchone()
            return Entry(*row) if row else None

        return await self._run(work)

    async def list(self, prefix: str) -> tuple[int, list[Entry]]:
        def work() -> tuple[int, list[Entry]]:
            rows = self._db.execute(
                "SELECT key, value, created, revision FROM kv WHERE key >= ? AND key < ? ORDER BY key",
                (prefix, prefix + "\U0010ffff"),
            ).fetchall()
            return _head(self._db)[0], [Entry(*row) for row in rows]

        return await self._run(work)

    async def put(self, key: str, value: bytes, expect: int | None = None) -> int:
        return await self.transaction([] if expect is None else [Check(key, expect)], [Put(key, value)])

    async def transaction(self, checks: Sequence[Check], ops: Sequence[Op]) -> int:
        # Shielded: a caller that gives up must not leave us unsure whether watchers were told.
        return await asyncio.shield(asyncio.ensure_future(self._transact(checks, ops)))

    async def _transact(self, checks: Sequence[Check], ops: Sequence[Op]) -> int:
        revision = await self._run(lambda: _transact(self._db, checks, ops))
        async with self._changed:
            self._changed.notify_all()
        return revision

    async def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        while not self._closed:
            position = after
            changes, after = await self._run(lambda at=position: _changes(self._db, prefix, at))  # type: ignore[misc]  # a bound default
            for change in changes:
                yield change
            if after == position:
                async with self._changed:
                    if not self._closed and (await self.revision()) == after:
                        await self._changed.wait()

    async def close(self) -> None:
        self._closed = True
        async with self._changed:
            self._changed.notify_all()
        await self._run(self._db.close)
        self._thread.shutdown()


def _open(path: Path) -> sqlite3.Connection:
    new = not path.exists()
    if new:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise StoreError(f"{path}: cannot be opened: {error}") from error
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA busy_timeout=5000")
        (check,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if check != "ok":
            raise StoreError(_damaged(path, check))
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if empty:
            db.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
            )
        elif application != APPLICATION_ID:
            raise StoreError(f"{path} is a database of another program; give the controller a --state-dir of its own")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"{path} has schema {version}, this controller knows {SCHEMA_VERSION}; run the version that wrote it"
            )
        _head(db)
    except StoreError:
        db.close()
        raise
    except (sqlite3.Error, TypeError) as error:
        db.close()
        raise StoreError(_damaged(path, str(error))) from error
    return db


def _damaged(path: Path, what: str) -> str:
    return f"{path} is damaged ({what}); stop here, keep the file, and restore the state directory from a backup"


def _head(db: sqlite3.Connection) -> tuple[int, int]:
    revision, compacted = db.execute("SELECT revision, compacted FROM head").fetchone()
    return revision, compacted


def _transact(db: sqlite3.Connection, checks: Sequence[Check], ops: Sequence[Op]) -> int:
    with closing(db.cursor()) as cursor:
        cursor.execute("BEGIN IMMEDIATE")
        try:
            head, compacted = _head(db)
            for check in checks:
                row = cursor.execute("SELECT revision FROM kv WHERE key = ?", (check.key,)).fetchone()
                found = row[0] if row else 0
                if found != check.revision:
                    raise Conflict(check.key, check.revision, found)
            revision, touched = head + 1, []
            for op in ops:
                if isinstance(op, Put):
                    cursor.execute(
                        "INSERT INTO kv VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value, "
                        "revision = excluded.revision",
                        (op.key, op.value, revision, revision),
                    )
                    touched.append(op.key)
                elif cursor.execute("DELETE FROM kv WHERE key = ?", (op.key,)).rowcount:
                    touched.append(op.key)
            if not touched:
                cursor.execute("ROLLBACK")
                return head
            cursor.executemany("INSERT OR IGNORE INTO changes VALUES (?, ?)", [(revision, key) for key in touched])
            keep = revision - HISTORY_REVISIONS_MAX
            if keep > compacted + HISTORY_REVISIONS_MAX // 10:
                cursor.execute("DELETE FROM changes WHERE revision <= ?", (keep,))
                compacted = keep
            cursor.execute("UPDATE head SET revision = ?, compacted = ?", (revision, compacted))
            cursor.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                cursor.execute("ROLLBACK")
            raise
    return revision


def _changes(db: sqlite3.Connection, prefix: str, after: int) -> tuple[list[Change], int]:
    head, compacted = _head(db)
    if after < compacted:
        raise Compacted(f"history starts at revision {compacted}, asked for {after}")
    end = min(head, after + WATCH_BATCH_MAX)
    rows = db.execute(
        "SELECT c.revision, c.key, kv.value, kv.revision FROM changes c LEFT JOIN kv ON kv.key = c.key "
        "WHERE c.revision > ? AND c.revision <= ? AND c.key >= ? AND c.key < ? ORDER BY c.revision, c.key",
        (after, end, prefix, prefix + "\U0010ffff"),
    ).fetchall()
    changes = [Change(at, key, value) for at, key, value, current in rows if current is None or current == at]
    return changes, end
