"""The lease's arithmetic."""

from __future__ import annotations

import time

import pytest

from nodeagent import lease
from nodeagent.lease import Lease


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(lease, "boot_s", lambda: clock[0])
    return clock


def test_it_runs_from_the_controllers_last_word(now: list[float]) -> None:
    made = Lease()
    made.heard(1000.0)
    now[0] = 1007.0
    assert made.age_s() == 7.0
    assert made.until_ns(10.0) == 1010_000_000_000
    made.heard(1006.0)
    made.heard(0.0)  # a new stream that has not spoken takes nothing back
    assert made.until_ns(10.0) == 1016_000_000_000


def test_no_limit_is_no_lease(now: list[float]) -> None:
    made = Lease()
    made.granted(5)
    made.heard(now[0])
    assert made.until_ns(0.0) == 0


def test_a_new_agent_grants_nothing_the_former_did_not(now: list[float]) -> None:
    made = Lease()
    made.restored(time.time())
    made.granted(1002_000_000_000)
    assert made.until_ns(60.0) == 1002_000_000_000
    now[0] = 1100.0
    assert made.until_ns(60.0) == 1002_000_000_000
    made.heard(now[0])
    assert made.until_ns(60.0) == 1160_000_000_000


def test_a_limit_that_was_lowered_holds_for_what_the_former_agent_granted(now: list[float]) -> None:
    made = Lease()
    made.granted(5000_000_000_000)
    assert made.until_ns(10.0) == int((now[0] + 10.0) * 1e9)


def test_after_a_boot_the_state_on_disk_is_as_old_as_it_is(now: list[float]) -> None:
    made = Lease()
    made.restored(time.time() - 40.0)
    age = made.age_s()
    assert age is not None and 39.0 < age < 42.0
    assert made.until_ns(60.0) > now[0] * 1e9
    assert made.until_ns(30.0) < now[0] * 1e9


def test_without_any_policy_there_is_no_age_and_the_lease_is_over(now: list[float]) -> None:
    made = Lease()
    assert made.age_s() is None
    assert 0 < made.until_ns(60.0) < now[0] * 1e9


def test_a_machine_that_booted_after_the_state_was_written_long_ago(now: list[float]) -> None:
    made = Lease()
    made.restored(time.time() - 1e6)  # before boot: below zero on this clock
    assert made.until_ns(60.0) == 1
