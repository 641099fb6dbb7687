"""The demo: its bookkeeping alone, its resources, and the whole of it once."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import Lab, LabError
from lab.demo.__main__ import hosts, show
from lab.demo.inlab import specs
from lab.demo.onhosts import HostShop
from lab.demo.report import Report, Shown
from lab.demo.scenes import SCENES
from lab.demo.shop import CATALOGS, HERE, NotSeen, is_virtual
from mesh.resources import load
from tests.conftest import SESSION

ROOT = Path(__file__).parents[2]


def test_the_table_is_good_only_if_all_was_seen(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    assert not report.table()
    report.add(Shown("one", True, "yes", 0.1))
    assert report.table()
    report.add(Shown("two", False, "no", 0.1))
    assert not report.table()
    assert "1 of 2 seen" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [NotSeen("x"), LabError("x", "y"), OSError("x"), subprocess.TimeoutExpired("x", 1), KeyError("x"), ValueError("x")]
)
def test_whatever_goes_wrong_in_a_scene_is_its_observation(error: Exception) -> None:
    report = Report()

    def scene() -> str:
        raise error

    assert not show(report, "bad", scene)
    assert show(report, "good", lambda: "seen")
    assert [each.ok for each in report.shown] == [False, True] and "x" in report.shown[0].observed


def test_a_long_silence_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.demo.report.SILENCE_S_MAX", 0.05)
    report = Report()
    out = ""
    with report.working("digging"):
        deadline = time.monotonic() + 5
        while "digging …" not in (out := out + capsys.readouterr().out):
            assert time.monotonic() < deadline


def test_the_shops_resources_are_good_and_select_its_workloads() -> None:
    resources = load((HERE / "shop.yaml").read_text(), "shop.yaml")
    labels = [spec["labels"] for spec in specs()]
    for resource in resources:
        if resource.key[0] == "Service":
            selector = resource.spec.selector  # type: ignore[attr-defined]
            assert any(selector.items() <= each.items() for each in labels), resource.key


def test_two_hosts_are_named() -> None:
    assert hosts("n2=192.0.2.2,n1=192.0.2.1") == {"n2": "192.0.2.2", "n1": "192.0.2.1"}
    for text in ("", "n1=192.0.2.1", "n1=192.0.2.1,n1=192.0.2.2", "n1=1,n2=2,n3=3", "n1,n2"):
        with pytest.raises(argparse.ArgumentTypeError, match="two hosts"):
            hosts(text)


def test_on_hosts_the_first_is_asked() -> None:
    shop = HostShop({"n2": "192.0.2.2", "n1": "192.0.2.1"})
    found = {name: shop[name].address for name in ("client", "front", "redis", *CATALOGS, "mariadb")}
    assert {name for name, address in found.items() if address == "192.0.2.1"} == {"catalog-v1b", "catalog-v2", "mariadb"}
    for ask in (lambda: shop.agent_api("n1", "GET", "/v1/status"), lambda: shop.outside("n1", ["true"])):
        with pytest.raises(NotSeen, match="n1"):
            ask()
    assert shop.outside("n2", ["echo", "yes"]).stdout == "yes\n"


def test_each_program_of_a_host_has_a_port_of_its_own() -> None:
    """Those of one host share its address."""
    for place in ("near", "far"):
        ports = [port for node, _, port in CATALOGS.values() if node == place]
        assert len({*ports}) == len(ports)
    services = {resource.key[2]: resource.spec for resource in load((HERE / "shop.yaml").read_text(), "shop.yaml")}
    for name, (_, version, port) in CATALOGS.items():
        assert services[f"catalog-{version}"].ports[0].target == port, name  # type: ignore[attr-defined]


def test_virtual_addresses() -> None:
    assert is_virtual("240.0.0.1") and is_virtual("fd50:494c::1")
    assert not is_virtual("10.77.1.10") and not is_virtual("fd77:1::10")


def test_an_interrupted_demo_leaves_nothing() -> None:
    lab = Lab(f"{SESSION}i")
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.demo", "--name", lab.name],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    while "network of" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    process.stdout.close()
    assert process.wait(60) == 1 and "interrupted" in rest
    assert not lab.cgroup.exists() and not lab.paths.base.exists()


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_the_whole_demo() -> None:
    argv = [sys.executable, "-m", "lab.demo", "--name", f"{SESSION}d"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SCENES) + 1} of {len(SCENES) + 1} seen" in done.stdout
