from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pillion.top import usage
from tests.pillion.conftest import Cli, serve


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


def test_a_node_that_does_not_answer_hides_no_other(cli: Cli, tmp_path: Path) -> None:
    fake, server = serve(tmp_path / "n1.sock")
    fake.on("GET /v1/top", report(100.0, 50, 1.0)["n1"])
    nodes = [{"name": name, "agent": f"unix://{tmp_path}/{name}.sock"} for name in ("n1", "n2")]
    (tmp_path / "labs" / "two").mkdir(parents=True)
    state = {"name": "two", "mesh": True, "built": True, "controller": f"unix://{tmp_path}/c.sock", "nodes": nodes}
    (tmp_path / "labs" / "two" / "state.json").write_text(json.dumps(state))
    done = cli("top", "--interval", "0.1")
    assert done.code == 0 and "shop/web" in done.out
    assert done.err.count("n2.sock does not answer") == 1
    server.shutdown()
    server.server_close()
    assert cli("top", "--interval", "0.1").code == 1
