"""What operators do with certificates and nodes: cut what is there, revoke one, know who holds which."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

from tests.controller.rig import ROOT, SHOP, Controller, csr_for, new_key

WEB = {"service_account": "web", "addresses": ["10.0.1.1"], "labels": {"app": "web"}}
SPIFFE = "spiffe://mesh.local/ns/shop/sa/web"


def serial_of(chain: str) -> str:
    return format(x509.load_pem_x509_certificate(chain.encode()).serial_number, "x")


async def test_only_a_node_that_is_known_is_cut(controller: Controller) -> None:
    async with controller.operator() as operator:
        before = (await operator.ok("GET", "/v1/status"))["revision"]
        status, answer = await operator.call("POST", "/v1/nodes/n1/cut")
        assert (status, answer["reason"]) == (404, "not_found") and "n1" in answer["error"], answer
        now = await operator.ok("GET", "/v1/status")
        assert now["revision"] == before and now["nodes"] == []
        await operator.ok("POST", "/v1/apply", SHOP)  # grants n1
        await operator.ok("POST", "/v1/nodes/n1/cut")
        await operator.ok("POST", "/v1/nodes/n1/cut")  # again
        await controller.token("n2")
        await operator.ok("POST", "/v1/nodes/n2/cut")
        await controller.join("n3")
        await operator.ok("POST", "/v1/nodes/n3/cut")
        assert (await operator.call("POST", "/v1/nodes/n4/cut", {"force": False}))[0] == 404
        await operator.ok("POST", "/v1/nodes/n4/cut", {"force": True})
        status, answer = await operator.call("POST", "/v1/nodes/n4/token")
        assert (status, answer["reason"]) == (409, "node_cut")


async def test_one_certificate_is_revoked(controller: Controller) -> None:
    async with controller.operator() as operator:
        await operator.ok("POST", "/v1/apply", SHOP)
        async with controller.node("n1") as n1:
            await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB)
            first = await n1.ok("POST", "/v1/agent/sign", {"csr": csr_for(new_key()), "spiffe": SPIFFE})
            second = await n1.ok("POST", "/v1/agent/sign", {"csr": csr_for(new_key()), "spiffe": SPIFFE})
            shown = first["serial"].upper().zfill(42)  # as other tools print it
            answer = await operator.ok("POST", f"/v1/certificates/{shown}/revoke")
            assert (answer["serial"], answer["spiffe"], answer["owner"]) == (first["serial"], SPIFFE, "node:n1")
            again = await operator.ok("POST", f"/v1/certificates/{shown}/revoke")
            assert again["revision"] == answer["revision"]
            await operator.ok("GET", f"/v1/wait?revision={answer['revision']}&timeout=5")
            config = (await operator.ok("GET", "/v1/state"))["items"]["Config//mesh"]
            assert config["revoked"] == [first["serial"]] and second["serial"] not in config["revoked"]
            # The node itself goes on
            await n1.ok("POST", "/v1/agent/sign", {"csr": csr_for(new_key()), "spiffe": SPIFFE})
        controller.kill()
        controller.start()
    async with controller.operator() as operator:
        await operator.ok("GET", "/v1/wait?timeout=5")
        assert (await operator.ok("GET", "/v1/state"))["items"]["Config//mesh"]["revoked"] == [first["serial"]]


@pytest.mark.parametrize(("serial", "status"), [("abc", 404), ("xyz", 400), ("-1", 400), ("a" * 65, 400)])
async def test_what_is_no_serial_is_not_revoked(shared: Controller, serial: str, status: int) -> None:
    async with shared.operator() as operator:
        found, answer = await operator.call("POST", f"/v1/certificates/{serial}/revoke")
    assert found == status and answer["error"], answer


async def test_the_controllers_own_is_not_revoked_here(shared: Controller) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", shared.port, ssl=shared.context())
    certificate = writer.get_extra_info("peercert")
    writer.close()
    async with shared.operator() as operator:
        status, answer = await operator.call("POST", f"/v1/certificates/{certificate['serialNumber']}/revoke")
    assert status == 409 and "start" in answer["error"], answer


async def test_a_node_whose_certificate_is_revoked_loses_its_stream(controller: Controller) -> None:
    chain, key = await controller.join("n1")
    async with controller.operator() as operator, controller.client(chain, key) as n1, n1.stream() as stream:
        await stream.take()
        await operator.ok("POST", f"/v1/certificates/{serial_of(chain)}/revoke")
        async with asyncio.timeout(5):
            while not stream.websocket.closed:
                await stream.websocket.receive()
        status, answer = await n1.call("GET", "/v1/agent/stream")
        assert (status, answer["reason"]) == (403, "certificate_revoked")
        metrics = str(await operator.ok("GET", "/metrics"))
        assert 'pillion_controller_stream_cuts_total{reason="certificate_revoked"} 1.0' in metrics


async def test_operators_are_listed_with_their_certificates(controller: Controller) -> None:
    async with controller.operator() as root:
        assert (await root.ok("GET", "/v1/operators"))["items"] == []
        made = [await root.ok("POST", f"/v1/operators/{name}", {"csr": csr_for(new_key())}) for name in ("ann", "ann", "bob")]
        await root.ok("POST", f"/v1/certificates/{made[0]['serial']}/revoke")
        items = (await root.ok("GET", "/v1/operators"))["items"]
        assert {(item["name"], item["serial"], item["revoked"]) for item in items} == {
            ("ann", made[0]["serial"], True), ("ann", made[1]["serial"], False), ("bob", made[2]["serial"], False),
        }  # fmt: skip
        assert {item["not_after"] for item in items} == {each["not_after"] for each in made}


async def test_connections_that_are_turned_away_are_counted(controller: Controller) -> None:
    async def metrics() -> str:
        async with controller.operator() as operator:
            return str(await operator.ok("GET", "/metrics"))

    assert "pillion_controller_turned_away_total 0.0" in await metrics()
    held = [await asyncio.open_connection("127.0.0.1", controller.port) for _ in range(64)]  # HANDSHAKES_PER_SOURCE_MAX
    reader, writer = await asyncio.open_connection("127.0.0.1", controller.port)
    assert await reader.read() == b""
    for each in (*(one for _, one in held), writer):
        each.close()
    assert "pillion_controller_turned_away_total 1.0" in await metrics()


async def test_what_an_operator_set_on_a_workload_stays_when_its_node_registers_it_again(controller: Controller) -> None:
    async with controller.operator() as operator, controller.node("n1") as n1:
        await operator.ok("POST", "/v1/apply", SHOP)
        await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB)
        query = "/v1/resources?kind=Workload&namespace=shop&name=web-1"
        (item,) = (await operator.ok("GET", query))["items"]
        item["spec"]["express"] = "off"
        await operator.ok("POST", "/v1/apply", json.dumps(item))
        await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB | {"labels": {"app": "web", "version": "v2"}})
        (again,) = (await operator.ok("GET", query))["items"]
        assert again["spec"]["express"] == "off" and again["metadata"]["labels"]["version"] == "v2"
        # And it is still the node's: it goes with its grant.
        await operator.ok("DELETE", "/v1/resources/NodeGrant/-/n1")
        assert (await operator.ok("GET", query))["items"] == []


@pytest.mark.parametrize(
    ("what", "key"),
    [
        ((), "Config//mesh"),
        (("--service", "shop/web"), "Service/shop/web"),
        (("--workload", "shop/web-1"), "Workload/shop/web-1"),
    ],
)
async def test_the_command_line_switches_express(controller: Controller, what: tuple[str, ...], key: str) -> None:
    async def switched(how: str) -> str:
        argv = [sys.executable, "-m", "pillion", "--controller", f"unix://{controller.run}/controller.sock", "express", how]
        done = await asyncio.to_thread(
            subprocess.run, [*argv, *what, "--wait"], cwd=ROOT, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        item = (await operator.ok("GET", "/v1/state"))["items"][key]
        return str(item.get("express", "auto"))

    async with controller.operator() as operator, controller.node("n1") as n1:
        await operator.ok("POST", "/v1/apply", SHOP)
        await n1.ok("PUT", "/v1/agent/workloads/shop/web-1", WEB)
        assert [await switched(how) for how in ("off", "on", "off")] == ["off", "auto", "off"]


async def test_the_command_line_makes_operators_that_work_from_afar(controller: Controller, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PILLION_")}

    def pillion(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "pillion", *arguments]
        return subprocess.run(argv, cwd=ROOT, env={**environ, **more}, capture_output=True, text=True, timeout=30)

    local = {"PILLION_CONTROLLER": f"unix://{controller.run}/controller.sock"}
    made = await asyncio.to_thread(pillion, "operator", "add", "ann", "--out", str(tmp_path / "ann"), **local)
    assert made.returncode == 0, made.stderr
    files = {path.name: path for path in (tmp_path / "ann").iterdir()}
    assert set(files) == {"ann.key", "ann.crt", "ca.crt"}
    assert stat.S_IMODE(files["ann.key"].stat().st_mode) == 0o600
    environment = dict(line.removeprefix("export ").split("=", 1) for line in made.stdout.splitlines() if "=" in line)
    assert set(environment) == {"PILLION_CONTROLLER", "PILLION_CERT", "PILLION_KEY", "PILLION_CA"}
    remote = environment | {"PILLION_CONTROLLER": controller.url}
    assert environment["PILLION_CONTROLLER"] == controller.url
    listed = await asyncio.to_thread(pillion, "operator", "list", "-o", "json", **remote)
    assert [item["name"] for item in json.loads(listed.stdout)] == ["ann"], listed.stderr
    twice = await asyncio.to_thread(pillion, "operator", "add", "ann", "--out", str(tmp_path / "ann"), **local)
    assert twice.returncode == 1 and "ann.key" in twice.stderr
    gone = await asyncio.to_thread(pillion, "operator", "remove", "ann", **local)
    assert gone.returncode == 0, gone.stderr
    refused = await asyncio.to_thread(pillion, "status", **remote)
    assert refused.returncode == 1 and "is revoked" in refused.stderr
