"""A mesh of two machines on two kernels, put there by deploy/install.sh alone: services across them, an intruder, a second
install, every unit restarted and killed under load, an upgrade, a reboot, and nothing left after --remove. The tests are the
steps, in this order. What they record goes into docs/kernels.md."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from lab.pace import SLOW
from lab.state import LabError
from lab.vm import Kind, VmHandle, VmLab, hosts, stage
from lab.vm.kernels import CACHE
from lab.vm.qemu import accelerator
from tests.conftest import SESSION
from tests.deploy import shop
from tests.kernels import load

KERNELS = os.environ.get("PILLION_HOSTS", "6.1,6.12").split(",")
# A VM lab that stays, and whose machines are taken as they are when they run: to mend one step without those before it
KEPT = os.environ.get("PILLION_HOSTS_LAB", "")
LIMIT_S = int(7200 * SLOW)
CPUS = 2  # what a restart or an install takes is not taken from the load
pytestmark = pytest.mark.timeout(LIMIT_S)
SECRET = "the-answer-of-web"
Record = Callable[[str, object], None]
Machines = tuple[VmHandle, VmHandle]

# A program outside the mesh that tries from the first second of a boot: a line for each try, with the second since boot
EAGER = """[Unit]
DefaultDependencies=no
[Service]
ExecStart=/bin/sh -c 'while :; do read now _ </proc/uptime; for to in {to}; do \\
  echo "$$now $$(curl -s -m 2 http://$$to/ || echo no)"; done >>/srv/eager.log; sleep 0.2; done'
[Install]
WantedBy=sysinit.target
"""
# One of the mesh, in each boot as early as it may: policy denies it
INTRUDER = """[Service]
DynamicUser=yes
ExecStart=/bin/sh -c 'while :; do read now _ </proc/uptime; \\
  echo "$$now $$(curl -s -m 2 http://{outside}:9090/ || echo no) $$(curl -s -m 5 http://web.shop.mesh/ || echo no)"; \\
  sleep 0.2; done'
StandardOutput=append:/srv/intruder.log
[Install]
WantedBy=multi-user.target
"""


@pytest.fixture(scope="module")
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    lab = VmLab(KEPT or f"{SESSION}h", print)
    try:
        running = {name: vm for name, vm in lab.vms.items() if vm.running}
        made = [
            running.get(name) or lab.start(name, kernel, kind=Kind.MACHINE, cpus=CPUS, limit_s=LIMIT_S, wait=False)
            for name, kernel in zip(("n1", "n2"), (KERNELS * 2)[:2], strict=True)
        ]
        if not running:
            at_once(prepare, *made)
        yield made[0], made[1]
    finally:
        if request.session.testsfailed:
            keep_journals(lab)
        if not KEPT:
            lab.down()


def keep_journals(lab: VmLab) -> None:
    for name, vm in lab.vms.items():
        with suppress(LabError, OSError, subprocess.TimeoutExpired):
            said = vm.run(["journalctl", "-n", "4000", "--no-pager", "-o", "short-monotonic"], timeout=300)
            (CACHE / "logs" / f"{name}.journal").write_text(said.stdout)


def prepare(vm: VmHandle) -> None:
    vm.ready(600)
    hosts.prepare(vm, print)
    if accelerator() == "tcg":
        stage.compile_for_machine(vm, hosts.RELEASE, hosts.WHEELS)


def at_once(work: Callable[[VmHandle], object], *machines: VmHandle) -> list[object]:
    """On each machine; what came of it."""
    with ThreadPoolExecutor(len(machines)) as pool:
        return list(pool.map(work, machines))


def until(done: Callable[[], object], what: Callable[[], str], seconds: float) -> float:
    """How long it took."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < seconds, f"not within {seconds:.0f} s: {what()}"
        time.sleep(1)
    return time.monotonic() - began


def ask(vm: VmHandle, account: str) -> str:
    """What a program of the mesh gets from web: the body, or curl's code and the status."""
    curl = ["curl", "-s", "-m", "20", "-w", " %{http_code}", "http://web.shop.mesh/"]
    done = vm.run(["pillion", "run", "-n", "shop", "--service", account, "--", *curl], timeout=180)
    return f"{done.returncode} {done.stdout} {done.stderr}"


def shown(vm: VmHandle, unit: str, what: str) -> str:
    return vm.run(["systemctl", "show", "-P", what, unit], check=True, timeout=120).stdout.strip()


def ready(vm: VmHandle, *units: str) -> float:
    """Until these are, by default those of a node."""
    units = units or ("pillion-agent", "pillion-proxy")
    return until(lambda: vm.active(*units), lambda: f"{vm.name}: {units}\n{hosts.logs(vm, units[0])}", 600)


def test_install(machines: Machines, record_property: Record) -> None:
    first, second = machines
    record_property("fact: machines", f"{first.name} on {first.release} (and the controller), {second.name} on {second.release}")
    if accelerator() == "tcg":
        text = "in emulation: what the agents' loaders would have compiled there was compiled beforehand, from the same text"
        record_property("fact: the machines run", text)
    assert "done: controller" in hosts.install_controller(first)
    first.put("/srv/mesh.yaml", shop.resources(vm.name for vm in machines).encode())
    first.run(["pillion", "apply", "-f", "/srv/mesh.yaml"], check=True, timeout=120)
    said = at_once(lambda vm: hosts.install_node(vm, first), *machines)
    assert all("done: node" in str(each) for each in said), said
    for vm in machines:
        ready(vm)


def test_enrol(machines: Machines) -> None:
    shop.serve(machines[1], SECRET)


def test_a_second_install_changes_nothing(machines: Machines) -> None:
    assert "nothing to do" in hosts.install(machines[0], "controller")
    for vm in machines:
        assert "nothing to do" in hosts.install(vm, "node")


def test_services_meet_across_the_kernels(machines: Machines) -> None:
    for vm in machines:
        assert SECRET in ask(vm, "client")


def test_others_do_not(machines: Machines) -> None:
    first, second = machines
    for vm in (first, second):
        answer = ask(vm, "intruder")
        assert SECRET not in answer and "403" in answer
        plain = vm.run(["curl", "-s", "-m", "5", f"http://{second.addresses[0]}:8080/"], timeout=60)
        assert plain.returncode != 0 and SECRET not in plain.stdout


def test_the_load_runs_and_the_kernel_carries_its_part(machines: Machines, record_property: Record) -> None:
    for vm in machines:
        load.start(vm)
    for vm in machines:
        until(lambda vm=vm: load.goes(vm, 40), lambda vm=vm: f"load on {vm.name}: {load.counts(vm)}", 300)  # type: ignore[misc]  # bound now
    second = machines[1]
    assert shop.express(second)["on"], shop.express(second)
    until(lambda: carries(second), lambda: f"the kernel carries nothing: {shop.express(second)}", 300)
    found = shop.express(second)
    record_property("fact: express on n2", f"{found['pairs']} pairs, {found['carried']['requests']} requests carried")


def carries(vm: VmHandle) -> bool:
    """Whether express has a pair and requests."""
    found = shop.express(vm)
    return bool(found["pairs"] >= 1 and found["carried"]["requests"] > 0)


KERNELS_OWN = ("within, http paired", "within, tcp keep", "within, tcp fresh")  # no process of the mesh carries those
# event -> (machine, unit, command, whether it is planned)
EVENTS = {
    "restart of the controller (n1)": (0, "pillion-controller", ["systemctl", "restart", "pillion-controller"], True),
    "restart of the proxy": (1, "pillion-proxy", ["systemctl", "restart", "pillion-proxy"], True),
    "restart of the agent": (1, "pillion-agent", ["systemctl", "restart", "pillion-agent"], True),
    "kill -9 of the controller (n1)": (0, "pillion-controller", ["systemctl", "kill", "-s", "KILL", "pillion-controller"], True),
    "kill -9 of the proxy": (1, "pillion-proxy", ["systemctl", "kill", "-s", "KILL", "pillion-proxy"], False),
    "kill -9 of the agent": (1, "pillion-agent", ["systemctl", "kill", "-s", "KILL", "pillion-agent"], False),
}


def judged(event: str, lost: load.Losses, planned: bool, record_property: Record) -> None:
    """Native and paired connections lose nothing; what goes through user space loses nothing where it was planned."""
    record_property(f"load: {event}", lost.recorded())
    print(event, lost)
    never = lost.kinds if planned else KERNELS_OWN
    failed = {kind: lost.of(kind) for kind in never if lost.of(kind)}
    assert not failed, failed


@pytest.mark.parametrize("event", EVENTS)
def test_under_load(machines: Machines, event: str, record_property: Record) -> None:
    number, unit, command, planned = EVENTS[event]
    vm = machines[number]
    if not planned:  # only what the kernel carries by then outlives a proxy; those of n1 cross, and are never paired
        paired = sum(kind in ("keep", "paired") and url == shop.WEB for url, kind, _ in load.ASKED)
        until(lambda: shop.express(machines[1])["pairs"] >= paired, lambda: f"pairs: {shop.express(machines[1])}", 300)

    def act() -> None:
        old = shown(vm, unit, "InvocationID")
        vm.run(command, check=True, timeout=300)
        until(lambda: shown(vm, unit, "InvocationID") != old and vm.active(unit), lambda: hosts.logs(vm, unit), 300)

    judged(event, load.during(machines, act), planned, record_property)


def test_an_upgrade_under_load(machines: Machines, record_property: Record) -> None:
    vm = machines[1]
    before = vm.run(["readlink", "/opt/pillion/current"], check=True).stdout
    event = "upgrade of the package"

    def act() -> None:
        assert "restarted pillion-proxy.service" in hosts.upgrade(vm)
        ready(vm)

    lost = load.during(machines, act)
    assert vm.run(["readlink", "/opt/pillion/current"], check=True).stdout != before
    judged(event, lost, True, record_property)


def test_a_reboot_leaves_all_whole_and_opens_nothing(machines: Machines, record_property: Record) -> None:
    """From the first second of the boot three try what policy denies: on this machine and on the other, outside the mesh; and
    a workload of this one, towards another's web and towards what is outside the mesh."""
    first, second = machines
    address = f"{second.addresses[0]}:8080"
    first.put("/etc/systemd/system/eager.service", EAGER.format(to=address).encode())
    second.put("/etc/systemd/system/eager.service", EAGER.format(to=f"{address} 127.0.0.1:8080").encode())
    first.run(["sh", "-c", "echo outside-was-reached >/srv/index.html"], check=True)
    outside = ["python3", "-m", "http.server", "--directory", "/srv", "--bind", first.addresses[0], "9090"]
    first.run(["systemd-run", "-q", "--unit=outside", *outside], check=True, timeout=120)
    first.run(["systemctl", "start", "eager"], check=True, timeout=120)
    control = ["curl", "-s", "-m", "20", f"http://{first.addresses[0]}:9090/"]
    until(lambda: "outside-was-reached" in second.run(control, timeout=60).stdout, lambda: "what is outside is there", 120)
    second.run(["systemctl", "enable", "eager"], check=True, timeout=120)
    shop.enrol(second, "intruder", INTRUDER.format(outside=first.addresses[0]))

    def act() -> None:
        second.reboot(900)
        ready(second)
        until(lambda: second.active("web", "echo", "intruder"), lambda: hosts.logs(second, "web"), 300)

    lost = load.during((first,), act, 600)
    record_property("load: reboot", lost.recorded())
    until(lambda: SECRET in ask(first, "client"), lambda: "web answers again", 300)
    load.start(second)
    until(lambda: load.goes(second), lambda: f"load on n2: {load.counts(second)}", 300)
    at_ready = int(shown(second, "pillion-agent", "ActiveEnterTimestampMonotonic")) / 1e6
    for vm in machines:
        tries = vm.run(["cat", "/srv/eager.log"], check=True, timeout=120).stdout
        assert tries and SECRET not in tries, tries[:2000]
    early = [float(line.split()[0]) for line in tries.splitlines()]
    assert early[0] < at_ready and sum(when < at_ready for when in early) > 10, (early[:20], at_ready)
    said = second.run(["cat", "/srv/intruder.log"], check=True, timeout=120).stdout
    assert "no" in said and SECRET not in said and "outside-was-reached" not in said, said[:2000]
    before = sum(when < at_ready for when in early)
    text = f"the agent was ready {at_ready:.0f} s after the kernel began; a program outside the mesh tried from second"
    record_property("fact: reboot of n2", f"{text} {early[0]:.1f} on, {before} times before that, and was never answered")


def test_removed_is_removed(machines: Machines) -> None:
    first, second = machines
    for vm in machines:
        vm.run(["systemctl", "stop", "load", "eager", "outside", "web", "echo", "intruder"], timeout=300)
    for vm, role in ((second, "node"), (first, "node"), (first, "controller")):
        hosts.install(vm, role, "--remove")
    for vm in machines:
        left = "ls -d /opt/pillion /etc/pillion /var/lib/pillion* /run/pillion /run/pillion-* /sys/fs/cgroup/pillion* 2>/dev/null"
        found = vm.run(
            ["sh", "-c", f"{left} | grep -v pillion-vm; getent passwd | grep pillion; systemctl list-units -a 'pillion*'"]
        )
        names = [line for line in found.stdout.splitlines() if "pillion" in line and "pillion-vm" not in line]
        assert not names, names
