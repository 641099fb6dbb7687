"""Locks and folders of labs that come and go at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab import state
from lab.__main__ import main


def test_a_lock_is_had_while_others_take_the_folder_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last lab to go removes the folder and the one above; here between the making of the two."""
    root = tmp_path / "run" / "lab"
    monkeypatch.setattr(state, "RUN_ROOT", root)
    made, mkdir = [], os.mkdir

    def interrupted(path: str, mode: int = 0o777) -> None:
        mkdir(path, mode)
        made.append(Path(path).name)
        if len(made) == 1:
            root.parent.rmdir()

    monkeypatch.setattr(os, "mkdir", interrupted)
    with state.locked("one"):
        assert state.lock_path("one").exists()
        state.remove_empty(root)
        assert root.exists()  # not while somebody is in it
    state.forget("one")
    assert not root.exists()
    assert made == ["run", "run", "lab"]


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def denied() -> list[str]:
        raise PermissionError(13, "Permission denied", "/run/pillion/x")

    monkeypatch.setattr(state, "running", denied)
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "error: /run/pillion/x: Permission denied\n  run it as root\n"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["exec", "--name", "none", "w", "--", "true"]) == 1
    assert "run it as root" in capsys.readouterr().err
