"""`pillion express`: against an agent and a controller of our own making."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from mesh.resources import load
from pillion import express
from tests.pillion.conftest import Cli, Fake

REPORT: dict[str, Any] = {
    "node": "n1",
    "on": True,
    "why": "",
    "probes": {"fionread": "ok", "fin_order": "the FIN came before 12 bytes"},
    "programs": [
        {"service": "shop/web", "port": 80, "source": "shop/client", "states": 412, "reason": ""},
        {"service": "shop/api", "port": 80, "source": "shop/client", "states": 0, "reason": "regex_too_large: 5000 states"},
    ],
    "pairs": 3,
    "legs": {"open": 12, "messages": {"leg": 500}},
    "carried": {"requests": 1000, "punted": {"head_too_long": 2, "body": 40}},
    "top": [
        {"source": "shop/client", "service": "shop/web", "rule": "shop/web#0", "kernel": 900, "p50_us": 12, "p99_us": 2400},
        {"source": "shop/x", "service": "shop/web", "rule": "shop/web#1", "kernel": 100, "p50_us": 9, "p99_us": 30, "proxy": 7},
    ],
}
SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
}
WORKLOAD: dict[str, Any] = {
    "apiVersion": "mesh.pillion.dev/v1alpha1",
    "kind": "Workload",
    "metadata": {"name": "web-1", "namespace": "shop"},
    "spec": {"node": "n1", "serviceAccount": "web", "addresses": ["10.0.0.1"]},
}


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_status(cli: Cli, agent: Fake) -> None:
    agent.on("GET /v1/express", REPORT)
    done = cli("--agent", agent.url, "express", "status")
    assert done.code == 0, done.err
    assert ["n1", "on", "3", "1000", "body:40", "head_too_long:2", "12", "-"] in rows(done.out)
    assert "fin_order" in done.out and "before 12 bytes" in done.out and "fionread" not in done.out
    assert ["n1", "shop/web", "80", "shop/client", "412", "kernel"] in rows(done.out)
    assert "regex_too_large: 5000 states" in done.out
    assert cli("--agent", agent.url, "express", "status", "-o", "json").json == {"n1": REPORT}


def test_status_where_it_is_off_or_unknown(cli: Cli, agent: Fake, tmp_path: Any) -> None:
    agent.on("GET /v1/express", {"on": False, "why": "MeshConfig: express is off", "probes": {}, "programs": [], "top": []})
    done = cli("--agent", agent.url, "express", "status")
    assert done.code == 0 and "MeshConfig: express is off" in done.out and " off " in done.out
    agent.answers.clear()
    assert "knows nothing of express" in cli("--agent", agent.url, "express", "status").out
    gone = ("--agent", f"unix://{tmp_path}/gone.sock", "express")
    assert rows(cli(*gone, "status").out)[1][:3] == ["this", "node", "unknown"]  # what its kernel carries goes on
    assert "does not answer" in cli(*gone, "top", "--interval", "0.1").err


def test_top(cli: Cli, agent: Fake) -> None:
    agent.on("GET /v1/express", REPORT)
    done = cli("--agent", agent.url, "express", "top", "--interval", "0.1")
    client = ["n1", "shop/client", "shop/web", "shop/web#0", "900", "0", "-", "12", "µs", "2.4", "ms"]
    assert rows(done.out)[1:] == [client, ["n1", "shop/x", "shop/web", "shop/web#1", "100", "0", "7", "9", "µs", "30", "µs"]]
    found = cli("--agent", agent.url, "express", "top", "--interval", "0.1", "-o", "json").json
    assert [entry["kernel"] for entry in found] == [900, 100] and found[0]["node"] == "n1"


def test_rates_lie_between_two_samples() -> None:
    def sample(kernel: int) -> dict[str, Any]:
        return {"n1": {"top": [{**REPORT["top"][0], "kernel": kernel}]}}

    assert express.usage(sample(100), sample(300), 2.0)[0]["kernel_per_s"] == 100.0
    assert express.usage(sample(300), sample(100), 2.0)[0]["kernel_per_s"] == 0.0  # loaded anew
    assert express.usage({}, sample(100), 1.0)[0]["kernel_per_s"] == 100.0


@pytest.fixture
def mesh(controller: Fake) -> Fake:
    controller.on("GET /v1/resources", {"revision": 1, "items": []})
    controller.on(
        "POST /v1/apply",
        {"revision": 9, "results": [{"kind": "MeshConfig", "namespace": "", "name": "mesh", "result": "created"}]},
    )
    controller.on("GET /v1/wait", {"revision": 9})
    controller.on("GET /v1/status", {"revision": 9, "nodes": []})
    return controller


@pytest.mark.parametrize(("command", "mode"), [("off", "off"), ("on", "auto")])
def test_the_whole_mesh(cli: Cli, mesh: Fake, command: str, mode: str) -> None:
    done = cli("--controller", mesh.url, "express", command, "--wait")
    assert done.out == f"MeshConfig/mesh express {mode}\nrevision 9 in force everywhere\n"
    (sent,) = load(next(body for method, target, body in mesh.asked if target.startswith("/v1/apply")))
    assert (sent.key, sent.spec.express) == (("MeshConfig", "", "mesh"), mode)  # type: ignore[attr-defined]


def test_what_is_off_is_seen_in_a_list(cli: Cli, mesh: Fake) -> None:
    items = [{**item, "spec": {**item["spec"], "express": "off"}} for item in (SERVICE, WORKLOAD)]
    mesh.on("GET /v1/resources", {"revision": 1, "items": [*items, SERVICE, WORKLOAD]})
    lines = cli("--controller", mesh.url, "get", "all").out.splitlines()
    assert ["express off" in line for line in lines] == [False, True, True, False, False]


def test_what_stands_in_the_config_stays(cli: Cli, mesh: Fake) -> None:
    config = {**express.MESH, "spec": {"accessLog": True, "express": "off"}}
    mesh.on("GET /v1/resources", {"revision": 1, "items": [config]})
    assert cli("--controller", mesh.url, "express", "on", "-o", "json").json["revision"] == 9
    (sent,) = yaml.safe_load_all(mesh.asked[-1][2])
    assert sent["spec"] == {"accessLog": True, "express": "auto"}


def test_services_and_workloads(cli: Cli, mesh: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"Service": SERVICE, "Workload": WORKLOAD, "MeshConfig": {**express.MESH, "spec": {"express": "off"}}}

    def fetch(_: object, kind: str, namespace: str | None, name: str) -> list[dict[str, Any]]:
        item = there[kind]
        return [item] if (item["metadata"].get("namespace"), item["metadata"]["name"]) == (namespace, name) else []  # type: ignore[index]

    monkeypatch.setattr(express, "fetch", fetch)
    done = cli("--controller", mesh.url, "express", "off", "--service", "shop/web", "--workload", "shop/web-1")
    assert done.code == 0, done.err
    sent = load(mesh.asked[-1][2])
    assert [(each.key, each.spec.express) for each in sent] == [  # type: ignore[attr-defined]
        (("Service", "shop", "web"), "off"),
        (("Workload", "shop", "web-1"), "off"),
    ]
    done = cli("--controller", mesh.url, "express", "on", "--service", "shop/web")
    assert load(mesh.asked[-1][2])[0].spec.express == "auto"  # type: ignore[attr-defined]
    assert "the mesh as a whole is off" in done.err
    assert cli("--controller", mesh.url, "express", "off", "--service", "shop/none").code == 1
    assert cli("--controller", mesh.url, "express", "off", "--service", "web").code == 2
