"""The attacks share the end-to-end tests' mesh: what is attacked is the whole thing. And the table at the end of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.attacks.mutants import Counted, Mutant, without
from tests.attacks.systemd_host import host
from tests.conftest import opened
from tests.e2e.conftest import mesh
from tests.e2e.mesh import Mesh

__all__ = ["host", "mesh"]

HERE = Path(__file__).parent
_ROW = re.compile(r"test_(\d+)_")


@dataclass
class Line:
    """One attack, as the run saw it."""

    stopped: list[bool] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)
    red: dict[str, bool] = field(default_factory=dict)  # by what was taken out


TABLE: dict[tuple[int, str], Line] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "attack(name): an attack of the row in the file's name, on the mesh as it is")
    config.addinivalue_line("markers", "red(name, mutant): the same attack, on a mesh without that defence")


def _mutant(item: pytest.Item) -> Mutant | None:
    mark = item.get_closest_marker("red")
    return mark.args[1] if mark is not None else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ours keep their places among the others; among ours those on a broken mesh come last, by its group."""
    ours = [index for index, item in enumerate(items) if HERE in item.path.parents]
    ordered = sorted((items[index] for index in ours), key=lambda item: getattr(_mutant(item), "group", ""))
    for index, item in zip(ours, ordered, strict=True):
        items[index] = item
        assert item.name.partition("[")[0].endswith("_without") == (_mutant(item) is not None), (
            f"{item.name}: by name one worker runs them"
        )
        row = _ROW.match(item.path.name)
        for kind in ("attack", "red"):
            for mark in item.iter_markers(kind):
                assert row is not None, f"{item.path.name}: which row of the threats is it?"
                what = mark.args[1].what if kind == "red" else ""
                item.user_properties.append((kind, (int(row[1]), mark.args[0], what)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and not report.failed:
        return
    properties = list(report.user_properties)
    for kind, value in properties:
        if kind not in ("attack", "red"):
            continue
        row, name, what = value
        line = TABLE.setdefault((row, name), Line())
        if kind == "attack":
            line.stopped.append(report.passed)
            line.reasons.update(reason for key, reason in properties if key == "reason")
        else:
            line.red[what] = report.passed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TABLE:
        return
    terminalreporter.section("attacks")
    rows = [("row", "attack", "stopped", "counted as", "succeeds without")]
    for (row, name), line in sorted(TABLE.items()):
        stopped = "not run" if not line.stopped else "yes" if all(line.stopped) else "NO"
        red = ", ".join(what if seen else f"{what}: NOT SEEN" for what, seen in sorted(line.red.items())) or "not run"
        rows.append((str(row), name, stopped, ", ".join(sorted(line.reasons)) or "-", red))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for cells in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(cells, [*widths, 0], strict=True)))


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield
    made = getattr(item, "funcargs", {}).get("counted")
    if isinstance(made, Counted):
        item.user_properties += [("reason", reason) for reason in sorted(made.reasons)]


class _Broken:
    """One lab at a time: that of the group whose tests run."""

    def __init__(self, scratch: pytest.TempPathFactory) -> None:
        self._scratch, self._stack = scratch, ExitStack()
        self._group, self._number = "", 0
        self._mesh: Mesh | None = None

    def of(self, mutant: Mutant) -> Mesh:
        if self._mesh is None or mutant.group != self._group:
            self.close()
            self._number += 1
            folder = opened(self._scratch.mktemp("broken"))  # the proxy reads its modules as its own user
            self._mesh = self._stack.enter_context(without(mutant.group, self._number, folder))
            self._group = mutant.group
        return self._mesh

    def close(self) -> None:
        self._mesh = None
        self._stack.close()


@pytest.fixture(scope="package")
def _broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Broken]:
    made = _Broken(tmp_path_factory)
    yield made
    made.close()


@pytest.fixture
def broken(request: pytest.FixtureRequest, _broken: _Broken) -> Mesh:
    mutant = _mutant(request.node)
    assert mutant is not None, "a test on a broken mesh says what is broken: pytest.mark.red(name, mutant)"
    return _broken.of(mutant)
