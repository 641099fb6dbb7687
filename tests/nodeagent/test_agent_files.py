"""What the agent keeps on disk: the state, and its book of workloads. How it writes: tests/test_whole_files.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mesh.model import CONFIG_KEY, Config, State
from mesh.snapshot import Versioned
from nodeagent.state_store import StateCorrupt, StateStore, pack, unpack
from nodeagent.workloads import Book, Spec

STATE: State = {CONFIG_KEY: Config(trust_domain="mesh.local")}
SPEC = Spec(name="a", namespace="b", service_account="c", cgroup="/cg/a", addresses=("10.0.0.1",))


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    assert store.restore("n1") is None
    store.keep("n1", Versioned.of(STATE, 7), 3)
    found = store.restore("n1")
    assert found is not None and (found[0].state, found[0].revision, found[1]) == (STATE, 7, 3)
    assert store.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("position", [0, 20, 90, -1])
def test_every_damage_is_noticed(tmp_path: Path, position: int) -> None:
    store = StateStore(tmp_path)
    store.keep("n1", Versioned.of(STATE, 7), 3)
    data = bytearray(store.path.read_bytes())
    data[position] ^= 1
    store.path.write_bytes(data)
    with pytest.raises(StateCorrupt):
        store.restore("n1")


@pytest.mark.parametrize("cut", [0, 10, 100])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    store = StateStore(tmp_path)
    store.keep("n1", Versioned.of(STATE, 7), 3)
    os.truncate(store.path, cut)
    with pytest.raises(StateCorrupt):
        store.restore("n1")


def test_another_nodes_state_is_refused(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.keep("n2", Versioned.of(STATE, 7), 3)
    with pytest.raises(StateCorrupt, match="n2"):
        store.restore("n1")


def test_items_that_do_not_match_their_digest_are_refused(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.keep("n1", Versioned.of(STATE, 7), 3)
    saved = unpack(store.path.read_bytes())
    store.path.write_bytes(pack(type(saved)(saved.node, saved.revision, "0" * 64, saved.generation, saved.items)))
    with pytest.raises(StateCorrupt, match="digest"):
        store.restore("n1")


def test_the_book_survives_and_a_damaged_one_is_empty(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.load()
    book.api[SPEC.key] = SPEC
    book.registered.add(SPEC.key)
    book.save()
    again = Book(tmp_path)
    again.load()
    assert again.api == {SPEC.key: SPEC} and again.registered == {SPEC.key} and not again.error
    for junk in (b"{", b'{"api": 1}', b'{"registered": ["\xff"]}', b'{"x":' + b"[" * 100_000):
        (tmp_path / "workloads.json").write_bytes(junk)
        damaged = Book(tmp_path)
        damaged.load()
        assert not damaged.api and "workloads.json" in damaged.error
