"""check --security: facts from a /proc of our making, findings from facts, and the command's exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.model import Action, Config, OutboundAllow, Policy, State, TlsMode, Workload
from pillion import node_facts, security
from pillion.findings import INITIAL_USER_NAMESPACE, Finding, Verdict, judge
from pillion.node_facts import CAPABILITY_SETS, Facts, Mode, Process
from tests.pillion.conftest import Fake

NONE = dict.fromkeys(CAPABILITY_SETS, 0)
PROXY = Process(20, 64077, NONE, True, 2, False, "/mesh/n1/proxy", ("lo",), INITIAL_USER_NAMESPACE, True)
AGENT = Process(10, 0, dict.fromkeys(CAPABILITY_SETS, 0x1FF), False, 0, None, "/mesh/n1/agent", ("lo", "eth0"), None, True)
WEB = Process(30, 1000, NONE, False, 0, True, "/mesh/n1/workloads/web", ("lo", "eth0"), INITIAL_USER_NAMESPACE, True)
FACTS = Facts(
    AGENT,
    {20: PROXY},
    {"shop/web": [WEB]},
    {"shop/web": Mode("/cg/web", 0, 0o755, "directory")},
    {"bpffs": Mode("/run/bpf", 0, 0o700, "directory", True), "agent's socket": Mode("/run/agent.sock", 0, 0o600, "socket")},
    {"connect4": True},
    {"kernel.unprivileged_bpf_disabled": "2"},
)
STATUS: dict[str, Any] = {
    "node": "n1",
    "ready": True,
    "revision": 7,
    "programs": {"connect4": True},
    "controller": {"connected": True},
    "optional": {part: {"on": part != "express", "why": "", "instead": ""} for part in ("pods", "ending", "express")},
    "moves": {"process_moved_out": 0, "process_moved_between": 0, "strays": []},
    "policy_age_s": 1.0,
    "policy_lease_s": 60.0,
    "workloads": [
        {"namespace": "shop", "name": "web", "spiffe": "spiffe://m/ns/shop/sa/web", "svid": {"not_after": time.time() + 86_400}}
    ],
}
STATE: State = {
    "Config//mesh": Config("mesh.local"),
    "Workload/shop/web": Workload(300, "web", "shop", "n1", 256, "spiffe://m/ns/shop/sa/web"),
    "Workload/shop/far": Workload(301, "far", "shop", "n2", 256, "spiffe://m/ns/shop/sa/web", tls=TlsMode.PERMISSIVE),
}


def found(facts: Facts = FACTS, status: dict[str, Any] = STATUS, state: State | None = STATE) -> dict[str, Finding]:
    return {finding.check: finding for finding in judge(facts, status, state)}


def fails(check: str, finding: dict[str, Finding]) -> str:
    """What is told of the one check that is not enforced."""
    assert [name for name, each in finding.items() if each.verdict is not Verdict.ENFORCED] == [check]
    assert finding[check].verdict is Verdict.NOT and finding[check].remedy
    return finding[check].seen


def test_a_node_that_keeps_every_promise() -> None:
    assert {finding.verdict for finding in found().values()} == {Verdict.ENFORCED}
    assert not any(finding.remedy for finding in found().values())


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("proxy user", {"uid": 0}),
        ("proxy capabilities", {"capabilities": NONE | {"CapBnd": 1 << 21}}),
        ("proxy no_new_privs", {"no_new_privileges": False}),
        ("proxy seccomp", {"seccomp": 0}),
        ("proxy network", {"interfaces": ("lo", "eth0")}),
        ("proxy memory", {"dumpable": True}),
        ("proxy cgroup", {"cgroup": "/mesh/n1/workloads/web"}),
    ],
)
def test_a_proxy_that_is_not_confined(check: str, change: dict[str, Any]) -> None:
    worker = replace(PROXY, pid=21, **change)
    assert "21" in fails(check, found(replace(FACTS, proxies={20: PROXY, 21: worker}))) or check == "proxy user"


def test_no_proxy_at_all() -> None:
    fails("proxy", found(replace(FACTS, proxies={})))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"capabilities": NONE | {"CapEff": 1 << 21}}, "SYS_ADMIN"),
        ({"uid": 0}, "cgroups it can write"),
    ],
)
def test_a_workload_that_could_leave_its_cgroup(change: dict[str, Any], word: str) -> None:
    assert word in fails("workloads confined", found(replace(FACTS, workloads={"shop/web": [replace(WEB, **change)]})))


@pytest.mark.parametrize(
    "change",
    [
        {"uid": 0, "cgroup_writable": False},  # ProtectControlGroups
        {"uid": 0, "capabilities": NONE | {"CapEff": 1 << 21}, "user_namespace": "user:[4026532000]"},
    ],
)
def test_root_that_can_not_leave(change: dict[str, Any]) -> None:
    assert (
        found(replace(FACTS, workloads={"shop/web": [replace(WEB, **change)]}))["workloads confined"].verdict is Verdict.ENFORCED
    )


def test_a_workload_that_reaches_a_service_manager() -> None:
    """As one does that was enrolled with --allow-dbus."""
    web = replace(WEB, managers=("/run/dbus/system_bus_socket",))
    told = fails("service managers", found(replace(FACTS, workloads={"shop/web": [web]})))
    assert told == "shop/web (pid 30) reaches /run/dbus/system_bus_socket"


def test_who_reaches_a_service_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the socket itself, as the process sees it: not where something lies over it, nor in a container's root."""
    private, bus = tmp_path / "private", tmp_path / "bus"
    for path in (private, bus):
        path.touch()
    monkeypatch.setattr(node_facts, "MANAGERS", (str(private), str(bus)))
    base = tmp_path / "proc/30"
    base.mkdir(parents=True)
    (base / "root").symlink_to("/")
    assert node_facts._managers(base, 0) == (str(private), str(bus))
    assert node_facts._managers(base, 1000) == (str(bus),)
    (base / "root").unlink()
    there = base / "root" / str(tmp_path).lstrip("/")
    there.mkdir(parents=True)
    assert node_facts._managers(base, 0) == ()
    (there / "private").hardlink_to(private)
    (there / "bus").touch()
    assert node_facts._managers(base, 0) == (str(private),)


def test_a_process_that_left_its_workload() -> None:
    stray = {"pid": 30, "workload": "shop/web", "into": "/user.slice/session-1.scope"}
    moves = {"process_moved_out": 1, "process_moved_between": 0, "strays": [stray]}
    told = fails("processes in place", found(status=STATUS | {"moves": moves}))
    assert told == "shop/web: pid 30 left it and is in /user.slice/session-1.scope"
    home = found(status=STATUS | {"moves": moves | {"strays": []}})["processes in place"]
    assert home.verdict is Verdict.ENFORCED and "1 moves" in home.seen
    old = {name: value for name, value in STATUS.items() if name != "moves"}
    assert found(status=old)["processes in place"].verdict is Verdict.UNKNOWN


def test_two_identities_under_one_user() -> None:
    db = {"namespace": "shop", "name": "db", "spiffe": "spiffe://m/ns/shop/sa/db", "svid": {"not_after": time.time() + 86_400}}
    facts = replace(FACTS, workloads={"shop/web": [WEB], "shop/db": [replace(WEB, pid=31)]})
    assert "1000" in fails("one user an identity", found(facts, STATUS | {"workloads": [*STATUS["workloads"], db]}))


def test_files_and_programs() -> None:
    loose = FACTS.files | {"agent's socket": Mode("/run/agent.sock", 0, 0o666, "socket")}
    assert "0666" in fails("sockets and state", found(replace(FACTS, files=loose)))
    plain = FACTS.files | {"bpffs": Mode("/run/bpf", 0, 0o1777, "directory", False)}
    seen = fails("bpffs", found(replace(FACTS, files=plain)))
    assert "no bpffs" in seen and "0777" in seen
    fails("workloads' cgroups", found(replace(FACTS, cgroups={"shop/web": Mode("/cg/web", 1000, 0o755, "directory")})))
    assert "connect4" in fails("programs", found(replace(FACTS, links={"connect4": False})))
    fails("unprivileged eBPF", found(replace(FACTS, sysctls={"kernel.unprivileged_bpf_disabled": "0"})))


def test_the_filter_on_a_pods_cable() -> None:
    pods = STATUS | {"workloads": [{**STATUS["workloads"][0], "netns": "/run/netns/web", "veth": "v1"}]}
    assert found(replace(FACTS, cables={"shop/web": True}), pods)["pods' cables"].verdict is Verdict.ENFORCED
    assert "shop/web" in fails("pods' cables", found(replace(FACTS, cables={"shop/web": False}), pods))
    assert found(FACTS, pods)["pods' cables"].verdict is Verdict.UNKNOWN


def test_the_kernel_is_asked_for_the_filter(netns: str) -> None:
    """With and without it, on an interface that is not there, and in a namespace that is not."""
    pid = int(subprocess.check_output(["ip", "netns", "pids", netns]).split()[0])
    assert node_facts.filtered(["lo"], pid) == {"lo": False}
    assert node_facts.filtered(["none"], pid) == {"none": False}
    assert node_facts.filtered(["lo"], 1 << 22) == {"lo": None}
    assert node_facts.filtered([], pid) == {}


@pytest.fixture
def netns() -> Iterator[str]:
    name = f"pl-{os.getpid()}-cable"
    subprocess.run(["ip", "netns", "add", name], check=True)
    held = subprocess.Popen(["ip", "netns", "exec", name, "sleep", "60"])
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        while not subprocess.check_output(["ip", "netns", "pids", name]).split():
            pass
        yield name
    finally:
        held.kill()
        held.wait()
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.parametrize(
    ("check", "status"),
    [
        ("agent", {"ready": False, "detail": "no state"}),
        ("agent", {"controller": {"connected": False}}),
        ("policy lease", {"policy_lease_s": 0}),
        ("policy age", {"policy_age_s": 61.0}),
        ("policy age", {"policy_age_s": None}),
        ("programs", {"programs": {"connect4": False}}),
        ("parts of the kernel", {"optional": {"ending": {"on": False, "why": "Operation not supported", "instead": "slower"}}}),
        ("certificates", {"workloads": [{**STATUS["workloads"][0], "svid": None}]}),
    ],
)
def test_what_the_agent_says(check: str, status: dict[str, Any]) -> None:
    fails(check, found(status=STATUS | status))


def test_policy() -> None:
    def with_config(**change: Any) -> dict[str, Finding]:
        return found(state=STATE | {"Config//mesh": Config("mesh.local", **change)})

    fails("defaultAction", with_config(default_action=Action.ALLOW))
    fails("outbound", with_config(outbound=Action.ALLOW))
    fails("outboundAllow", with_config(outbound_allow=(OutboundAllow("0.0.0.0/0"),)))
    here = Workload(300, "web", "shop", "n1", 256, "spiffe://m/ns/shop/sa/web", tls=TlsMode.PERMISSIVE)
    assert fails("mutual TLS", found(state=STATE | {"Workload/shop/web": here})) == "shop/web"
    dry = Policy("no", "shop", Action.AUDIT, dry_run=Action.DENY)
    assert fails("audit mode", found(state=STATE | {"Policy/shop/no": dry})) == "shop/no would DENY"


def test_what_can_not_be_seen_is_not_called_enforced() -> None:
    blind = Facts(
        None, {20: None}, {"shop/web": None}, {"shop/web": None}, {"bpffs": None, "agent's socket": None}, {"connect4": None}
    )
    verdicts = {name: finding.verdict for name, finding in found(blind, state=None).items()}
    assert Verdict.NOT not in verdicts.values()
    told = {name for name, verdict in verdicts.items() if verdict is Verdict.ENFORCED}
    assert told == {
        "policy lease",
        "policy age",
        "certificates",
        "pods' cables",
        "parts of the kernel",
        "processes in place",
    }  # of these the agent is the witness


def test_facts_of_a_process(tmp_path: Path) -> None:
    base = tmp_path / "77"
    (base / "net").mkdir(parents=True)
    (base / "ns").mkdir()
    lines = [
        "Name:\tx",
        "Uid:\t5\t6\t7\t8",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        *(f"{name}:\t00000000000000ff" for name in CAPABILITY_SETS),
    ]
    (base / "status").write_text("\n".join(lines))
    (base / "cgroup").write_text("5:cpu:/x\n0::/mesh/n1/proxy\n")
    (base / "net/dev").write_text("Inter-|\n face |\n    lo: 0 0\n  eth0: 0 0\n")
    (base / "environ").write_text("")
    os.symlink("user:[1]", base / "ns/user")
    mounts = "30 20 0:26 / /sys/fs/cgroup ro,nosuid shared:4 - cgroup2 cgroup2 rw\n31 20 0:27 / /x rw - tmpfs tmpfs rw\n"
    (base / "mountinfo").write_text(mounts)
    process = node_facts.process(77, tmp_path)
    assert process is not None
    assert (process.uid, process.seccomp, process.no_new_privileges) == (6, 2, True)
    assert process.capabilities == dict.fromkeys(CAPABILITY_SETS, 0xFF)
    assert process.cgroup == "/mesh/n1/proxy" and process.interfaces == ("lo", "eth0")
    assert process.user_namespace == "user:[1]" and process.cgroup_writable is False
    assert process.dumpable is False  # root's files, another's process
    (base / "mountinfo").write_text(mounts.replace("ro,nosuid", "rw,nosuid"))
    again = node_facts.process(77, tmp_path)
    assert again is not None and again.cgroup_writable is True
    assert node_facts.process(78, tmp_path) is None
    (base / "status").write_text("Uid: what")
    assert node_facts.process(77, tmp_path) is None


def test_the_options_of_a_command_line(tmp_path: Path) -> None:
    (tmp_path / "5").mkdir()
    (tmp_path / "5/cmdline").write_bytes(b"python\0-m\0nodeagent\0--run-dir\0/run/x\0--bpf-dir=/b\0--flag\0")
    assert node_facts.arguments(5, tmp_path) == {"run-dir": "/run/x", "bpf-dir": "/b", "flag": ""}


def test_modes_are_shown_as_their_owner_sees_them(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o750)
    mode = node_facts.mode_of(tmp_path / "run", tmp_path)
    assert mode == Mode("/run", os.getuid(), 0o750, "directory", False)
    assert node_facts.mode_of(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (FACTS, 0),
        (replace(FACTS, sysctls={}), 2),
        (replace(FACTS, proxies={20: replace(PROXY, seccomp=0)}, sysctls={}), 1),
    ],
)
def test_exit_codes(
    facts: Facts, code: int, agent: Fake, cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(security, "gather", lambda *_: facts)
    agent.on("GET /v1/status", STATUS)
    agent.on("GET /v1/state", {"revision": 7, "items": {"Config//mesh": {"kind": "Config", "trust_domain": "mesh.local"}}})
    result = cli("--agent", agent.url, "check", "--security", "-o", "json")
    assert result.code == code
    report = {row["check"]: row for row in json.loads(result.out)}
    assert report["defaultAction"]["verdict"] == "enforced"
    assert (report["unprivileged eBPF"]["verdict"] == "could not tell") == (code != 0)


def test_an_agent_that_does_not_answer_is_no_verdict(tmp_path: Path, cli: Any) -> None:
    result = cli("--agent", f"unix://{tmp_path}/none.sock", "check", "--security")
    assert result.code == 2 and "could not tell" in result.out
