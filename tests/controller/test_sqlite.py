"""The store: compare-and-swap, transactions, watches, and files that are not ours."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controller import sqlite
from controller.sqlite import SqliteStore
from controller.store import Check, Compacted, Conflict, Delete, Put, StoreError


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    made = await SqliteStore.open(tmp_path / "db")
    yield made
    await made.close()


async def test_put_get_list(store: SqliteStore) -> None:
    assert await store.revision() == 0 and await store.get("a/1") is None
    assert await store.put("a/1", b"x") == 1
    assert await store.put("a/2", b"y") == 2
    assert await store.put("b/1", b"z") == 3
    assert await store.put("a/1", b"w") == 4
    entry = await store.get("a/1")
    assert entry is not None and (entry.value, entry.created, entry.revision) == (b"w", 1, 4)
    revision, entries = await store.list("a/")
    assert revision == 4 and [item.key for item in entries] == ["a/1", "a/2"]


async def test_compare_and_swap(store: SqliteStore) -> None:
    await store.put("a", b"1", expect=0)
    with pytest.raises(Conflict):
        await store.put("a", b"2", expect=0)
    await store.put("a", b"2", expect=1)
    with pytest.raises(Conflict) as caught:
        await store.transaction([Check("a", 1)], [Put("b", b"1"), Delete("a")])
    assert (caught.value.key, caught.value.found) == ("a", 2)
    assert await store.get("b") is None and await store.revision() == 2


async def test_of_racing_swaps_one_wins(store: SqliteStore) -> None:
    results = await asyncio.gather(*(store.put("a", bytes([n]), expect=0) for n in range(20)), return_exceptions=True)
    assert sum(isinstance(result, int) for result in results) == 1


async def test_a_transaction_that_changes_nothing_has_no_revision(store: SqliteStore) -> None:
    await store.put("a", b"1")
    assert await store.transaction([], [Delete("gone")]) == 1


async def test_watch_from_a_revision(store: SqliteStore) -> None:
    await store.put("a/1", b"1")
    await store.put("a/2", b"2")
    await store.put("b/1", b"3")
    seen: list[tuple[int, str, bytes | None]] = []

    async def follow() -> None:
        async for change in store.watch("a/", after=1):
            seen.append((change.revision, change.key, change.value))
            if change.key == "a/end":
                return

    task = asyncio.create_task(follow())
    await asyncio.sleep(0)
    await store.transaction([], [Put("a/3", b"4"), Delete("a/1")])
    await store.put("a/end", b"")
    async with asyncio.timeout(5):
        await task
    assert seen == [(2, "a/2", b"2"), (4, "a/1", None), (4, "a/3", b"4"), (5, "a/end", b"")]


async def test_compacted_history_is_told(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "HISTORY_REVISIONS_MAX", 10)
    for number in range(30):
        await store.put("a", bytes([number]))
    with pytest.raises(Compacted):
        async for _ in store.watch("a", after=1):
            pass


async def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "db")
    await store.put("a", b"1")
    await store.close()
    store = await SqliteStore.open(tmp_path / "db")
    entry = await store.get("a")
    assert entry is not None and entry.value == b"1"
    await store.close()
    assert (tmp_path / "db").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("PRAGMA application_id=1; CREATE TABLE t (x)", "another program"),
        (f"PRAGMA application_id={sqlite.APPLICATION_ID}; PRAGMA user_version=99; CREATE TABLE t (x)", "schema 99"),
    ],
)
async def test_foreign_files_are_refused(tmp_path: Path, script: str, message: str) -> None:
    db = sqlite3.connect(tmp_path / "db")
    db.executescript(script)
    db.close()
    with pytest.raises(StoreError, match=message):
        await SqliteStore.open(tmp_path / "db")


async def test_junk_is_told_to_be_damaged(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"not a database, " * 512)
    with pytest.raises(StoreError, match="damaged"):
        await SqliteStore.open(tmp_path / "db")
