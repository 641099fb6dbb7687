from __future__ import annotations

from typing import Any

from pillion.top import usage


def report(time: float, requests: int, seconds: float) -> dict[str, Any]:
    entry = {
        "identity": "shop/web",
        "used": {"connections": 2},
        "max": {"connections": 10},
        "asked": {"requests": requests, "handshakes": 4},
        "seconds": seconds,
        "refused": {"budget_requests": 1},
    }
    idle = {"identity": "shop/idle", "used": {"connections": 1}, "max": {}, "asked": {}, "seconds": 0.0, "refused": {}}
    return {"n1": {"node": "n1", "time": time, "workers": 2, "identities": [idle, entry]}}


def test_rates_are_between_two_samples() -> None:
    web, idle = usage(report(100.0, 50, 1.0), report(102.0, 250, 2.0))
    assert web == {
        "node": "n1",
        "identity": "shop/web",
        "connections": 2,
        "requests_per_s": 100.0,
        "handshakes_per_s": 0.0,
        "worker_share": 0.25,
        "refused": {"budget_requests": 1},
        "max": {"connections": 10},
    }
    assert (idle["identity"], idle["requests_per_s"]) == ("shop/idle", 0.0)


def test_a_worker_that_was_started_anew_counts_from_zero() -> None:
    web = next(row for row in usage(report(100.0, 50, 1.0), report(101.0, 5, 0.1)) if row["identity"] == "shop/web")
    assert web["requests_per_s"] == web["worker_share"] == 0.0
