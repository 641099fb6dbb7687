"""The matrix of kernels: what it reads, keeps, goes on with, and tells. No VM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lab.vm import machines, one_of_each, results
from lab.vm.capabilities import CAPABILITIES, Capability, Outcome, Run, Seen, merge, missing, read_junit, read_lines, table
from lab.vm.matrix import SUITES, Report, files, observe
from lab.vm.rest import joined, rest
from lab.vm.stage import PROJECT

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.bpf.test_connect" name="test_a[v4]"/>
<testcase classname="tests.bpf.test_connect" name="test_b"><failure message="assert 1 == 2">…</failure></testcase>
<testcase classname="tests.bpf.test_egress" name="test_c"><skipped message="no root"/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_read_and_a_second_run_counts() -> None:
    first = read_junit(JUNIT)
    assert [(each.id, each.message) for each in first] == [
        ("tests/bpf/test_connect.py::test_a[v4]", ""),
        ("tests/bpf/test_connect.py::test_b", "assert 1 == 2"),
        ("tests/bpf/test_egress.py::test_c", "no root"),
    ]
    second = [Outcome("tests/bpf/test_connect.py", "test_b"), Outcome("tests/bpf/test_egress.py", "test_c", "still")]
    merged = merge(first, second)
    assert [(each.message, each.again) for each in merged] == [("", False), ("", True), ("still", False)]


def test_what_was_printed_is_read_where_there_is_no_report() -> None:
    text = "tests/a/test_b.py::test_c[x y] PASSED [ 1%]\ntests/a/test_b.py::test_d FAILED\ntests/a/test_b.py::test_e \n"
    found = read_lines(text)
    assert [(each.id, bool(each.message)) for each in found] == [
        ("tests/a/test_b.py::test_c[x y]", False),
        ("tests/a/test_b.py::test_d", True),
    ]


def test_the_table_says_on_off_and_why() -> None:
    run = Run(merge(read_junit(JUNIT), [Outcome("tests/bpf/test_connect.py", "test_b")]), 12.4, "1 May 2026")
    seen = Seen("6.1", "6.1.0-stock", {"kernel": run})
    text = table([seen], suites={"kernel": "programs", "attacks": "holes"})
    by_name = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("| ")}
    assert "on (2, 1 at the second try)" in by_name["capture"]
    assert "**off** (1 of 1)" in by_name["egress"] and "not run" in by_name["ingress"]
    assert "- `tests/bpf/test_egress.py::test_c`: no root" in text
    assert "3 tests, 12 s, 1 May 2026" in by_name["kernel"] and "| attacks | holes | not run |" in text
    left = missing([seen], all_ran=True)
    assert "6.1.0-stock: capture" not in left and "6.1.0-stock: egress" in left and "6.1.0-stock: ingress" in left
    assert missing([seen], all_ran=False) == ["6.1.0-stock: egress"]


def test_what_is_not_run_again_is_remembered(tmp_path: Path) -> None:
    first = Run([Outcome("a.py", "test_a", noted={"load: restart": "{}"})], 1.0, "1 May 2026")
    results.keep(Seen("6.1", "6.1.0-stock", {"kernel": first, "attacks": first}), tmp_path)
    second = Run([Outcome("a.py", "test_a", "red")], 2.0, "2 May 2026")
    merged = results.with_earlier(Seen("6.1", "6.1.0-stock", {"kernel": second}), tmp_path)
    assert merged.runs == {"kernel": second, "attacks": first} and [each.message for each in merged.outcomes] == ["red"]
    assert results.with_earlier(Seen("6.1", "6.1"), tmp_path).release == "6.1.0-stock"  # nothing ran this time
    assert results.with_earlier(Seen("6.1", "6.1.9-newer", {"kernel": second}), tmp_path).runs == {"kernel": second}
    assert results.with_earlier(Seen("6.12", "6.12.1-stock", {"kernel": second}), tmp_path).runs == {"kernel": second}


def test_a_run_that_was_cut_goes_on_with_the_file_it_was_in() -> None:
    failed, fine, last = Outcome("tests/a.py", "test_1", "red"), Outcome("tests/a.py", "test_2"), Outcome("tests/b.py", "test_3")
    paths = ["tests/a.py", "tests/b.py", "tests/c.py::test_4", "-m", "attack"]
    assert rest(paths, Run()) == (paths, [])
    cut = Run([failed, fine, last], error="not done")
    assert rest(paths, cut) == (["tests/a.py::test_1", "tests/b.py", "tests/c.py::test_4", "-m", "attack"], [failed, fine])
    whole = Run([failed, fine, last, Outcome("tests/c.py", "test_4")])
    assert rest(paths, whole) == (["tests/a.py::test_1", "-m", "attack"], whole.outcomes)
    done = Run([Outcome("tests/a.py", "test_1"), *whole.outcomes[1:]])
    assert rest(paths, done) == ([], done.outcomes)
    again = joined([failed, fine], [Outcome("tests/a.py", "test_1"), last])
    assert [(each.name, each.message, each.again) for each in again] == [
        ("test_1", "", True),
        ("test_2", "", False),
        ("test_3", "", False),
    ]


def test_what_is_gone_on_with_keeps_its_seconds_and_what_passed() -> None:
    first, *others = files("attacks")[:3]
    seen, asked = Seen("6.1", "6.1.0-stock"), []
    earlier = Run([Outcome(first, "test_1"), Outcome(others[0], "test_2")], 100.0, "1 May 2026", "not done within 9 s")

    def pytest_there(arguments: object, _limit_s: float) -> Report:
        asked.append(arguments)
        return Report(0, [Outcome(others[0], "test_2"), Outcome(others[1], "test_3")])

    observe(seen, ["attacks"], pytest_there, lambda: None, earlier={"attacks": earlier})
    run = seen.runs["attacks"]
    assert asked == [files("attacks")[1:]] and run.seconds >= 100.0 and not run.error and run.day != "1 May 2026"
    assert [each.id for each in run.outcomes] == [f"{first}::test_1", f"{others[0]}::test_2", f"{others[1]}::test_3"]
    observe(seen, ["attacks"], lambda *_: Report(5), lambda: None, earlier={"attacks": run})  # no test of what is left is chosen
    assert len(seen.runs["attacks"].outcomes) == 3 and not seen.runs["attacks"].error


def test_a_suite_of_which_nothing_is_left_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def pytest_there(*_: object) -> Report:
        raise AssertionError("it ran")

    whole = Run([Outcome(each, "test_1") for each in files("probes")], 100.0, "1 May 2026")
    seen = Seen("6.1", "6.1.0-stock")
    observe(seen, ["probes"], pytest_there, lambda: None, earlier={"probes": whole})
    assert seen.runs["probes"] == whole
    monkeypatch.setitem(SUITES, "probes", ("tests/renamed.py",))
    observe(seen, ["probes"], pytest_there, lambda: None)
    assert seen.errors


def test_who_is_stopped_keeps_what_was_seen() -> None:
    seen, noted = Seen("running", "here"), []
    report = Report(-9, [Outcome("tests/a.py", "test_1")], "stopped", asked=True)
    with pytest.raises(KeyboardInterrupt):
        observe(seen, ["probes", "kernel"], lambda *_: report, lambda: noted.append(len(seen.outcomes)))
    assert noted == [1] and seen.runs["probes"].error == "stopped" and "kernel" not in seen.runs


MACHINES = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_two_hosts" name="test_install"><properties>
 <property name="fact: machines" value="n1 on 6.1, n2 on 6.12"/></properties></testcase>
<testcase classname="tests.kernels.test_two_hosts" name="test_under_load[kill]"><properties>
 <property name="load: kill" value='{"seconds": 3.2, "kinds": {"tcp": {"asked": 9, "failed": 0, "lost": 0},
 "http": {"asked": 8, "failed": 2, "lost": 1}}}'/></properties><failure message="too many">…</failure></testcase>
</testsuite></testsuites>"""


def test_the_section_of_two_machines() -> None:
    text = "\n".join(machines.section(Run(read_junit(MACHINES), 60, "1 May 2026")))
    assert "n1 on 6.1, n2 on 6.12, both from" in text
    assert "- seen: install" in text and "- **failed**: under load[kill]: too many" in text
    assert "| event | tcp | http | s |" in text and "| kill | 0 of 9 | 2 of 8 (1) | 3 |" in text
    assert "Not run" in "\n".join(machines.section(None))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda each: each.name)
def test_each_capability_has_tests(capability: Capability) -> None:
    for start in capability.tests:
        pattern = f"{start.removesuffix('.py')}*.py" if not start.endswith("/") else f"{start}test_*.py"
        assert list(PROJECT.glob(pattern)), start


def test_every_kernel_test_is_of_some_capability() -> None:
    chosen = {*files("kernel"), *files("express")}
    assert all(any(each.startswith(one.tests) for one in CAPABILITIES) for each in chosen)
    assert {str(path.relative_to(PROJECT)) for path in (PROJECT / "tests" / "bpf").glob("test_*.py")} <= chosen


def test_the_kernels_attacks_and_the_others_are_all_attacks() -> None:
    suites = ("short-attacks", "kernel-attacks", "other-attacks", "attacks")
    short, kernels, others, everything = ({each for each in files(suite) if each.endswith(".py")} for suite in suites)
    unmarked = {f"tests/attacks/test_{each}.py" for each in ("documented", "mutants")}
    assert not kernels & others and everything - kernels - others == unmarked and short < kernels


def test_of_each_test_one_variant_is_left() -> None:
    items = [SimpleNamespace(nodeid=f"a.py::{name}") for name in ("test_b[v4]", "test_b[v6]", "test_c", "test_bc[v4]")]
    told: list[object] = []
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: told.extend(items)))
    left_out = items[1]
    one_of_each.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]  # what it uses of them
    assert [each.nodeid for each in items] == ["a.py::test_b[v4]", "a.py::test_c", "a.py::test_bc[v4]"] and told == [left_out]
