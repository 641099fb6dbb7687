"""The decisions about a pair, each by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from l7proxy.express import (
    ANSWER_BYTES_MAX,
    FUTILE_MAX,
    REQUEST_BODY,
    RESPONSE_BODY,
    RESPONSE_HEAD,
    Futility,
    Step,
    Unsettled,
    View,
    Watch,
    client_spoke,
    server_spoke,
    waited,
)
from l7proxy.http1.exchange import Limits


@pytest.mark.parametrize(
    ("view", "step"),
    [
        (View(-1), Step.PASS),
        (View(-1, REQUEST_BODY, req_left=5), Step.PASS),  # what an exchange that is over has left there
        (View(0, REQUEST_BODY, req_left=5), Step.ADOPT),
        (View(0, REQUEST_BODY, req_left=0), Step.WAIT),
        (View(0, RESPONSE_HEAD), Step.WAIT),
        (View(0, RESPONSE_BODY, status=200, resp_left=1), Step.WAIT),
        (View(3, RESPONSE_HEAD, handed=True), Step.ADOPT),
        (View(0, REQUEST_BODY, req_left=5, inside=True, torn=True), Step.WAIT),
        (View(-1, inside=True, torn=True), Step.WAIT),
        (View(-1, inside=True), Step.PASS),
        (View(-1, answering=True), Step.WAIT),
    ],
)
def test_client_spoke(view: View, step: Step) -> None:
    assert client_spoke(view) is step


@pytest.mark.parametrize(
    ("view", "slot", "step"),
    [
        (View(-1), 0, Step.UNASKED),
        (View(0, RESPONSE_HEAD), 0, Step.UNASKED),  # it would have been handed over
        (View(0, RESPONSE_HEAD, handed=True), 0, Step.ADOPT),
        (View(0, RESPONSE_HEAD, handed=True), 1, Step.UNASKED),
        (View(0, RESPONSE_HEAD, handed=True, handed_slow=1), 0, Step.UNASKED),
    ],
)
def test_server_spoke(view: View, slot: int, step: Step) -> None:
    assert server_spoke(view, slot) is step


def test_waited() -> None:
    assert waited(View(-1)) is Step.PASS
    assert waited(View(1)) is Step.WAIT
    assert waited(View(1, handed=True)) is Step.ADOPT
    assert waited(View(-1, inside=True)) is Step.WAIT
    assert waited(View(-1, answering=True)) is Step.WAIT
    assert waited(View(1, handed=True, inside=True)) is Step.WAIT


def test_an_exchange_that_was_over_before_it_was_taken() -> None:
    assert View(-1, status=200).ended
    assert not View(-1, status=200, resp_left=1).ended
    assert not View(-1).ended
    assert not View(-1, status=0, req_left=3).ended


def test_an_answer_is_late_by_the_request_timeout() -> None:
    watch, limits = Watch(), Limits(request_timeout_s=15.0)
    view = View(0, RESPONSE_HEAD, started=100.0)
    assert not watch.late(view, 114.0, limits)
    assert watch.late(view, 116.0, limits)
    assert not watch.late(View(-1, started=100.0), 1000.0, limits)


def test_a_body_is_late_when_it_does_not_move() -> None:
    watch, limits = Watch(), Limits(idle_timeout_s=60.0)
    for now, left, late in ((100.0, 9, False), (159.0, 9, False), (161.0, 8, False), (220.0, 8, False), (222.0, 8, True)):
        assert watch.late(View(0, RESPONSE_BODY, status=200, resp_left=left, started=99.0), now, limits) is late
    assert not watch.late(View(0, RESPONSE_BODY, status=200, resp_left=8, started=221.0, began=1), 223.0, limits)  # the next


def test_a_client_that_is_not_for_this_path() -> None:
    futility = Futility()
    assert not any(futility.punted(View(-1, punt="body", began=7)) for _ in range(FUTILE_MAX))
    assert futility.punted(View(-1, punt="body", began=7))
    assert not futility.punted(View(-1, punt="body", began=8))  # one was carried
    for _ in range(3 * FUTILE_MAX):
        assert not futility.punted(View(-1, punt="generation", began=8))


def test_an_end_that_never_rests_is_paired_anew_more_and_more_rarely() -> None:
    unsettled = Unsettled()
    found = [number for number in range(1, 100) if unsettled.punted(View(-1, punt="unclean", began=7))]
    assert found == [1, 5, 21, 85]
    assert not any(unsettled.punted(View(-1, punt=punt)) for punt in ("behind", "sample", "") * 300)


def test_the_kernels_limit() -> None:
    types = (Path(__file__).parents[2] / "bpf" / "types.h").read_text()
    assert re.findall(r"#define PL_X_BUDGET_BYTES (\d+)", types) == [str(ANSWER_BYTES_MAX)]
