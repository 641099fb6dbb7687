"""Enrolment by its files: what is written, what is refused, what is left. systemd answers from a table."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pillion import awaiting, drop_in, enrol, enrol_files, enrol_systemd, node_facts
from pillion.context import chosen
from pillion.errors import CliError
from tests.pillion.conftest import serve
from tests.trees import PROJECT

KNOWN = {
    "LoadState": "loaded", "ActiveState": "inactive", "User": "web", "DynamicUser": "no", "TriggeredBy": "",
    "PrivateNetwork": "no", "NetworkNamespacePath": "", "AmbientCapabilities": "", "Delegate": "no", "PAMName": "",
}  # fmt: skip
LISTS = ("InaccessiblePaths", "TemporaryFileSystem", "Wants", "After", "BindsTo", "Requires", "Conflicts", "Before")


class Host:
    """Units by name, and what systemctl was asked."""

    def __init__(self, root: Path) -> None:
        self.root, self.units, self.asked = root, {"web.service": dict(KNOWN)}, list[tuple[str, ...]]()
        self.sockets: dict[str, str] = {}  # unit files -> what they trigger

    def systemctl(self, *arguments: str) -> str:
        if arguments[0] == "list-unit-files":
            return "".join(f"{name} enabled enabled\n" for name in self.sockets)
        if arguments[:2] == ("show", "--property=Id,Triggers"):
            return "\n".join(f"Triggers={self.sockets[name]}\nId={name}\n" for name in arguments[2:])
        if arguments[0] == "show":
            shown = {**self.units.get(arguments[1], {"LoadState": "not-found"}), **self.drop_ins(arguments[1])}
            return "\n".join(f"{key}={line}" for key, value in shown.items() for line in value.split("\n"))
        if arguments[0] == "cat":
            return self.units[arguments[1]].get("text", "")
        self.asked.append(arguments)
        return ""

    def drop_ins(self, unit: str) -> dict[str, str]:
        """As systemd takes them together: by the order of their names, the last word counts, lists grow, nothing empties them."""
        found: dict[str, str] = {}
        for path in sorted((self.root / "units" / f"{unit}.d").glob("*.conf")):
            for line in path.read_text().splitlines():
                name, equals, value = line.partition("=")
                if not equals or line.startswith("#"):
                    continue
                if not value:
                    found.pop(name, None)
                elif name.startswith("Exec"):
                    flags = "privileged" if value.startswith("+") else ""
                    argv = value.lstrip("+!-")
                    for shown, last in ((name, "ignore_errors=no"), (f"{name}Ex", f"flags={flags}")):
                        text = f"{{ path={argv.split()[0]} ; argv[]={argv} ; {last} ; pid=0 }}"
                        found[shown] = f"{found[shown]}\n{text}" if shown in found else text
                elif name == "BindReadOnlyPaths":
                    binds = " ".join(f"{path}:{path.lstrip('-')}:rbind" for path in value.split())
                    found[name] = f"{found.get(name, '')} {binds}".strip()
                elif name in LISTS:
                    found[name] = f"{found.get(name, '')} {value}".strip()
                elif name == "CapabilityBoundingSet":
                    found[name] = "" if value.startswith("~") else value.lower()
                else:
                    found[name] = value
        return found

    def files(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.root / "units")): path.read_text() if path.exists() else "dangling"
            for path in sorted((self.root / "units").rglob("*"))
            if path.is_file() or path.is_symlink()
        }

    def entries(self) -> list[dict[str, Any]]:
        return list(yaml.safe_load((self.root / "workloads.yaml").read_text())["workloads"])


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host(tmp_path)
    (tmp_path / "units").mkdir()
    (tmp_path / "workloads.yaml").write_text("workloads: []\n")
    monkeypatch.setattr(enrol_files, "UNITS", tmp_path / "units")
    monkeypatch.setattr(enrol_files, "WORKLOADS", tmp_path / "workloads.yaml")
    monkeypatch.setattr(enrol, "systemctl", made.systemctl)
    monkeypatch.setattr(enrol_systemd, "systemctl", made.systemctl)
    monkeypatch.setattr(enrol, "need_root", lambda: None)
    monkeypatch.setattr(enrol, "await_workload", lambda *_: "")
    agent, server = serve(tmp_path / "agent.sock")
    agent.on("GET /v1/status", {"node": "n1", "workloads": []})
    chosen.agent, chosen.controller, chosen.lab = agent.url, None, None
    yield made
    chosen.agent = None
    server.shutdown()
    server.server_close()


def into(unit: str = "web.service", as_: str = "shop/web", **given: Any) -> None:
    enrol.enrol(
        unit,
        **{
            "as_": as_,
            "port": [8080],
            "label_": None,
            "name": None,
            "force": False,
            "allow_dbus": False,
            "restart": True,
            **given,
        },
    )


def test_a_service_gets_a_slice_that_is_its_workload(host: Host) -> None:
    into()
    entry = host.entries()[0]
    assert entry["cgroup"].endswith("/pillion.slice/pillion-workloads.slice/pillion-workloads-web.slice")
    assert (entry["namespace"], entry["name"], entry["serviceAccount"], entry["unit"]) == ("shop", "web-n1", "web", "web.service")
    drop_in = host.files()["web.service.d/zz-pillion.conf"]
    for line in (
        "Slice=pillion-workloads-web.slice", "After=pillion-agent.service run-pillion-bpf.mount", "Wants=pillion-agent.service",
        "ProtectControlGroups=yes", "NoNewPrivileges=yes",
    ):  # fmt: skip
        assert f"{line}\n" in drop_in
    assert "pillion.awaiting shop/web-n1" in drop_in and "Requires=" not in drop_in


def test_systemd_reads_the_drop_ins(host: Host, tmp_path: Path) -> None:
    """No line that systemd would ignore with a warning."""
    host.units["web.service"]["TriggeredBy"] = "web.socket"
    into()
    units = tmp_path / "units"
    (units / "web.service").write_text("[Service]\nExecStart=/bin/true\nUser=daemon\n")
    (units / "web.socket").write_text("[Socket]\nListenStream=8080\n")
    (units / "pillion-agent.service").write_text("[Service]\nExecStart=/bin/true\n")
    (units / drop_in.PINS).write_text((PROJECT / "deploy/systemd" / drop_in.PINS).read_text())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "web.service", "web.socket", "pillion-workloads-web.slice"],
        env={"SYSTEMD_UNIT_PATH": f"{units}:", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if "pillion" in line or "web." in line], done.stderr


def test_its_sockets_go_with_it(host: Host) -> None:
    host.units["web.service"]["TriggeredBy"] = "web.socket web.timer"
    into()
    drop_in = host.files()["web.socket.d/zz-pillion.conf"]
    assert "Slice=pillion-workloads-web.slice\n" in drop_in and "ExecStartPre=+" in drop_in
    assert "DefaultDependencies=no" in drop_in, "sockets.target comes before every service, the agent as well"
    assert "web.timer.d/zz-pillion.conf" not in host.files()


def test_its_sockets_go_with_it_before_systemd_has_loaded_them(host: Host) -> None:
    """TriggeredBy= is empty until then, and the listener would be made outside the mesh."""
    host.sockets = {"front.socket": "web.service", "other.socket": "other.service", "web@.socket": "web@.service"}
    into()
    assert "Slice=pillion-workloads-web.slice\n" in host.files()["front.socket.d/zz-pillion.conf"]
    assert not [path for path in host.files() if path.startswith(("other", "web@"))]


def test_twice_is_once(host: Host) -> None:
    into()
    files, entries = host.files(), host.entries()
    into()
    assert (host.files(), host.entries()) == (files, entries)


def test_withdrawn_without_a_trace(host: Host) -> None:
    host.units["web.service"]["TriggeredBy"] = "web.socket"
    into()
    enrol.withdraw("web.service", all_=False, restart=True)
    assert host.files() == {} and host.entries() == []
    assert not list((host.root / "units").iterdir())


def test_the_operators_own_drop_ins_stay(host: Host) -> None:
    own = host.root / "units" / "web.service.d" / "override.conf"
    own.parent.mkdir()
    own.write_text("[Service]\nNice=5\n")
    into()
    enrol.withdraw(None, all_=True, restart=True)
    assert host.files() == {"web.service.d/override.conf": "[Service]\nNice=5\n"}


def test_a_running_service_is_stopped_before_it_is_started_elsewhere(host: Host) -> None:
    host.units["web.service"]["ActiveState"] = "active"
    into()
    assert host.asked[-2:] == [("stop", "web.service"), ("start", "web.service")]


@pytest.mark.parametrize("user", ["web", ""])
def test_no_service_manager_can_be_asked(host: Host, user: str) -> None:
    """Neither the system's, nor the user's own, which logind starts for whoever asks by D-Bus (polkit's set-self-linger)."""
    host.units["web.service"]["User"] = user
    into(force=True)
    drop_in = host.files()["web.service.d/zz-pillion.conf"].splitlines()
    lines = [line.partition("=")[2].split() for line in drop_in if line.startswith("InaccessiblePaths=")]
    assert {path.lstrip("-") for line in lines for path in line} == {
        "/run/pillion",
        "/run/systemd/private",
        "/run/dbus/system_bus_socket",
        "/run/user",
    }


@pytest.mark.parametrize("shown", ["-{0}", "-{0}:{0}", "-{0}:{0}:rbind"])
def test_resolv_conf_is_bound_back_however_it_is_shown(host: Host, monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    into()
    text = host.files()["web.service.d/zz-pillion.conf"]
    real = host.drop_ins
    confs = [path.lstrip("-") for path in drop_in.CONFS.split()]

    def undone(paths: list[str]) -> list[str]:
        seen = {"BindReadOnlyPaths": " ".join(["/other:/other:rbind", *(shown.format(path) for path in paths)])}
        monkeypatch.setattr(host, "drop_ins", lambda unit: {**real(unit), **seen})
        return enrol_systemd.undone("web.service", text)

    assert undone(confs) == []
    assert undone(confs[:1]) == undone(confs[1:]) == ["BindReadOnlyPaths="]


@pytest.mark.parametrize("path", node_facts.RESOLVERS)
def test_whoever_resolves_is_hidden_with_the_folder(path: str) -> None:
    """And the folders are audited."""
    folders = [word.removesuffix(":ro") for word in drop_in.RESOLVERS.split()]
    assert [Path(path).is_relative_to(folder) for folder in folders].count(True) == 1
    assert len(folders) == len(node_facts.RESOLVERS)


def hidden(host: Host) -> set[str]:
    lines = [line.partition("=") for line in host.files()["web.service.d/zz-pillion.conf"].splitlines()]
    return {path.lstrip("-") for name, _, paths in lines if name == "InaccessiblePaths" for path in paths.split()}


@pytest.mark.parametrize("kind", ["simple", "dbus"])
def test_dbus_where_it_is_allowed_and_what_that_opens(host: Host, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The system's bus alone, told each time; enrolled again without, it is closed again."""
    host.units["web.service"]["Type"] = kind
    into(allow_dbus=True)
    assert hidden(host) == {"/run/pillion", "/run/systemd/private", "/run/user"}
    assert "web.service may ask for programs outside the mesh by D-Bus" in capsys.readouterr().err
    if kind == "dbus":
        with pytest.raises(CliError, match="serves on D-Bus") as refused:
            into()
        assert "--allow-dbus" in refused.value.remedy
    else:
        into()
        assert "/run/dbus/system_bus_socket" in hidden(host) and not capsys.readouterr().err


def test_a_user_has_one_identity(host: Host) -> None:
    host.units["api.service"] = dict(KNOWN)
    into()
    with pytest.raises(CliError, match=r"shares the user web with web\.service"):
        into("api.service", "shop/api")
    into("api.service", "shop/web")


@pytest.mark.parametrize(("one", "other"), [("daemon", "1"), ("1", "daemon")])
def test_a_user_has_one_identity_whatever_it_is_called(host: Host, one: str, other: str) -> None:
    host.units["web.service"]["User"] = one
    host.units["api.service"] = {**KNOWN, "User": other}
    into()
    with pytest.raises(CliError, match=r"shares the user daemon with web\.service"):
        into("api.service", "shop/api")


@pytest.mark.parametrize(
    ("unit", "change", "word"),
    [
        ("gone.service", {}, "not-found"),
        ("systemd-journald.service", {"LoadState": "loaded"}, "belongs to the system"),
        ("pillion-agent.service", {"LoadState": "loaded"}, "belongs to the system"),
        ("web.service", {"PrivateNetwork": "yes"}, "network of its own"),
        ("web.service", {"Delegate": "yes"}, "manages cgroups itself"),
        ("web.service", {"Type": "dbus"}, "serves on D-Bus"),
        ("web.socket", {}, "is no service"),
    ],
)
def test_what_can_be_no_workload(host: Host, unit: str, change: dict[str, str], word: str) -> None:
    if change:
        host.units[unit] = {**KNOWN, **change}
    with pytest.raises(CliError, match=word):
        into(unit, force=True)


@pytest.mark.parametrize("name", ["web", "shop-front", "web@1", ".dot", "a:b", "käse"])
def test_slices_are_escaped_as_systemd_does(name: str) -> None:
    done = subprocess.run(["systemd-escape", "--", name], capture_output=True, text=True, check=True)
    assert drop_in.slice_of(f"{name}.service") == f"pillion-workloads-{done.stdout.strip()}.slice"


def test_awaiting_wants_the_cgroup_of_now(tmp_path: Path) -> None:
    """A status of before the unit's restart, about a cgroup that is gone, is not enough."""
    agent, server = serve(tmp_path / "a.sock")
    try:
        client = awaiting.Client(agent.url)
        row = {"namespace": "shop", "name": "web", "cgroup": str(tmp_path), "cgroup_id": tmp_path.stat().st_ino, "detail": ""}

        def asked(**change: Any) -> str:
            agent.on("GET /v1/status", {"workloads": [{**row, **change}]})
            return awaiting.await_workload(client, "shop", "web", 0.0)

        assert asked() == ""
        assert asked(cgroup_id=1) == "the agent knows an older cgroup of it"
        assert asked(detail="no certificate") == "no certificate"
        assert asked(name="other") == "the agent does not know it"
    finally:
        server.shutdown()
        server.server_close()
    assert "does not answer" in awaiting.await_workload(awaiting.Client(f"unix://{tmp_path}/none"), "shop", "web", 0.0)


def test_systemd_may_take_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To read all unit files takes it more than the bus's 25 s where processors are slow."""
    program = tmp_path / "systemctl"
    program.write_text('#!/bin/sh\necho "$SYSTEMD_BUS_TIMEOUT $*"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert enrol_systemd.systemctl("list-unit-files") == "120s list-unit-files\n"
