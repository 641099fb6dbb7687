"""`down --here`, which `make clean` asks for: labs and VMs of this checkout, not another's on the same machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab import __main__ as labs
from lab import state
from lab.host import container
from lab.state import CHECKOUT, LabState
from lab.topology import Paths
from lab.vm import __main__ as machines
from lab.vm import vms

OURS, THEIRS, HALF, OLD = "ours", "theirs", "half", "old"


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labs and hosts that were taken down. Those of this machine, which may be another test's, are not known."""
    found: list[str] = []
    monkeypatch.setattr(container, "known", list)
    monkeypatch.setattr(container, "remove", found.append)
    for where, name in ((labs, "Lab"), (machines, "VmLab")):
        monkeypatch.setattr(getattr(where, name), "down", lambda lab: found.append(lab.name))
    return found


def test_labs(tmp_path: Path, gone: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lab.topology.RUN_ROOT", tmp_path)
    monkeypatch.setattr(state, "RUN_ROOT", tmp_path)
    monkeypatch.setattr(labs, "known_labs", lambda: [HALF, OLD, OURS, THEIRS])
    for name, checkout in ((OURS, CHECKOUT), (THEIRS, "/srv/other"), (OLD, "")):
        Paths(name).base.mkdir(parents=True)
        state.save(LabState(name, True, 1, "unix:///x", (), checkout=checkout))
    assert labs.main(["down", "--here"]) == 0
    assert gone == [OURS]
    told = capsys.readouterr().err
    assert "lab theirs stays: /srv/other is its checkout; else: pillion lab down --name theirs" in told
    assert "lab half stays: unknown is its checkout" in told and "lab old stays" in told
    assert labs.main(["down", "--all"]) == 0
    assert gone == [OURS, HALF, OLD, OURS, THEIRS]


def test_machines(tmp_path: Path, gone: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(vms, "RUN_ROOT", tmp_path)
    monkeypatch.setattr(machines, "known", lambda: [HALF, OURS, THEIRS])
    for name, checkout in ((OURS, CHECKOUT), (THEIRS, "/srv/other")):
        (tmp_path / name / "vm1").mkdir(parents=True)
        (tmp_path / name / "vm1/vm.json").write_text(json.dumps({"checkout": checkout}))
    assert machines.main(["down", "--here"]) == 0
    assert gone == [OURS]
    assert "VM lab theirs stays: /srv/other is its checkout; else: pillion lab vm down --name theirs" in capsys.readouterr().err


def test_hosts(tmp_path: Path, gone: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(container, "RUN", tmp_path)
    monkeypatch.setattr(container, "known", lambda: [HALF, OURS, THEIRS])
    monkeypatch.setattr(labs, "known_labs", list)
    for name, checkout in ((OURS, CHECKOUT), (THEIRS, "/srv/other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkout").write_text(checkout)
    assert labs.main(["down", "--here"]) == 0
    assert gone == [OURS]
    told = capsys.readouterr().err
    assert "host theirs stays: /srv/other is its checkout; else: pillion lab down --name theirs" in told
    assert "host half stays: unknown is its checkout" in told
    assert labs.main(["down", "--all"]) == 0
    assert gone == [OURS, HALF, OURS, THEIRS]
