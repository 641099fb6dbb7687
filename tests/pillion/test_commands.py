"""Each command against a controller and an agent of our own making."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from mesh import yamltree
from pillion import flows
from pillion.__main__ import app
from tests.pillion.conftest import Cli, Fake

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
"""
ITEM = yaml.safe_load(SERVICE)
NODE = {"name": "n1", "connected": True, "acked": 7, "ready": True, "workloads": 1, "cut": False, "digest_ok": True, "error": ""}
STATUS = {"revision": 7, "trust_domain": "mesh.local", "error": "", "nodes": [NODE]}
WORKLOAD = {
    "name": "web-1",
    "namespace": "shop",
    "spiffe": "spiffe://mesh.local/ns/shop/sa/web",
    "cgroup": "/x",
    "svid": {"serial": "abc", "not_after": 4e9},
}
AGENT: dict[str, Any] = {
    "node": "n1",
    "ready": True,
    "detail": "",
    "workloads": [WORKLOAD],
    "proxy": [],
    "programs": {"connect4": True},
}


def test_nothing_known_is_told_with_a_remedy(cli: Cli) -> None:
    done = cli("get", "svc")
    assert done.code == 1
    assert done.err.splitlines() == [
        "error: no controller is known",
        "  run this on the controller's machine, or name it (--controller https://HOST:15443); a lab: pillion lab up",
    ]
    done = cli("flows")
    assert done.code == 1
    assert done.err.splitlines() == [
        "error: no agent is known here",
        "  run this on a node, or name its socket (--agent unix:///path/agent.sock); a lab: pillion lab up",
    ]


def test_a_dead_controller(cli: Cli, tmp_path: Path) -> None:
    done = cli("--controller", f"unix://{tmp_path}/gone.sock", "status")
    assert done.code == 1 and "does not answer: No such file" in done.err


def test_apply_sends_all_files_at_once(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    results = [{"kind": "Service", "namespace": "shop", "name": "web", "result": "created"}]
    controller.on("POST /v1/apply", {"revision": 7, "results": results})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.yaml").write_text(SERVICE)
    (tmp_path / "d" / "b.yml").write_text(SERVICE.replace("web", "api"))
    (tmp_path / "d" / "notes.txt").write_text("not yaml: [")
    done = cli("--controller", controller.url, "apply", "-f", tmp_path / "d")
    assert (done.code, done.out) == (0, "Service shop/web created\nrevision 7\n")
    assert len(controller.asked) == 1 and controller.asked[0][2].count("kind: Service") == 2
    assert cli("--controller", controller.url, "apply", "-f", tmp_path / "d", "-o", "json").json["revision"] == 7


def test_errors_of_several_files_are_placed(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("a.yaml", "b.yaml", "c.json"))
    first.write_text(SERVICE)  # 7 lines and a newline before
    second.write_text("---\r\n# a comment\r\n" + SERVICE.replace("web", "api").replace("\n", "\r\n"))
    third.write_text(json.dumps({**ITEM, "metadata": {"name": "third"}}, indent="\t"))
    files = ("-f", first, "-f", second, "-f", third)

    def said(line: int) -> str:
        error = {"file": "a, b", "line": line, "field": "spec.x", "message": "is wrong", "remedy": "right it"}
        controller.on("POST /v1/apply", {"errors": [error]}, 400)
        return cli("--controller", controller.url, "apply", *files).err.splitlines()[0]

    said(0)
    sent = controller.asked[-1][2]
    loaded = yamltree.parse(sent)
    assert [document.data["metadata"]["name"] for document in loaded] == ["web", "api", "third"]
    own = [next(iter(yamltree.parse(path.read_bytes().decode()))) for path in (first, second, third)]
    for path, whole, part in zip((first, second, third), loaded, own, strict=True):
        for where in (("kind",), ("metadata", "name"), ("spec", "ports")):
            assert said(whole.line_of(where)) == f"error: {path}:{part.line_of(where)}: spec.x: is wrong"
    assert said(0) == "error: a, b: spec.x: is wrong"


def test_two_files_must_not_say_the_same(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SERVICE)
    (tmp_path / "b.yaml").write_text(SERVICE)
    done = cli("--controller", controller.url, "apply", "-f", tmp_path, "-o", "json")
    (error,) = done.json["errors"]
    assert done.code == 1 and not controller.asked
    assert (error["file"], error["message"]) == (f"{tmp_path}/b.yaml", f"Service/shop/web is also in {tmp_path}/a.yaml")


def test_apply_waits_when_asked(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    controller.on("POST /v1/apply", {"revision": 7, "results": []})
    controller.on("GET /v1/wait", {"revision": 7})
    controller.on("GET /v1/status", STATUS)
    (tmp_path / "a.yaml").write_text(SERVICE)
    apply = ("--controller", controller.url, "apply", "--wait", "-f", tmp_path / "a.yaml")
    assert "in force everywhere" in cli(*apply).out
    assert any(target == "/v1/wait?revision=7&timeout=30" for _, target, _ in controller.asked)
    away = [{**NODE, "name": "n2", "connected": False}, {**NODE, "name": "n3", "connected": False, "cut": True}]
    controller.on("GET /v1/status", {**STATUS, "nodes": [NODE, *away]})
    assert cli(*apply).out.endswith("revision 7 in force on every connected node; away: n2\n")


def test_a_dry_run_applies_nothing(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    results = [
        {"kind": "Service", "namespace": "shop", "name": name, "result": result}
        for name, result in (("web", "created"), ("api", "configured"), ("old", "unchanged"))
    ]
    controller.on("POST /v1/apply", {"revision": 8, "results": []})
    (tmp_path / "a.yaml").write_text(SERVICE)
    apply = ("--controller", controller.url, "apply", "-f", tmp_path / "a.yaml", "--dry-run")
    done = cli(*apply)
    assert done.code == 1 and "knows of no dry run; nothing was changed" in done.err
    controller.on("POST /v1/apply/dry-run", {"revision": 7, "results": results})
    said = "Service shop/web would be created\nService shop/api would be configured\nService shop/old unchanged\n"
    assert cli(*apply).out == f"{said}nothing was changed, revision 7\n"
    assert cli(*apply, "-o", "json").json == {"dry_run": True, "revision": 7, "results": results}
    assert cli(*apply, "--wait").code == 2
    error = {"file": "a.yaml", "line": 3, "field": "spec.x", "message": "is wrong", "remedy": "right it"}
    controller.on("POST /v1/apply/dry-run", {"errors": [error]}, 400)
    done = cli(*apply)
    assert (done.code, done.err) == (1, "error: a.yaml:3: spec.x: is wrong\n  right it\n")
    assert {target.split("?")[0] for _, target, _ in controller.asked} == {"/v1/apply/dry-run"}


def test_a_bad_resource_is_not_sent(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(SERVICE.replace("targetPort: 8080", "targetPort: 99999"))
    done = cli("--controller", controller.url, "apply", "-f", file)
    assert done.code == 1 and controller.asked == []
    assert done.err.startswith(f"error: {file}:7: spec.ports[0].targetPort: ")
    assert len(done.err.splitlines()) == 2


def test_errors_of_the_controller_are_shown_by_field(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    error = {"file": "a.yaml", "line": 3, "field": "spec.x", "message": "is \x1b[31mred", "remedy": "paint it"}
    controller.on("POST /v1/apply", {"errors": [error]}, 400)
    (tmp_path / "a.yaml").write_text(SERVICE)
    done = cli("--controller", controller.url, "apply", "-f", tmp_path / "a.yaml")
    assert done.code == 1
    assert done.err == "error: a.yaml:3: spec.x: is \\x1b[31mred\n  paint it\n"


@pytest.mark.parametrize("content", [b"\xff\xfe", None], ids=["not utf-8", "absent"])
def test_unreadable_files(cli: Cli, controller: Fake, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_bytes(content)
    done = cli("--controller", controller.url, "apply", "-f", file)
    assert done.code == 1 and done.err.startswith(f"error: {file}: ")


@pytest.mark.parametrize("kind", ["svc", "Service", "services", "SERVICE"])
def test_kinds_by_any_name(cli: Cli, controller: Fake, kind: str) -> None:
    controller.on("GET /v1/resources", {"revision": 7, "items": [ITEM]})
    done = cli("--controller", controller.url, "get", kind, "-n", "shop")
    assert done.code == 0 and "80→8080; app=web" in done.out
    assert controller.asked[0][1] == "/v1/resources?kind=Service&namespace=shop"


def test_get_for_machines(cli: Cli, controller: Fake) -> None:
    controller.on("GET /v1/resources", {"revision": 7, "items": [ITEM]})
    assert cli("--controller", controller.url, "get", "svc", "-o", "json").json == [ITEM]
    assert cli("--controller", controller.url, "get", "svc", "web", "-o", "json").json == ITEM
    assert list(yaml.safe_load_all(cli("--controller", controller.url, "get", "svc", "-o", "yaml").out)) == [ITEM]


def test_get_of_what_is_not_there(cli: Cli, controller: Fake) -> None:
    controller.on("GET /v1/resources", {"revision": 7, "items": []})
    assert cli("--controller", controller.url, "get", "svc").code == 0
    done = cli("--controller", controller.url, "get", "svc", "web", "-n", "shop")
    assert done.code == 1 and "there is no Service 'web' in namespace shop" in done.err
    done = cli("--controller", controller.url, "get", "all", "web")
    assert done.code == 1 and "there is no resource 'web'" in done.err and "pillion get all" in done.err
    done = cli("--controller", controller.url, "get", "nonsense")
    assert done.code == 2 and "AuthorizationPolicy" in done.err
    for slip, meant in (("servces", "Service"), ("polcies", "AuthorizationPolicy"), ("httproutes2", "HTTPRoute")):
        done = cli("--controller", controller.url, "get", slip)
        assert done.code == 2 and f"did you mean {meant}?" in done.err, done.err


def test_delete_by_name_and_by_file(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    controller.on("DELETE /v1/resources/Service/shop/web", {"revision": 8})
    controller.on("DELETE /v1/resources/MeshConfig/-/mesh", {"revision": 9})
    assert "revision 8" in cli("--controller", controller.url, "delete", "svc", "web", "-n", "shop").out
    assert "revision 9" in cli("--controller", controller.url, "delete", "config", "mesh").out
    (tmp_path / "a.yaml").write_text(SERVICE)
    assert "Service shop/web deleted" in cli("--controller", controller.url, "delete", "-f", tmp_path / "a.yaml").out
    assert cli("--controller", controller.url, "delete", "svc").code == 2
    controller.on("DELETE /v1/resources/Service/default/web", {"error": "there is no Service/default/web; look"}, 404)
    unnamed = cli("--controller", controller.url, "delete", "svc", "web")
    assert unnamed.code == 1 and "-n NAMESPACE" in unnamed.err and "pillion get Service" in unnamed.err
    assert "-n NAMESPACE" not in cli("--controller", controller.url, "delete", "svc", "gone", "-n", "shop").err


def test_delete_by_file_goes_on_past_what_is_gone(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    controller.on("DELETE /v1/resources/Service/shop/web", {"revision": 8})
    controller.on("GET /v1/status", STATUS)
    (tmp_path / "a.yaml").write_text(f"{SERVICE}---{SERVICE.replace('name: web', 'name: gone')}")
    done = cli("--controller", controller.url, "delete", "-f", tmp_path / "a.yaml")
    assert done.code == 0, done
    assert done.out.splitlines() == ["Service shop/gone was not there", "Service shop/web deleted", "revision 8"]
    controller.on("DELETE /v1/resources/Service/shop/web", {"error": "gone too"}, 404)
    again = cli("--controller", controller.url, "delete", "-f", tmp_path / "a.yaml", "-o", "json")
    assert again.json == {"revision": 7, "deleted": []}
    assert cli("--controller", controller.url, "delete", "svc", "web", "-n", "shop").code == 1


def test_refusals_carry_the_servers_remedy(cli: Cli, controller: Fake) -> None:
    controller.on("DELETE /v1/resources/Service/default/x", {"error": "there is no x; look elsewhere"}, 404)
    done = cli("--controller", controller.url, "delete", "svc", "x", "-n", "default")
    assert (done.code, done.err) == (1, "error: refused (404): there is no x\n  look elsewhere\n")


def test_status_of_all(cli: Cli, controller: Fake, agent: Fake) -> None:
    controller.on("GET /v1/status", STATUS)
    agent.on("GET /v1/status", AGENT)
    both = ("--controller", controller.url, "--agent", agent.url)
    done = cli(*both, "status")
    assert done.code == 0 and "ready, trust domain mesh.local, revision 7" in done.out and "shop/web-1" in done.out
    assert cli(*both, "status", "-o", "json").json["ready"] is True
    agent.on(
        "GET /v1/status", {**AGENT, "ready": False, "detail": "no proxy worker is connected", "programs": {"connect4": False}}
    )
    done = cli(*both, "status")
    assert done.code == 1 and "NOT READY" in done.out
    assert "no proxy worker is connected" in done.out and "not attached: connect4" in done.out


def test_status_before_any_node_has_joined(cli: Cli, controller: Fake) -> None:
    controller.on("GET /v1/status", {**STATUS, "nodes": []})
    done = cli("--controller", controller.url, "status")
    assert done.code == 0 and "no node has joined yet" in done.err and "pillion node token" in done.err


def test_what_a_kernel_lacks_is_told(cli: Cli, agent: Fake) -> None:
    on, off = {"on": True, "why": "", "instead": ""}, {"on": False, "why": "fionread: \x1b[31m0", "instead": "the proxy"}
    agent.on("GET /v1/status", {**AGENT, "optional": {"pods": on, "express": off}})
    done = cli("--agent", agent.url, "status")
    line = next(line for line in done.out.splitlines() if "express" in line)
    assert done.code == 0 and line.startswith("n1") and "fionread: \\x1b[31m0" in line and line.rstrip().endswith("the proxy")
    assert "pods" not in done.out
    report = cli("--agent", agent.url, "status", "-o", "json").json
    assert next(iter(report["agents"].values()))["optional"]["express"] == off


def test_status_when_an_agent_is_dead(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    controller.on("GET /v1/status", STATUS)
    done = cli("--controller", controller.url, "--agent", f"unix://{tmp_path}/gone.sock", "status")
    assert done.code == 1 and f"\nagent: unix://{tmp_path}/gone.sock does not answer: No such file" in done.out
    assert "\n  is it running?" in done.out


def test_wait_names_the_laggards(cli: Cli, controller: Fake) -> None:
    controller.on("GET /v1/status", STATUS)
    controller.on("GET /v1/wait", {"revision": 7})
    assert "revision 7 is in force everywhere" in cli("--controller", controller.url, "wait", "0").out
    assert cli("--controller", controller.url, "wait", "0", "-o", "json").json == {"revision": 7}
    late = [{"name": "n2", "acked": 3, "error": "stuck"}]
    controller.on("GET /v1/wait", {"error": "late", "laggards": late}, 504)
    done = cli("--controller", controller.url, "wait", "7", "--timeout", "1")
    assert done.code == 1 and "n2 is at 3 stuck" in done.err
    assert cli("--controller", controller.url, "wait", "x").code == 2


def test_nodes(cli: Cli, controller: Fake) -> None:
    controller.on("GET /v1/status", STATUS)
    controller.on("POST /v1/nodes/n2/token", {"token": "abc", "expires": 1})
    controller.on("POST /v1/nodes/n2/cut", {"revision": 9})
    assert "n1" in cli("--controller", controller.url, "node", "list").out
    token = cli("--controller", controller.url, "node", "token", "n2", "--ttl", "60")
    assert token.out == "abc\n" and json.loads(controller.asked[-1][2]) == {"ttl_s": 60, "readmit": False}
    assert cli("--controller", controller.url, "node", "token", "n2", "--ttl", "601").code == 2
    assert cli("--controller", controller.url, "node", "cut", "n2").out == "node n2 is cut, revision 9\n"
    assert json.loads(controller.asked[-1][2]) == {"force": False}
    forced = cli("--controller", controller.url, "node", "cut", "n2", "--force", "-o", "json")
    assert forced.json == {"node": "n2", "revision": 9} and json.loads(controller.asked[-1][2]) == {"force": True}
    controller.on("POST /v1/nodes/n3/cut", {"error": "no node n3 has joined; is the name right?"}, 404)
    typo = cli("--controller", controller.url, "node", "cut", "n3")
    assert typo.code == 1 and "no node n3" in typo.err and "pillion node cut n3 --force" in typo.err


def test_identities(cli: Cli, controller: Fake, agent: Fake) -> None:
    items = [{"spiffe": WORKLOAD["spiffe"], "id": 256, "workloads": ["shop/web-1"]}]
    controller.on("GET /v1/identities", {"revision": 7, "items": items})
    agent.on("GET /v1/status", AGENT)
    both = ("--controller", controller.url, "--agent", agent.url)
    assert "256" in cli(*both, "identity").out
    assert cli(*both, "identity", "list", "-o", "json").json == items
    for name in ("shop/web", "shop/web-1", "spiffe://mesh.local/ns/shop/sa/web", "mesh.local/ns/shop/sa/web"):
        assert "abc" in cli(*both, "identity", "show", name).out
    assert cli(*both, "identity", "show", "shop/nobody").code == 1


FLOW = {
    "type": "flow",
    "time": 1.5,
    "verdict": "denied",
    "reason": "shop/web#0",
    "source": "spiffe://mesh.local/ns/shop/sa/x",
    "destination": "Workload/shop/web-1",
    "path": "/\x1b[2J",
    "method": "GET",
    "status": 403,
    "node": "n1",
}


def test_flows_are_filtered_sorted_and_harmless(cli: Cli, agent: Fake) -> None:
    earlier = {**FLOW, "time": 0.5, "verdict": "allowed"}
    agent.on("GET /v1/flows", b"".join(json.dumps(flow).encode() + b"\n" for flow in (FLOW, earlier)))
    lines = cli("--agent", agent.url, "flows").out.splitlines()
    assert len(lines) == 2 and "ALLOWED" in lines[0] and "[shop/web#0]" in lines[1]
    assert "\x1b" not in "".join(lines)
    only = cli("--agent", agent.url, "flows", "--verdict", "denied", "-o", "json").out.splitlines()
    assert [json.loads(line)["verdict"] for line in only] == ["denied"]
    wrong = cli("--agent", agent.url, "flows", "--verdict", "deny")
    assert wrong.code == 2 and "allowed, denied, audited" in wrong.err.replace("'", "")
    asked = len(agent.asked)
    assert cli("--agent", agent.url, "flows", "-f").out.splitlines() == lines
    assert "limit=10&follow=1" in agent.asked[asked][1] and "limit=100" in agent.asked[0][1]


def test_a_flow_says_what_is_known_and_no_more() -> None:
    denied = {"time": 1.0, "verdict": "denied", "source": "spiffe://m/ns/a/sa/b", "destination": "Workload/shop/web-1"}
    told = flows.line({**denied, "reason": "policy_denied", "rule": "shop/web-deny#0", "destination_address": "[fd77::1]:80"})
    assert "DENIED m/ns/a/sa/b → Workload/shop/web-1 ([fd77::1]:80)" in told
    assert told.endswith("[policy_denied by shop/web-deny#0]")
    assert flows.line({**denied, "reason": "shop/web#0", "rule": "shop/web#0"}).endswith(" [shop/web#0]")
    assert flows.line({**denied, "reason": "outbound_denied", "destination": ""}).endswith("→ ? [outbound_denied]")


def test_flows_when_no_agent_answers(cli: Cli, tmp_path: Path) -> None:
    assert cli("--agent", f"unix://{tmp_path}/gone.sock", "flows").code == 1


def test_a_flow_with_nothing_in_it_is_a_line() -> None:
    assert "?" in flows.line({})


def test_policy_why_decides_here_on_the_controllers_state(cli: Cli, controller: Fake) -> None:
    spiffe = "spiffe://mesh.local/ns/shop/sa/"
    items = {
        "Config//mesh": {"kind": "Config", "trust_domain": "mesh.local"},
        f"Identity//{spiffe}web": {"kind": "Identity", "id": 256, "spiffe": f"{spiffe}web"},
        f"Identity//{spiffe}cli": {"kind": "Identity", "id": 257, "spiffe": f"{spiffe}cli"},
        "Workload/shop/web-1": {
            "kind": "Workload",
            "id": 300,
            "name": "web-1",
            "namespace": "shop",
            "node": "n1",
            "identity": 256,
            "spiffe": f"{spiffe}web",
            "addresses": ["10.77.1.10"],
            "ports": [8080],
        },
        "Workload/shop/cli": {
            "kind": "Workload",
            "id": 301,
            "name": "cli",
            "namespace": "shop",
            "node": "n1",
            "identity": 257,
            "spiffe": f"{spiffe}cli",
            "addresses": ["10.77.1.11"],
        },
        "Service/shop/web": {
            "kind": "Service",
            "id": 400,
            "name": "web",
            "namespace": "shop",
            "endpoints": ["Workload/shop/web-1"],
            "ports": [{"port": 80, "target_port": 8080, "protocol": "http"}],
        },
        "Policy/shop/web": {
            "kind": "Policy",
            "name": "web",
            "namespace": "shop",
            "action": "ALLOW",
            "rules": [{"sources": [{"principals": ["mesh.local/ns/shop/sa/cli"]}], "operations": [{"methods": ["GET"]}]}],
        },
    }
    controller.on("GET /v1/state", {"revision": 12, "items": items})
    why = ("--controller", controller.url, "policy", "why", "shop/cli", "shop/web")
    allowed = cli(*why, "GET", "/")
    assert allowed.code == 0 and allowed.out.startswith("ALLOWED by shop/web#0\n") and "revision     12" in allowed.out
    rules = [{"operations": [{"methods": ["GET"]}]}]
    audit = {"kind": "Policy", "name": "no-get", "namespace": "shop", "action": "AUDIT", "rules": rules, "dry_run": "DENY"}
    controller.on("GET /v1/state", {"revision": 12, "items": {**items, "Policy/shop/no-get": audit}})
    assert "audit        shop/no-get#0 would DENY" in cli(*why, "GET", "/").out
    assert "audit" not in cli(*why, "POST", "/").out
    controller.on("GET /v1/state", {"revision": 12, "items": items})
    denied = cli(*why, "POST", "/", "-o", "json")
    assert denied.code == 1 and denied.json["outcome"] == "denied" and denied.json["revision"] == 12
    assert cli(*why, "-o", "json").json["outcome"] == "needs_l7"
    for words, said in ((("/admin",), "GET /admin"), (("get", "/"), "write GET"), (("GET", "admin"), "write /admin")):
        wrong = cli(*why, *words)
        assert wrong.code == 2 and said in wrong.err
    unknown = cli("--controller", controller.url, "policy", "why", "shop/nobody", "shop/web")
    assert unknown.code == 2 and "shop/nobody" in unknown.err
    gone = {key: item for key, item in items.items() if not key.endswith("cli")}
    controller.on("GET /v1/state", {"revision": 12, "items": gone})
    alone = cli(*why[:-2], f"{spiffe}cli", "shop/web", "GET", "/")
    assert alone.code == 0 and alone.out.startswith("ALLOWED by shop/web#0\n") and "no workload runs as it now" in alone.out
    controller.on("GET /v1/state", {"revision": 12, "items": {"x": {"kind": "New"}}})
    assert "version" in cli(*why).err


def test_check_on_this_machine(cli: Cli) -> None:
    report = {each["check"]: each for each in cli("check", "-o", "json").json}
    assert report["root"]["ok"] and report["kernel"]["ok"] and report["cgroup2"]["ok"] and report["tools"]["ok"]


def test_completion(cli: Cli) -> None:
    assert "_PILLION_COMPLETE" in cli("completion", "bash").out
    assert cli("completion", "tcsh").code == 2


def test_completion_completes() -> None:
    env = {**os.environ, "_PILLION_COMPLETE": "complete_bash", "COMP_WORDS": "pillion get Auth", "COMP_CWORD": "2"}
    code = "import sys; sys.argv = ['pillion']; from pillion.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["AuthorizationPolicy"]


def pillion(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv, environ = [sys.executable, "-m", "pillion", *arguments], {**os.environ, **env}
    return subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environ, timeout=30)


def test_lab_is_the_labs_own_program() -> None:
    done = pillion("lab", "--help")
    assert done.returncode == 0 and "usage: pillion lab" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "env", "named"),
    [
        (("--lab", "nosuch", "lab", "exec", "w", "--", "true"), {}, "nosuch"),
        (("--lab", "nosuch", "lab", "exec", "w", "--", "true"), {"PILLION_LAB": "other"}, "nosuch"),
        (("lab", "exec", "w", "--", "true"), {"PILLION_LAB": "nosuch"}, "nosuch"),
        (("lab", "exec", "--name", "third", "w", "--", "true"), {"PILLION_LAB": "nosuch"}, "third"),
    ],
)
def test_the_lab_that_was_named_is_meant(arguments: tuple[str, ...], env: dict[str, str], named: str) -> None:
    done = pillion(*arguments, **env)
    assert done.returncode == 1 and f"{named!r}" in done.stderr, done.stderr


def test_the_version(cli: Cli) -> None:
    done = cli("--version")
    assert done.code == 0 and re.fullmatch(r"pillion \d+\.\d+\.\d+\S*\n", done.out)


def test_certificates_are_revoked_by_serial(cli: Cli, controller: Fake) -> None:
    answer = {"revision": 9, "serial": "ab", "spiffe": WORKLOAD["spiffe"], "owner": "node:n1"}
    controller.on("POST /v1/certificates/ab/revoke", answer)
    controller.on("GET /v1/wait", {"revision": 9})
    controller.on("GET /v1/status", STATUS)
    done = cli("--controller", controller.url, "identity", "revoke", "ab", "--wait")
    assert done.out == f"certificate ab of {WORKLOAD['spiffe']} is revoked, revision 9 in force everywhere\n"
    assert any(target.startswith("/v1/wait?revision=9") for _, target, _ in controller.asked)
    assert cli("--controller", controller.url, "identity", "revoke", "ab", "-o", "json").json == [answer]
    controller.on("POST /v1/certificates/cd/revoke", {"error": "this controller issued no certificate cd"}, 404)
    done = cli("--controller", controller.url, "identity", "revoke", "ab", "cd", "ef")
    assert done.code == 1 and "certificate ab of" in done.out and "ef" not in controller.asked[-1][1]  # what is done is told
    assert "issued no certificate cd" in done.err and "pillion identity show" in done.err


def test_operators(cli: Cli, controller: Fake, tmp_path: Path) -> None:
    answer = {"chain": "CHAIN", "bundle": "ROOTS", "serial": "ab", "not_after": 4e9, "controller": ["https://10.0.0.1:15443"]}
    controller.on("POST /v1/operators/ann", answer)
    done = cli("--controller", controller.url, "operator", "add", "ann", "--out", tmp_path / "new", "-o", "json")
    environment = done.json["environment"]
    assert environment["PILLION_CONTROLLER"] == "https://10.0.0.1:15443"
    assert Path(environment["PILLION_CERT"]).read_text() == "CHAIN" and Path(environment["PILLION_CA"]).read_text() == "ROOTS"
    key = Path(environment["PILLION_KEY"])
    assert "PRIVATE KEY" in key.read_text() and key.stat().st_mode & 0o777 == 0o600
    body = json.loads(controller.asked[-1][2])
    assert set(body) == {"csr"} and "PRIVATE" not in body["csr"]
    slip = cli("--controller", controller.url, "operator", "add", "a/b")
    assert slip.code == 2 and "'a/b' is not a DNS label" in slip.err
    # Refused: no key is left behind
    assert cli("--controller", controller.url, "operator", "add", "bob", "--out", tmp_path / "bob").code == 1
    assert list((tmp_path / "bob").iterdir()) == []
    controller.on("GET /v1/operators", {"items": [{"name": "ann", "serial": "ab", "not_after": 4e9, "revoked": False}]})
    assert "ann" in cli("--controller", controller.url, "operator", "list").out
    controller.on("DELETE /v1/operators/ann", {"revision": 4})
    assert cli("--controller", controller.url, "operator", "remove", "ann").out == "operator ann is out, revision 4\n"


@pytest.mark.parametrize("arguments", [("bogus",), ("get",), ("wait", "-1"), ("node", "nope")])
def test_wrong_use_is_exit_code_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    assert cli(*arguments).code == 2


@pytest.mark.parametrize(
    "given", [("--service", "Web_X"), ("--service", "web", "-n", "a.b"), ("--service", "web", "--name", "-x")]
)
def test_run_names_what_is_no_name(cli: Cli, given: tuple[str, ...]) -> None:
    done = cli("run", *given, "--", "true")
    assert done.code == 2 and f"{given[-2]} {given[-1]!r} is not a DNS label".replace("-n ", "--namespace ") in done.err


@pytest.mark.parametrize("dashes", [(), ("--",)])
def test_what_follows_the_program_is_the_programs(dashes: tuple[str, ...]) -> None:
    """An option of its own must not name another identity than was meant."""
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]  # the app is a group
    given = command.make_context("run", ["--service", "web", *dashes, "echo", "-n", "hello", "--name", "x"]).params
    assert (given["command"], given["namespace"], given["name"]) == (["echo", "-n", "hello", "--name", "x"], "default", None)
