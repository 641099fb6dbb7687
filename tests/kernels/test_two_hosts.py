"""A mesh of two machines on two kernels, put there by deploy/install.sh alone: services across them, an intruder, what is
on the wire, a second install, a reboot, and nothing left after --remove. The tests are the steps, in this order."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from lab.vm import Kind, VmHandle, VmLab, hosts
from tests.conftest import SESSION

KERNELS = os.environ.get("PILLION_HOSTS", "6.1,6.12").split(",")
LIMIT_S = 5400
pytestmark = pytest.mark.timeout(LIMIT_S)
SECRET = "the-answer-of-web"
WEB = f"""[Service]
DynamicUser=yes
RuntimeDirectory=web
ExecStartPre=/bin/sh -c 'echo {SECRET} >/run/web/index.html'
ExecStart=/usr/bin/python3 -m http.server --bind :: --directory /run/web 8080
[Install]
WantedBy=multi-user.target
"""
# From the first second of a boot, and whatever happens: one line for each try
EAGER = """[Unit]
DefaultDependencies=no
[Service]
ExecStart=/bin/sh -c 'while :; do curl -s -m 2 http://10.78.0.12:8080/ && echo; sleep 0.2; done'
[Install]
WantedBy=sysinit.target
"""
RESOURCES = """
apiVersion: mesh.pillion.dev/v1alpha1
kind: NodeGrant
metadata: {name: n1}
spec: {node: n1, serviceAccounts: ["shop/*"]}
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: NodeGrant
metadata: {name: n2}
spec: {node: n2, serviceAccounts: ["shop/*"]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: main, port: 80, targetPort: 8080, appProtocol: http}]
---
apiVersion: mesh.pillion.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  action: ALLOW
  rules:
  - from: [{source: {principals: ["mesh.local/ns/shop/sa/client"]}}]
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[VmHandle, VmHandle]]:
    with VmLab(f"{SESSION}h", print) as lab:
        kernels = (KERNELS * 2)[:2]
        made = [
            lab.start(name, kernel, kind=Kind.MACHINE, limit_s=LIMIT_S, wait=False)
            for name, kernel in zip(("n1", "n2"), kernels, strict=True)
        ]
        for vm in made:
            vm.ready(600)
            hosts.prepare(vm, print)
        yield made[0], made[1]


def until(done: Callable[[], object], what: str, seconds: float) -> float:
    """How long it took."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < seconds, f"{what} within {seconds:.0f} s"
        time.sleep(1)
    return time.monotonic() - began


def ask(vm: VmHandle, account: str) -> str:
    """What a program of the mesh gets from web: the body, or curl's code and the status."""
    curl = ["curl", "-s", "-m", "20", "-w", " %{http_code}", "http://web.shop.mesh/"]
    done = vm.run(["pillion", "run", "-n", "shop", "--service", account, "--", *curl], timeout=180)
    return f"{done.returncode} {done.stdout} {done.stderr}"


def ready(vm: VmHandle) -> bool:
    return vm.run(["systemctl", "is-active", "pillion-agent", "pillion-proxy"], timeout=120).returncode == 0


def test_install(machines: tuple[VmHandle, VmHandle]) -> None:
    first, second = machines
    assert "done: controller" in hosts.install_controller(first)
    first.put("/srv/mesh.yaml", RESOURCES.encode())
    first.run(["pillion", "apply", "-f", "/srv/mesh.yaml"], check=True, timeout=120)
    for vm in machines:
        assert "done: node" in hosts.install_node(vm, first)
    for vm in machines:
        until(lambda vm=vm: ready(vm), f"{vm.name} is ready\n{hosts.logs(vm, 'pillion-agent')}", 300)  # type: ignore[misc]  # bound now
    second.put("/etc/systemd/system/web.service", WEB.encode())
    second.run(["systemctl", "enable", "--now", "web.service"], check=True, timeout=120)
    second.run(["pillion", "enrol", "web.service", "--as", "shop/web", "--port", "8080"], check=True, timeout=300)


def test_a_second_install_changes_nothing(machines: tuple[VmHandle, VmHandle]) -> None:
    assert "nothing to do" in hosts.install(machines[0], "controller")
    for vm in machines:
        assert "nothing to do" in hosts.install(vm, "node")


def test_services_meet_across_the_kernels(machines: tuple[VmHandle, VmHandle]) -> None:
    first, _ = machines
    assert SECRET in ask(first, "client")


def test_others_do_not(machines: tuple[VmHandle, VmHandle]) -> None:
    first, second = machines
    for vm in (first, second):
        answer = ask(vm, "intruder")
        assert SECRET not in answer and "403" in answer
    plain = first.run(["curl", "-s", "-m", "5", f"http://{second.addresses[0]}:8080/"], timeout=60)
    assert plain.returncode != 0 and SECRET not in plain.stdout


def test_a_reboot_leaves_all_whole_and_opens_nothing(machines: tuple[VmHandle, VmHandle]) -> None:
    first, second = machines
    first.put("/etc/systemd/system/eager.service", EAGER.encode())  # outside the mesh: never gets an answer
    first.run(["systemctl", "start", "eager.service"], check=True, timeout=120)
    second.reboot(900)
    took = until(lambda: ready(second), f"n2 is ready\n{hosts.logs(second, 'pillion-agent')}", 600)
    print(f"ready {took:.0f} s after the machine took commands")
    until(lambda: SECRET in ask(first, "client"), "web answers again", 300)
    assert SECRET not in first.run(["journalctl", "-u", "eager", "--no-pager"], timeout=120).stdout


def test_removed_is_removed(machines: tuple[VmHandle, VmHandle]) -> None:
    first, second = machines
    second.run(["systemctl", "disable", "--now", "web.service"], timeout=120)
    for vm, role in ((second, "node"), (first, "node"), (first, "controller")):
        hosts.install(vm, role, "--remove")
    for vm in machines:
        left = "ls -d /opt/pillion /etc/pillion /var/lib/pillion* /run/pillion /run/pillion-* /sys/fs/cgroup/pillion* 2>/dev/null"
        found = vm.run(
            ["sh", "-c", f"{left} | grep -v pillion-vm; getent passwd | grep pillion; systemctl list-units -a 'pillion*'"]
        )
        names = [line for line in found.stdout.splitlines() if "pillion" in line and "pillion-vm" not in line]
        assert not names, names
