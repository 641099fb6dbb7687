"""What of a former agent's pairs is lost, by who held them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent import express as module
from nodeagent.express import Express
from nodeagent.express_ledger import Ledger, started


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "pairs.json")


@pytest.fixture
def gone() -> Iterator[int]:
    """A process that will be no more when it is looked for; it waits until then."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def end(pid: int) -> None:
    os.kill(pid, 9)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_process_is_told_from_the_next_of_its_number(gone: int) -> None:
    assert started(os.getpid()) > 0 and started(gone) >= started(os.getpid())
    end(gone)
    assert started(gone) == -1


def test_all_are_lost_with_their_only_worker(ledger: Ledger, tmp_path: Path, gone: int) -> None:
    """As many as the kernel knows of, which is later than the file."""
    ledger.keep({gone: 8})
    assert Ledger(tmp_path / "pairs.json").orphans(9) == (0, True)
    end(gone)
    assert Ledger(tmp_path / "pairs.json").orphans(9) == (9, False)


def test_those_of_a_worker_that_lives_are_not(ledger: Ledger, gone: int) -> None:
    ledger.keep({gone: 8, os.getpid(): 3})
    end(gone)
    assert ledger.orphans(11) == (8, True)
    assert ledger.orphans(5) == (5, True)  # others have ended since


@pytest.mark.parametrize("text", [None, b"", b"[{}]", b'[{"pid": "x"}]', b"nonsense", b'[{"pid": 1, "\xff": 1}]'])
def test_without_a_word_nothing_is_claimed(tmp_path: Path, text: bytes | None) -> None:
    if text is not None:
        (tmp_path / "pairs.json").write_bytes(text)
    assert Ledger(tmp_path / "pairs.json").orphans(7) == (0, True)


class Records:
    """Of records: two that were paired, one that was forgotten, one whose client is another's by now."""

    def __init__(self) -> None:
        self.left = {number: {"client_key": number, "off": 0, "program": 1} for number in (1, 2, 3, 4)}
        self.left[3]["off"], self.left[4]["client_key"] = 1, 0

    def probes(self) -> dict[str, str]:
        return {}

    def records(self) -> list[int]:
        return list(self.left)

    def read_record(self, record: int) -> dict[str, int]:
        return self.left[record]

    def forget_record(self, record: int) -> None:
        del self.left[record]

    def close(self) -> None: ...


class Datapath:
    def __init__(self) -> None:
        self.path = Records()

    def express(self) -> Records:
        return self.path


@pytest.mark.parametrize("lives", [True, False], ids=["its worker lives", "both are gone"])
async def test_the_next_agent_counts_and_cleans_up(
    tmp_path: Path, ledger: Ledger, gone: int, lives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Programs", lambda *_: None)
    ledger.keep({gone: 2})
    if not lives:
        end(gone)
    datapath: Any = Datapath()
    express = Express(datapath, None, ledger=tmp_path / "pairs.json")  # type: ignore[arg-type]  # is not asked
    await express.start()
    assert express.why == "" and express._pairs is not None
    assert express._pairs.counts == ({} if lives else {"lost_while_away": 2})
    assert list(datapath.path.left) == ([1, 2, 3, 4] if lives else [])
    await express.close()
