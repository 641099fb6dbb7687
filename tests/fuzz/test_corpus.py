"""Every case that once showed a fault, checked again in full: all split points, all readers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.http1.nginx import Nginx
from fuzz.target import CORPUS
from fuzz.targets import NAMES, make
from fuzz.worker import judge

CASES = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with Nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_found_once(path: Path, nginx: Nginx) -> None:
    target = make(path.parent.name, nginx)
    finding = judge(target, path.read_bytes(), deep=True)[1]
    assert finding is None, f"{finding.what}: {finding.detail}"


def test_the_corpus_belongs_to_targets() -> None:
    assert {path.parent.name for path in CASES} <= set(NAMES)
    assert all(path.stat().st_size <= 65536 for path in CASES)
