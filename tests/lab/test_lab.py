"""The lab without a mesh: it comes up, it connects, and nothing of it is left, whatever happened in between."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab, LabError, cgroups, netns, state
from lab.cleanup import unmount_below
from lab.topology import NETNS_ROOT
from tests.conftest import SESSION


@pytest.fixture(scope="module")
def bare() -> Iterator[Lab]:
    lab = Lab(f"{SESSION}b").up(2, mesh=False)
    lab.add_workload("n1", "server", "shop", "web", {"app": "web"})
    lab.add_workload("n2", "client", "shop")
    yield lab
    lab.down()


def traces(lab: Lab) -> list[str]:
    """What of a lab exists on the machine."""
    found = [f"netns {name}" for name in netns.names(f"pl-{lab.name}-")]
    found += [str(path) for path in (lab.cgroup, lab.paths.base, state.lock_path(lab.name)) if path.exists()]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"/lab/{lab.name}/" in line]
    return found


LISTEN = """
import socket, sys
s = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)
print("listening", flush=True)
while True:
    c, a = s.accept()
    c.sendall(a[0].removeprefix("::ffff:").encode())
    c.close()
"""
DIAL = "import socket, sys; s = socket.create_connection((sys.argv[1], 8080), 5); print(s.recv(99).decode())"


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_workloads_reach_each_other_across_nodes(bare: Lab, family: int) -> None:
    server, client = bare.workloads["server"], bare.workloads["client"]
    process = server.start([sys.executable, "-c", LISTEN], f"listen{family}")
    try:
        while "listening" not in process.output():
            assert process.alive, process.output()
        seen = client.run([sys.executable, "-c", DIAL, server.addresses[family]])
        assert seen.stdout.strip() == client.addresses[family], seen.stderr
        host = bare.nodes["n1"].run([sys.executable, "-c", DIAL, server.addresses[family]])
        assert host.stdout.strip() == bare.nodes["n1"].addresses[family], host.stderr
    finally:
        process.kill()


def test_capture_sees_what_crosses_between_the_nodes(bare: Lab) -> None:
    server, client = bare.workloads["server"], bare.workloads["client"]
    process = server.start([sys.executable, "-c", LISTEN], "listenc")
    try:
        while "listening" not in process.output():
            assert process.alive, process.output()
        with bare.capture("n2") as seen:
            client.run([sys.executable, "-c", DIAL, server.address], check=True)
        assert seen.contains(client.address.encode()) >= 1  # the server's answer, in the clear
        assert not seen.full
    finally:
        process.kill()


def test_processes_are_in_their_cgroup_and_see_the_meshs_resolver(bare: Lab) -> None:
    seen = bare.workloads["server"].run(["cat", "/proc/self/cgroup", "/etc/resolv.conf"])
    assert f"0::/pillion-{bare.name}/n1/workloads/server\n" in seen.stdout
    assert "search shop.mesh mesh" in seen.stdout
    assert "shop.mesh" not in Path("/etc/resolv.conf").read_text()


def test_input_exit_codes_users_and_timeouts(bare: Lab) -> None:
    server = bare.workloads["server"]
    assert server.run(["cat"], input="abc").stdout == "abc"
    assert server.run(["sh", "-c", "exit 7"]).returncode == 7
    assert server.run(["id", "-u"], user="nobody").stdout.strip() == "65534"
    with pytest.raises(subprocess.TimeoutExpired):
        server.run(["sleep", "30"], timeout=0.2)
    server.kill()


def test_what_a_process_said_is_its_own_and_not_of_a_former_one_of_its_name(bare: Lab) -> None:
    server = bare.workloads["server"]
    said = []
    for text in ("ready", "later"):
        process = server.start(["echo", text], "twice")
        process.wait(10)
        said.append(process.output())
    assert said == ["ready\n", "later\n"]


def test_the_same_workload_again_is_the_one_there(bare: Lab) -> None:
    again = bare.add_workload("n1", "server", "shop", "web", {"app": "web"})
    assert again.addresses == bare.workloads["server"].addresses
    with pytest.raises(LabError, match="another workload"):
        bare.add_workload("n2", "server", "shop", "web")
    with pytest.raises(LabError, match="no node"):
        bare.add_workload("n9", "other")


def test_a_removed_workload_leaves_nothing_and_its_address_is_free(bare: Lab) -> None:
    first = bare.add_workload("n1", "short", "shop")
    first.start(["sleep", "1000"], "sleep")
    first.remove()
    first.remove()
    assert not first.cgroup.exists() and not first.netns.exists() and not first.files.exists()
    assert "short" not in bare.paths.workloads_file("n1").read_text()
    second = bare.add_workload("n1", "short2", "shop")
    assert second.addresses == first.addresses
    second.remove()


def test_the_host_is_untouched() -> None:
    def host() -> str:
        show = "ip -br addr; ip route show table all; ip -6 route show table all; cat /proc/sys/net/ipv4/ip_forward"
        text = subprocess.run(["sh", "-c", show], capture_output=True, text=True, check=True).stdout
        return re.sub(r"(expires|age) \d+\S*", "", text)  # these count down by themselves

    before = host()
    lab = Lab(f"{SESSION}h")
    try:
        lab.up(2, mesh=False)
        lab.add_workload("n1", "w")
        assert host() == before
    finally:
        lab.down()
    assert host() == before


def test_up_and_down_twice_and_each_again() -> None:
    lab = Lab(f"{SESSION}u")
    for _ in range(2):
        lab.up(2, mesh=False)
        lab.up(2, mesh=False)
        lab.add_workload("n2", "w").start(["sleep", "1000"])
        with pytest.raises(LabError, match="is up with"):
            lab.up(3, mesh=False)
        lab.down()
        lab.down()
        assert traces(lab) == []


def test_down_after_everything_was_killed() -> None:
    """A process brings a lab up, puts things in it and is killed in the middle of the next step."""
    lab = Lab(f"{SESSION}k")
    script = (
        f"import os, signal, threading; from lab import Lab; lab = Lab({lab.name!r}); lab.up(2, mesh=False);"
        "w = lab.add_workload('n1', 'w'); w.start(['sleep', '1000']); w.start(['sh', '-c', 'trap \"\" TERM; sleep 1000']);"
        "print('ready', flush=True);"
        "[lab.add_workload('n1', f'x{i}') for i in range(200)]"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    bpffs = lab.paths.base / "n1" / "bpf"
    bpffs.mkdir(parents=True)
    subprocess.run(["mount", "-t", "bpf", "bpf", str(bpffs)], check=True)
    threading.Timer(0.15, process.kill).start()
    process.wait()
    process.stdout.close()
    for pid in cgroups.pids(lab.cgroup / "n1" / "workloads" / "w"):
        os.kill(pid, signal.SIGKILL)
    lab.down()
    assert traces(lab) == []


def test_down_without_a_state_file() -> None:
    lab = Lab(f"{SESSION}s").up(1, mesh=False)
    lab.add_workload("n1", "w").start(["sleep", "1000"])
    lab.paths.state_file.unlink()
    lab.down()
    assert traces(lab) == []


def test_up_over_the_ruins_of_a_crashed_up() -> None:
    lab = Lab(f"{SESSION}r")
    netns.add(f"pl-{lab.name}-n1", {})
    (NETNS_ROOT / f"pl-{lab.name}-n2").touch()  # a name without a namespace, as a killed `ip netns add` leaves
    (lab.cgroup / "n1").mkdir(parents=True)
    try:
        lab.up(2, mesh=False)
    finally:
        lab.down()
    assert traces(lab) == []


def test_a_damaged_state_file_is_told_and_taken_down() -> None:
    lab = Lab(f"{SESSION}d").up(1, mesh=False)
    lab.paths.state_file.write_text("{")
    with pytest.raises(LabError, match="damaged"):
        lab.state()
    lab.down()
    assert traces(lab) == []


def test_unmount_below_leaves_neighbours_alone(tmp_path: Path) -> None:
    inside, beside = tmp_path / "a" / "x", tmp_path / "ab"
    for folder in (inside, beside):
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    try:
        unmount_below(tmp_path / "a")
        assert not inside.is_mount() and beside.is_mount()
    finally:
        subprocess.run(["umount", str(beside)], check=True)


def test_cgroup_mount_is_found_wherever_it_is() -> None:
    hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n41 31 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    assert cgroups.mount_point(hybrid) == Path("/sys/fs/cgroup/unified")
    assert cgroups.mount_point("30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 none rw\n") == Path("/sys/fs/cgroup")
    with pytest.raises(LabError, match="cgroup2"):
        cgroups.mount_point("1 1 0:1 / / rw - ext4 x rw\n")
