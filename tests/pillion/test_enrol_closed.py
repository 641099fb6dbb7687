"""An enrolment is in force, or it is refused; it is undone as a whole, whatever state it was left in."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from pillion import drop_in, enrol, enrol_files, enrolled
from pillion.errors import CliError
from pillion.findings import Verdict
from tests.deploy.test_enrol import KNOWN, Host, into
from tests.deploy.test_enrol import host as host

OURS = "web.service.d/zz-pillion.conf"
SLICE = "pillion-workloads-web.slice"
INSIDE = f"/pillion.slice/pillion-workloads.slice/{SLICE}"


def others(host: Host, path: str, *lines: str) -> Path:
    """A drop-in of somebody else's."""
    file = host.root / "units" / path
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join((f"[{'Socket' if '.socket' in path else 'Service'}]", *lines, "")))
    return file


def out(unit: str | None = "web.service", restart: bool = True) -> None:
    enrol.withdraw(unit, all_=unit is None, restart=restart)


def in_front(host: Host) -> None:
    """A socket unit, front.socket, of web.service."""
    host.sockets = {"front.socket": "web.service"}


# ---- in force, or refused


def test_what_an_operator_edits_does_not_undo_it(host: Host) -> None:
    """`systemctl edit` writes override.conf, and systemd sorts all drop-ins of a unit by name."""
    others(host, "web.service.d/override.conf", "Slice=own.slice", "NoNewPrivileges=no", "ExecCondition=", "InaccessiblePaths=")
    into()
    shown = host.drop_ins("web.service")
    assert (shown["Slice"], shown["NoNewPrivileges"]) == (SLICE, "yes")
    assert "pillion.awaiting shop/web-n1" in shown["ExecCondition"] and "/run/systemd/private" in shown["InaccessiblePaths"]


@pytest.mark.parametrize(
    "line",
    [
        "Slice=own.slice", "NoNewPrivileges=no", "ProtectControlGroups=no", "ExecCondition=", "RestrictNamespaces=net",
        "CapabilityBoundingSet=CAP_SYS_ADMIN", "InaccessiblePaths=", "ProtectKernelModules=no", "TemporaryFileSystem=",
        "BindReadOnlyPaths=",
    ],
)  # fmt: skip
def test_refused_where_another_has_the_last_word(host: Host, line: str) -> None:
    theirs = others(host, "web.service.d/zzz.conf", line)
    with pytest.raises(CliError, match=f"another drop-in of web.service undoes {line.partition('=')[0]}= of ours"):
        into(force=True)
    assert host.files() == {"web.service.d/zzz.conf": theirs.read_text()} and host.entries() == []
    assert host.asked[-1] == ("daemon-reload",)


@pytest.mark.parametrize("line", ["Slice=own.slice", "ExecStartPre=", "DefaultDependencies=yes"])
def test_refused_for_its_socket_too(host: Host, line: str) -> None:
    in_front(host)
    others(host, "front.socket.d/zzz.conf", line)
    with pytest.raises(CliError, match=r"another drop-in of front\.socket undoes"):
        into()
    assert set(host.files()) == {"front.socket.d/zzz.conf"}


def test_a_refusal_leaves_the_former_enrolment(host: Host) -> None:
    into()
    files, entries = host.files(), host.entries()
    theirs = others(host, "web.service.d/zzz.conf", "Slice=own.slice")
    with pytest.raises(CliError):
        into(as_="shop/other", allow_dbus=True)
    theirs.unlink()
    assert (host.files(), host.entries()) == (files, entries)


def test_interrupted_it_leaves_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(enrol, "write_workloads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        into()
    assert host.files() == {} and not list((host.root / "units").iterdir())


def test_a_unit_that_runs_elsewhere_is_told(host: Host) -> None:
    host.units["web.service"].update(ActiveState="active", ControlGroup="/own.slice/web.service")
    with pytest.raises(CliError, match=r"web\.service runs in /own\.slice/web\.service, outside the mesh"):
        into()


def test_what_an_earlier_version_wrote_is_replaced(host: Host) -> None:
    in_front(host)
    into()
    wanted = host.files()
    for path in (host.root / "units").glob("*.d/zz-pillion.conf"):
        path.rename(path.with_name("50-pillion.conf"))
    assert wanted != host.files()
    into()
    assert host.files() == wanted
    for path in (host.root / "units").glob("*.d/zz-pillion.conf"):
        path.rename(path.with_name("50-pillion.conf"))
    out()
    assert host.files() == {}


# ---- what is refused


def runs(setting: str, flags: str, path: str = "/bin/x") -> dict[str, str]:
    return {setting: f"{{ path={path} ; argv[]={path} a=b ; flags={flags} ; pid=0 }}"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"User": ""}, "runs as root"),
        ({"User": "root"}, "runs as root"),
        ({"AmbientCapabilities": "cap_net_bind_service cap_sys_admin"}, "CAP_SYS_ADMIN"),
        ({"AmbientCapabilities": "cap_setuid"}, "CAP_SETUID"),
        ({"AmbientCapabilities": "cap_setgid cap_chown"}, "CAP_CHOWN, CAP_SETGID"),
        ({"PAMName": "login"}, "opens a session"),
        (runs("ExecStartPreEx", "privileged"), r"ExecStartPre=\+/bin/x"),
        (runs("ExecStartEx", "ignore-failure no-setuid"), "ExecStart=!/bin/x"),
        (runs("ExecReloadEx", "privileged"), r"ExecReload=\+/bin/x"),
        (runs("ExecConditionEx", ""), "ExecCondition=/bin/x, which runs before"),
        ({"text": "[Service]\nPermissionsStartOnly = true\n"}, "PermissionsStartOnly=yes"),
    ],
)
def test_ways_out_are_refused_unless_forced(
    host: Host, change: dict[str, str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    host.units["web.service"].update(change)
    with pytest.raises(CliError, match=word):
        into()
    assert host.files() == {} and host.entries() == []
    into(force=True)
    told = capsys.readouterr().err.replace("\\", "")
    assert word.replace("\\", "") in told


def test_what_is_judged_is_what_will_run(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what systemd read before somebody edited the unit."""
    real = host.systemctl

    def reads(*arguments: str) -> str:
        if arguments == ("daemon-reload",):
            host.units["web.service"]["User"] = "root"
        return real(*arguments)

    monkeypatch.setattr(enrol, "systemctl", reads)
    with pytest.raises(CliError, match="runs as root"):
        into()


def test_what_runs_as_the_service_is_let_in(host: Host) -> None:
    """`!!` is root's only where the kernel has no ambient capabilities. And the second time our own step is there."""
    host.units["web.service"].update(runs("ExecStartPreEx", "ambient"), AmbientCapabilities="cap_net_bind_service")
    in_front(host)
    into()
    into()


def test_what_a_socket_unit_runs_is_refused(host: Host) -> None:
    """It is root's, and no line of the service's drop-in is for it."""
    in_front(host)
    host.units["front.socket"] = {"ExecStartPost": "{ path=/bin/x ; argv[]=/bin/x ; ignore_errors=no ; pid=0 }"}
    with pytest.raises(CliError, match=r"front\.socket with ExecStartPost=/bin/x"):
        into()


# ---- states


@pytest.mark.parametrize("state", ["activating", "reloading", "deactivating", "maintenance"])
def test_whoever_is_not_down_runs_outside(host: Host, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    host.units["web.service"]["ActiveState"] = state
    into(restart=False)
    assert "web.service runs outside the mesh until it is restarted" in capsys.readouterr().out
    into()
    assert ("stop", "web.service") in host.asked
    started = [words for words in host.asked if words[0] == "start" and "web.service" in words]
    if state == "deactivating":  # somebody wants it down
        assert not started and "web.service was stopping, and is down" in capsys.readouterr().out
    else:
        assert started == [("start", *(("--no-block",) if state == "activating" else ()), "web.service")]


def test_a_socket_comes_before_its_service(host: Host) -> None:
    """systemd refuses to start it once the service is starting, and it would start the service that is being stopped."""
    in_front(host)
    host.units["web.service"]["ActiveState"] = "active"
    host.units["front.socket"] = {"ActiveState": "active"}
    into()
    assert host.asked[-2:] == [(word, "front.socket", "web.service") for word in ("stop", "start")]
    out()
    assert host.asked[-1] == ("start", "front.socket", "web.service")


@pytest.mark.parametrize("state", ["activating", "reloading", "deactivating"])
def test_whoever_waits_for_the_agent_is_stopped(host: Host, state: str) -> None:
    into()
    host.units["web.service"]["ActiveState"] = state
    host.asked.clear()
    out()
    assert host.asked[:3] == [("stop", "web.service"), ("daemon-reload",), ("stop", SLICE)]


@pytest.mark.parametrize("state", ["inactive", "failed"])
def test_the_slice_of_who_is_down_goes(host: Host, state: str) -> None:
    into()
    host.units["web.service"]["ActiveState"] = state
    host.asked.clear()
    out(restart=False)
    assert host.asked == [("daemon-reload",), ("stop", SLICE)]


def test_who_may_run_on_keeps_the_slice(host: Host) -> None:
    """To stop it would be to stop him."""
    host.units["web.service"]["ActiveState"] = "active"
    into()
    host.asked.clear()
    out(restart=False)
    assert host.asked == [("daemon-reload",)]


# ---- undone as a whole


@pytest.mark.parametrize("left", [{OURS}, {"front.socket.d/zz-pillion.conf"}, {SLICE}, {"web.service.d/50-pillion.conf"}])
def test_all_of_them_is_what_is_written_not_what_is_entered(host: Host, left: set[str]) -> None:
    """As a crash left it: the unit would never start again without the mesh."""
    in_front(host)
    into()
    units = host.root / "units"
    (units / "web.service.d/50-pillion.conf").write_text((units / OURS).read_text())
    for path in host.files().keys() - left:
        (units / path).unlink()
    theirs = others(host, "db.service.d/zz-pillion.conf", "Nice=5")
    enrol_files.write_workloads([])
    out(None)
    assert set(host.files()) == {str(theirs.relative_to(units))}


def test_all_without_a_workloads_file(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    into()
    (host.root / "workloads.yaml").unlink()
    out(None)
    assert host.files() == {} and not (host.root / "workloads.yaml").exists()
    out(None)
    assert capsys.readouterr().out.endswith("web.service is out of the mesh\nnothing is enrolled here\n")


@pytest.mark.parametrize("unit", ["web.service", "shop-front@1.service", ".dot.service", "a\\x2db.service"])
def test_a_slice_names_its_unit(unit: str) -> None:
    assert drop_in.unit_of(drop_in.slice_of(unit)) == unit


# ---- two at once


def test_two_at_once_are_both_there(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["web", "api", "db", "mail"]
    for name in names:
        host.units[f"{name}.service"] = {**KNOWN, "User": name}
    into("mail.service", "shop/mail")
    apart, waiting = threading.Barrier(4), threading.Event()
    real = enrol.write_workloads

    def slowly(entries: list[dict[str, Any]]) -> None:
        waiting.wait(0.3)  # room for whoever read the same
        real(entries)

    monkeypatch.setattr(enrol, "write_workloads", slowly)
    failed = []

    def act(name: str) -> None:
        apart.wait()
        try:
            out("mail.service") if name == "mail" else into(f"{name}.service", f"shop/{name}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=act, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and {entry["unit"] for entry in host.entries()} == {"web.service", "api.service", "db.service"}
    assert not list(host.root.rglob(".*"))


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    enrol_files.write(path, "one")
    with pytest.raises(UnicodeEncodeError):
        enrol_files.write(path, "\udc80")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["one"]


# ---- later


@pytest.fixture
def judged(host: Host, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(enrolled, "SYSTEMD", host.root)
    return enrolled.enrolled


def test_check_security_has_them_in_force(host: Host, judged: Any) -> None:
    assert judged().verdict is Verdict.ENFORCED
    in_front(host)
    into()
    host.units["web.service"].update(ActiveState="active", ControlGroup=f"{INSIDE}/web.service")
    assert (judged().verdict, judged().seen) == (Verdict.ENFORCED, "1, as they were enrolled")
    into(allow_dbus=True)
    assert judged().verdict is Verdict.ENFORCED


def test_check_security_tells_who_runs_outside(host: Host, judged: Any) -> None:
    into()
    host.units["web.service"].update(ActiveState="active", ControlGroup="/system.slice/web.service")
    assert judged().verdict is Verdict.NOT and judged().remedy
    assert "web.service runs in /system.slice/web.service, outside the mesh" in judged().seen


@pytest.mark.parametrize("line", ["Slice=own.slice", "NoNewPrivileges=no", "ExecCondition="])
def test_check_security_tells_what_was_undone_since(host: Host, judged: Any, line: str) -> None:
    in_front(host)
    into()
    others(host, "web.service.d/zzz.conf", line)
    assert judged().seen == f"web.service is without {line.partition('=')[0]}= of its enrolment"


def test_check_security_tells_of_a_socket_that_came_later(host: Host, judged: Any) -> None:
    into()
    in_front(host)
    assert judged().verdict is Verdict.NOT and "front.socket is without " in judged().seen and "Slice=" in judged().seen


def test_check_security_says_what_it_can_not_tell(host: Host, judged: Any) -> None:
    (host.root / "workloads.yaml").write_text("{")
    assert judged().verdict is Verdict.UNKNOWN
    (host.root / "workloads.yaml").write_text(
        yaml.safe_dump({"workloads": [{"unit": "gone.service", "namespace": "a", "name": "b"}]})
    )
    assert judged().verdict is Verdict.ENFORCED
