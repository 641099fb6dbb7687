"""Files that are whole or not there. Controller and agent share no code that touches a disk, so each has these helpers: one text,
and one promise."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from types import ModuleType

import pytest

from controller import files as controllers
from nodeagent import files as agents

EACH = pytest.mark.parametrize("files", [controllers, agents], ids=["controller", "nodeagent"])


@pytest.mark.parametrize("name", ["write_atomically", "private_directory"])
def test_they_are_one_text(name: str) -> None:
    assert inspect.getsource(getattr(controllers, name)) == inspect.getsource(getattr(agents, name))


@EACH
def test_writers_do_not_disturb_each_other(files: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "file"
    threads = [threading.Thread(target=files.write_atomically, args=(path, bytes([65 + n]) * 10_000)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(path.read_bytes())) == 1
    assert list(tmp_path.iterdir()) == [path]


@EACH
def test_a_failed_write_leaves_the_former_file(files: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        files.write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


@EACH
def test_the_mode_is_the_one_asked_for(files: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for mode in (0o644, 0o600):
        files.write_atomically(path, b"x", mode)
        assert path.stat().st_mode & 0o777 == mode


@EACH
def test_a_private_directory_has_no_leftovers(files: ModuleType, tmp_path: Path) -> None:
    (tmp_path / ".state.1.2.tmp").write_text("half")
    (tmp_path / "kept").write_text("whole")
    files.private_directory(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
