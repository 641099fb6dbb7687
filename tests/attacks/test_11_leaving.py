"""security.md 11: a service leaves its cgroup, or makes another process speak for it: by writing to cgroup files, by the service
manager, by tracing, by a cgroup of its own.

What an enrolment of a systemd service closes is attacked on a host with systemd, by services that run as root without
capabilities or as another's user. That host takes some ten seconds: only systemd itself shows what its sandbox keeps in.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.pace import SLOW
from lab.process import Place
from tests.attacks.actions import OnHost, address, dial
from tests.attacks.mutants import Counted, Mutant
from tests.attacks.systemd_host import CAPLESS_ROOT, GROUP, VICTIM, Host, Outcome
from tests.attacks.test_05_foreign_socket import NO_RECORD_NEEDED
from tests.e2e.mesh import HTTP_PORT, Mesh

WRITABLE_CGROUPS = Mutant(
    GROUP, "cgroups are read-only to a service", ("pillion/drop_in.py", '        "ProtectControlGroups=yes",\n', "")
)
MANAGER_AT_HAND = Mutant(
    GROUP,
    "services do not reach the service manager",
    (
        "pillion/drop_in.py",
        '        f"InaccessiblePaths={MANAGER_SOCKETS.removesuffix(BUS).strip() if allow_dbus else MANAGER_SOCKETS}",\n',
        "",
    ),
)
SHARED_USER = Mutant(
    GROUP,
    "one user an identity",
    ("pillion/enrol.py", '    elif other := users.get(known.get("User", "")):\n', "    elif other := '':\n"),
)
EXACT_CGROUP = Mutant(  # with NO_RECORD_NEEDED, or the next fence stops it
    NO_RECORD_NEEDED.group,
    "identity by the ancestors of the cgroup, none is a denial",
    ("bpf/common.h", "bpf_get_current_ancestor_cgroup_id(level);", "bpf_get_current_cgroup_id();"),
    ("bpf/common.h", "bpf_skb_ancestor_cgroup_id(skb, level);", "bpf_skb_cgroup_id(skb);"),
    ("bpf/create.c", "    reason = PL_R_UNKNOWN_CGROUP;\n    goto deny;\n", "    return 1;\n"),
    (
        "bpf/connect.c",
        "  if (!m)\n    return PL_R_UNKNOWN_CGROUP;\n  t->identity",
        "  if (!m)\n    return PL_R_COUNT;\n  t->identity",
    ),
    ("bpf/egress.c", "    reason = PL_R_UNKNOWN_CGROUP;\n", "    reason = PASS;\n"),
    ("bpf/ingress.c", "    reason = PL_R_UNKNOWN_CGROUP;\n", "    reason = PASS;\n"),
)


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.attack("capless root writes itself into another's cgroup")
def test_cgroups_can_not_be_written(host: Host, request: pytest.FixtureRequest) -> None:
    before = host.denied()
    out = host.attack("move", f"{VICTIM}/victim.service", *CAPLESS_ROOT)
    assert not out.refused and "Read-only file system" in out.error and out.status == "403"
    assert host.denied() > before
    request.node.user_properties.append(("reason", "policy_denied"))


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.red("capless root writes itself into another's cgroup", WRITABLE_CGROUPS)
def test_cgroups_are_written_without(host: Host) -> None:
    assert host.attack("move", f"{VICTIM}/victim.service", *CAPLESS_ROOT, code=host.without(WRITABLE_CGROUPS)) == Outcome(
        "", "", "200"
    )


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.attack("capless root asks the service manager")
def test_the_service_manager_is_out_of_reach(host: Host) -> None:
    out = host.attack("manager", Path(VICTIM).name, *CAPLESS_ROOT)
    assert not out.refused and out.error and out.status == "403"


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.red("capless root asks the service manager", MANAGER_AT_HAND)
def test_the_service_manager_starts_it_without(host: Host) -> None:
    code = host.without(MANAGER_AT_HAND)
    assert host.attack("manager", Path(VICTIM).name, *CAPLESS_ROOT, code=code) == Outcome("", "", "200")


def has_bus(host: Host) -> bool:
    return host.mesh.run(["test", "-S", "/run/dbus/system_bus_socket"]).returncode == 0


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.attack("root has a unit started outside the mesh")
def test_root_starts_no_unit_outside_the_mesh(host: Host) -> None:
    """With all that an enrolment leaves to root; and D-Bus, where it is allowed, is what the operator was warned of."""
    host.mesh.unit("elsewhere", "Type=oneshot", "ExecStart=/bin/true")
    out = host.attack("outside", "elsewhere.service")
    assert not out.refused and "private: " in out.error and "bus: " in out.error and out.status == "403"
    report = json.loads(host.pillion(None, "check", "--security", "-o", "json").stdout)
    (told,) = (row for row in report if row["check"] == "service managers")
    assert told["verdict"] == "enforced", told
    if has_bus(host):
        assert host.attack("outside", "elsewhere.service", more=("--allow-dbus",)) == Outcome("", "", "bus")


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.red("root has a unit started outside the mesh", MANAGER_AT_HAND)
def test_root_starts_a_unit_outside_the_mesh_without(host: Host) -> None:
    host.mesh.unit("elsewhere", "Type=oneshot", "ExecStart=/bin/true")
    out = host.attack("outside", "elsewhere.service", code=host.without(MANAGER_AT_HAND))
    assert out == Outcome("", "", "private bus" if has_bus(host) else "private")


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.attack("a service of the same user takes another's connection")
def test_a_user_is_one_identitys(host: Host) -> None:
    pid = host.answer("hold")["status"]
    out = host.attack("take", pid, "User=shopper")
    assert "shares the user shopper with victim.service" in out.refused
    out = host.attack("take", pid, "User=stranger")
    assert not out.refused and "Permission denied" in out.error and out.status == "403"


@pytest.mark.timeout(300 * SLOW)
@pytest.mark.red("a service of the same user takes another's connection", SHARED_USER)
def test_a_shared_user_takes_it_without(host: Host) -> None:
    pid = host.answer("hold")["status"]
    assert host.attack("take", pid, "User=shopper", code=host.without(SHARED_USER)) == Outcome("", "", "200")


def from_a_child(mesh: Mesh, name: str, family: str) -> str:
    """From a cgroup that the workload made below its own, two levels deep."""
    workload = mesh.w[name]
    child = workload.cgroup / "mine" / "deep"
    child.mkdir(parents=True)
    try:
        runner = OnHost(mesh, workload.node, name)
        runner.place = Place(child, workload.netns, workload.files / "resolv.conf")
        return dial(runner, address(mesh.w["web"], family), HTTP_PORT).answer
    finally:
        child.rmdir()
        child.parent.rmdir()


@pytest.mark.attack("a child cgroup")
@pytest.mark.parametrize("family", ["v4", "v6"])
def test_a_child_keeps_its_parents_identity(mesh: Mesh, counted: Counted, family: str) -> None:
    with counted(mesh, "n1", "policy_denied"):
        assert "web for" not in from_a_child(mesh, "intruder", family)
    assert "web for" in from_a_child(mesh, "client", family)


@pytest.mark.red("a child cgroup", EXACT_CGROUP)
def test_a_child_is_outside_the_mesh_without(broken: Mesh) -> None:
    assert "web for" in from_a_child(broken, "intruder", "v4")
