"""The loader's child on a slow host: it may take its time while it gets on, and is ended when it hangs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from nodeagent import loading
from nodeagent.datapath_api import DatapathError

WORKS = (
    "import time\nend = time.monotonic() + float(__import__('sys').argv[1])\nwhile time.monotonic() < end: pass\nprint('done')\n"
)
HANGS = "import time\nprint('begun', flush=True)\ntime.sleep(600)\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second stands for some minutes."""
    monkeypatch.setattr(loading, "PROJECT", tmp_path)
    monkeypatch.setattr(loading, "IDLE_S_MAX", 1.0)
    monkeypatch.setattr(loading, "LOOK_S", 0.05)
    monkeypatch.setattr(loading, "TOLD_EVERY_S", 0.1)
    (tmp_path / "works.py").write_text(WORKS)
    (tmp_path / "hangs.py").write_text(HANGS)


def test_a_compiler_that_gets_on_is_waited_for_and_told() -> None:
    said: list[bytes] = []
    thread = threading.Thread(target=lambda: said.append(loading.run_child("works", ["1.7"])))
    thread.start()
    heard = set()
    while thread.is_alive():
        heard.add(loading.under_way())
        time.sleep(0.01)
    assert said == [b"done\n"]
    assert "compiling for this kernel: works" in heard and loading.under_way() == ""


def test_how_long_it_takes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "TOLD_EVERY_S", 10.0)
    monkeypatch.setattr(loading, "_under_way", {1: ("nodeagent.loader", time.monotonic() - 95.0)})
    assert loading.under_way() == "compiling for this kernel: nodeagent.loader, 90 s so far"


def test_one_that_hangs_is_ended() -> None:
    with pytest.raises(DatapathError, match=r"hangs did nothing for 1 s; what was attached before still is"):
        loading.run_child("hangs", [])
    assert loading.under_way() == ""


def test_one_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LOADER_S_MAX", 0.5)
    with pytest.raises(DatapathError, match=r"works took more than 0\.5 s"):
        loading.run_child("works", ["600"])
