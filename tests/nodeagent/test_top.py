from __future__ import annotations

from nodeagent.top import top

WORKER = """# HELP pillion_budget_used What an identity takes now
# TYPE pillion_budget_used gauge
pillion_budget_used{identity="shop/web",what="connections"} 3.0
pillion_budget_used{identity="shop/web",what="bytes_in_flight"} 10.0
# TYPE pillion_budget_max gauge
pillion_budget_max{identity="shop/web",what="connections"} 4096.0
# TYPE pillion_budget_asked counter
pillion_budget_asked_total{identity="shop/web",what="requests"} 7.0
# TYPE pillion_budget_seconds counter
pillion_budget_seconds_total{identity="shop/web"} 0.5
pillion_budget_seconds_total{identity="shop/busy"} 2.5
# TYPE pillion_budget_refused counter
pillion_budget_refused_total{identity="shop/web",reason="budget_bytes"} 2.0
# TYPE pillion_other gauge
pillion_other 1.0
"""


def test_workers_are_added_up_and_the_busiest_comes_first() -> None:
    report = top("n1", {"0": WORKER, "1": WORKER, "2": ""})
    assert (report["node"], report["workers"]) == ("n1", 3)
    busy, web = report["identities"]
    assert (busy["identity"], busy["seconds"]) == ("shop/busy", 5.0)
    assert web == {
        "identity": "shop/web",
        "used": {"connections": 6, "bytes_in_flight": 20},
        "max": {"connections": 4096.0},
        "asked": {"requests": 14},
        "seconds": 1.0,
        "refused": {"budget_bytes": 4},
    }


def test_what_a_worker_makes_up_spoils_no_other_account() -> None:
    junk = (
        "{",
        'pillion_budget_used{what="connections"} 3\n',
        'pillion_budget_used{identity="shop/web"} 3\n',
        'pillion_budget_used{identity="shop/web",what="connections"} Inf\n',
        'pillion_budget_seconds_total{identity="shop/web"} NaN\n',
        'pillion_budget_used{identity="shop/web",what="connections"} 1..2\n',
        'pillion_budget_used{identity="shop/web\n',
        "# TYPE pillion_budget_used nonsense\n",
    )
    for text in junk:
        busy, web = top("n1", {"0": text, "1": WORKER})["identities"]
        assert (busy["seconds"], web["seconds"], web["used"]["connections"]) == (2.5, 0.5, 3)
