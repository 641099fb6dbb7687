"""The units as systemd itself reads and rates them, without one running."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lab.demo.scenes import SCENES
from pillion.drop_in import service_drop_in, slice_unit
from tests.deploy import provision

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "deploy" / "systemd"
EXPOSURE_MAX = {"pillion-controller": 3.0, "pillion-proxy": 3.0, "pillion-agent": 7.0}


@pytest.mark.parametrize("name", EXPOSURE_MAX)
def test_exposure(name: str) -> None:
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNITS / f"{name}.service")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stderr or done.stdout
    assert float(found[1]) <= EXPOSURE_MAX[name], done.stdout


# What the analysis holds against every unit, and why it is so here
EVERYWHERE = {
    "RootDirectory": "the programs are the host's, and ProtectSystem= has it read-only",
    "PrivateMounts": "ProtectSystem= makes one",
    "DeviceAllow": "ProtectClock= lets the clock be read, and PrivateDevices= no other",
    "IPAddressDeny": "nodes and operators are anywhere; the proxy has no network",
}


@pytest.mark.parametrize("name", EXPOSURE_MAX)
def test_each_opening_is_accounted_for(name: str) -> None:
    """What systemd-analyze counts as exposed, a comment of the unit names: CAP_X without the CAP_, or the option."""
    argv = ["systemd-analyze", "security", "--offline=true", "--json=short", str(UNITS / f"{name}.service")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    comments = "".join(line for line in (UNITS / f"{name}.service").read_text().splitlines(True) if line.startswith("#"))
    openings = [row["name"] for row in json.loads(done.stdout) if row["exposure"]]
    assert openings
    for opening in openings:
        option, _, what = opening.partition("=")
        wanted = what.removeprefix("~").removeprefix("CAP_") if what.startswith("~") else f"{option}="
        told = option in EVERYWHERE or bool(re.search(wanted, comments))
        assert told, f"{opening}: say why"


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    """Programs are named where the tests can have them: only how the units are written is judged."""
    for unit in UNITS.iterdir():
        text = re.sub(r"/opt/pillion/current/bin/\S+", "/bin/true", unit.read_text())
        (tmp_path / unit.name).write_text(text)
    argv = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / unit.name) for unit in UNITS.iterdir())]
    environment = {"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=environment)
    ours = [line for line in done.stderr.splitlines() if "pillion" in line]
    assert not ours and done.returncode == 0, done.stderr


def options(unit: str) -> dict[str, list[str]]:
    """Option -> its values, of all sections."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / unit).read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("name", EXPOSURE_MAX)
def test_readiness_is_told_and_life_watched(name: str) -> None:
    unit = options(f"{name}.service")
    assert unit["Type"] == ["notify"] and float(unit["WatchdogSec"][0]) > 0 and unit["Restart"] == ["always"]
    assert unit["StartLimitIntervalSec"] == ["0"], "a mesh that gave up would stay down"


def test_nobody_goes_down_with_the_agent() -> None:
    """`Requires=` on the agent would hand its restarts on."""
    for unit in UNITS.iterdir():
        found = options(unit.name)
        for name in ("Requires", "BindsTo", "PartOf"):
            assert not any("pillion-agent.service" in value for value in found.get(name, [])), unit.name


def test_the_programs_cgroup_is_never_the_root() -> None:
    agent = options("pillion-agent.service")
    assert "--cgroup /sys/fs/cgroup/pillion.slice " in agent["ExecStart"][0]
    assert agent["Slice"] == ["pillion-agent.slice"] and options("pillion-proxy.service")["Slice"] == ["pillion-proxy.slice"]


def test_on_a_busy_node_the_proxy_comes_first() -> None:
    """What it serves competes with it inside pillion.slice, and that with the rest of the system: 100 is what others have."""
    weight = {unit: int(options(f"{unit}.slice")["CPUWeight"][0]) for unit in ("pillion", "pillion-agent", "pillion-proxy")}
    assert 100 < weight["pillion-agent"] < weight["pillion-proxy"] and weight["pillion-proxy"] >= 10 * 100
    assert 100 < weight["pillion"] <= 500, "it leaves the rest of the system a share"
    workloads = slice_unit("web.service") + service_drop_in("web.service", "shop/web")
    assert "CPUWeight" not in workloads and not (UNITS / "pillion-workloads.slice").exists()


def test_the_token_is_a_credential() -> None:
    unit = options("pillion-agent.service")
    assert unit["LoadCredential"] == ["join-token:/etc/pillion/join-token"]
    assert unit["SetCredential"] == ["join-token:\\n"], "or a unit whose token was deleted does not start"


def test_the_pins_outlive_the_agent() -> None:
    """A mount inside the agent's own mount namespace would end with it."""
    mount = options("run-pillion-bpf.mount")
    assert mount["Where"] == ["/run/pillion/bpf"] and "mode=0700" in mount["Options"][0]
    assert options("pillion-agent.service")["RuntimeDirectoryPreserve"] == ["yes"]


def test_the_proxy_has_no_network_and_little_else() -> None:
    proxy = options("pillion-proxy.service")
    assert proxy["PrivateNetwork"] == ["yes"] and proxy["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert proxy["CapabilityBoundingSet"] == ["CAP_SETUID CAP_SETGID CAP_SETPCAP"]


@pytest.mark.parametrize("script", ["install.sh", "wheel.sh", "shop.sh", "setup.sh"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["sh", "-n", str(ROOT / "deploy" / script)], check=True)


def test_the_hosts_locks_are_of_the_lock() -> None:
    from deploy import lock

    assert {file: (ROOT / "deploy" / file).read_text() for file in lock.texts()} == lock.texts(), "run: make lock"
    assert lock.texts()["build.lock"].count("==") == 1


def test_vagrant_reads_its_file(tmp_path: Path) -> None:
    assert shutil.which("vagrant"), "run: deploy/setup.sh (Debian has the package vagrant)"
    environment = {
        "VAGRANT_HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
    }
    argv = ["vagrant", "validate", "--ignore-provider"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_line_of_the_provisioning_was_run() -> None:
    """As docs/hosts.md has it. One that is changed: run tests/deploy/provision.py again."""
    rows = (ROOT / "docs/hosts.md").read_text().partition(provision.BEGIN)[2].partition(provision.END)[0]
    lines = [(name, line) for name, machine in provision.machines().items() for line in machine["lines"]]
    assert len(lines) == 6
    assert not [line for name, line in lines if provision.row(name, line) not in rows]
    assert "Debian 12 | Debian 13 | Ubuntu 24.04" in rows
    all_scenes = f"{len(SCENES)} of {len(SCENES)} seen"
    wanted = {**provision.AFTER, ("n2", "/vagrant/deploy/shop.sh n2"): all_scenes}
    for (name, line), seen in wanted.items():
        (row,) = (row for row in rows.splitlines() if row.startswith(provision.row(name, line)))
        assert row.removeprefix(provision.row(name, line)).count(seen) == 3, row
