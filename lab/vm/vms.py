"""The VM lab: VMs by name, on a network of their own, in a cgroup that `down` can end whatever happened.

    with VmLab("mine") as lab:
        vm = lab.start("old", "6.1")
        vm.run(["uname", "-r"]).stdout

Files are in /run/pillion/vm/<lab>/<vm>: console.log, qemu.log, the channel's sockets; `exit` once QEMU has ended. Disks are
in the cache, for /run may be memory.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from lab import cgroups, process
from lab.state import CHECKOUT, LabError, remove_empty, write_atomic
from lab.vm import initrd, kernels, stage
from lab.vm.channel import Channel
from lab.vm.disk import disks_of, machine_disk, modules_disk
from lab.vm.handle import VmHandle
from lab.vm.plan import LAB_NAME, LIMIT_S, MEMORY_MIB, RUN_ROOT, VM_NAME, VMS_MAX, Kind, Vm
from lab.vm.qemu import qemu_argv, share_argv

BOOT_TIMEOUT_S = 180.0


def _quiet(_text: str) -> None:
    return


class VmLab:
    def __init__(self, name: str = "vm", say: Callable[[str], None] = _quiet) -> None:
        if not LAB_NAME.fullmatch(name):
            raise LabError(f"lab name {name!r}", "use up to 12 of a-z 0-9, a letter first")
        self.name, self._say = name, say
        self.folder = RUN_ROOT / name
        self.cgroup = cgroups.mount_point() / f"pillion-vm-{name}"

    def __enter__(self) -> VmLab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    @property
    def vms(self) -> dict[str, VmHandle]:
        """Those that were started and not stopped, by name; also of an earlier command."""
        found = {}
        for path in sorted(self.folder.glob("*/vm.json")):
            found[path.parent.name] = VmHandle(path.parent, json.loads(path.read_text()))
        return found

    def vm(self, name: str) -> VmHandle:
        """By name, or by its kernel's series."""
        everyone = self.vms
        for one in everyone.values():
            if name in (one.name, one.kernel):
                return one
        raise LabError(f"the VM lab {self.name!r} has no {name!r}", f"there are: {', '.join(everyone) or 'none'}")

    def start(
        self,
        name: str,
        kernel: str,
        *,
        kind: Kind = Kind.QUICK,
        cpus: int = 1,
        memory_mib: int = MEMORY_MIB,
        limit_s: int = LIMIT_S,
        network: bool = True,
        outside: bool = False,
        wait: bool = True,
    ) -> VmHandle:
        """Boot a VM and wait until it takes commands; `wait=False` leaves that to `ready()`, so that several boot at once."""
        if not VM_NAME.fullmatch(name):
            raise LabError(f"VM name {name!r}", "use up to 31 of a-z 0-9 and dashes, a letter first")
        taken = self.vms
        if name in taken and taken[name].running:
            raise LabError(f"the VM {name} runs already", f"stop it: pillion lab vm down --name {self.name}")
        used = {one.number for each, one in taken.items() if each != name}
        number = taken[name].number if name in taken else min(set(range(1, VMS_MAX + 1)) - used, default=0)
        if not number:
            raise LabError(f"a VM lab has {VMS_MAX} VMs at most", "stop one")
        stock = kernels.kernel(kernel, self._say)
        vm = Vm(name, number, kind, stock.image, stock.modules, cpus, memory_mib, limit_s, network, outside)
        vm = replace(vm, shown=(stage.PROJECT, kernels.CACHE, Path(sys.prefix)))
        if kind is Kind.MACHINE:
            vm = replace(vm, disk=machine_disk(self.name, name, self._say), modules_disk=modules_disk(stock, self._say))
        else:
            vm = replace(vm, project=stage.PROJECT, snapshot=stage.take(self.name, name))
        folder = self.folder / name
        self._prepare(folder)
        (folder / "initrd").write_bytes(initrd.build(stock))
        self._launch(vm, folder)
        facts = {"name": name, "number": number, "kernel": kernel, "release": stock.release, "kind": kind.value}
        facts |= {"addresses": [address.partition("/")[0] for address in vm.addresses], "cgroup": str(self.cgroup / name)}
        facts["checkout"] = CHECKOUT
        write_atomic(folder / "vm.json", json.dumps(facts, indent=2).encode())
        handle = VmHandle(folder, facts)
        if wait:
            handle.ready(BOOT_TIMEOUT_S)
            self._say(f"{name} is up: {stock.release}")
        return handle

    def _prepare(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "root").mkdir(exist_ok=True)
        for old in [folder / "exit", *folder.glob("*.sock")]:
            old.unlink(missing_ok=True)

    def _launch(self, vm: Vm, folder: Path) -> None:
        """Each in the VM's cgroup: what ends that ends all."""
        own = self.cgroup / vm.name
        own.mkdir(parents=True, exist_ok=True)
        switch = self.folder / "switch.sock"
        if vm.network:
            self._ensure_switch(switch)
        if vm.kind is Kind.QUICK:
            process.start(process.Place(own), share_argv(vm, folder), name="share", log=folder / "share.log")
            _appears(folder / "root.sock", folder / "share.log")
        marked = [
            "sh",
            "-c",
            'end="$1"; shift; "$@"; echo $? >"$end"',
            "sh",
            str(folder / "exit"),
            *qemu_argv(vm, folder, switch),
        ]
        process.start(process.Place(own), marked, name="qemu", log=folder / "qemu.log")
        _appears(Channel.socket_path(folder, 0), folder / "qemu.log")

    def _ensure_switch(self, path: Path) -> None:
        own = self.cgroup / "switch"
        own.mkdir(parents=True, exist_ok=True)
        if cgroups.populated(own):
            return
        path.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "lab.vm.switch", str(path)]
        process.start(process.Place(own), argv, name="switch", log=self.folder / "switch.log")
        _appears(path, self.folder / "switch.log")

    def stop(self, name: str) -> None:
        """Pull the plug. A machine's disk stays for the next start."""
        cgroups.remove(self.cgroup / name)

    def down(self) -> None:
        """Everything, whatever state it is in; safe to repeat. What the consoles said is kept with the logs."""
        cgroups.remove(self.cgroup)
        logs = kernels.CACHE / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for console in self.folder.glob("*/console.log"):
            shutil.copyfile(console, logs / f"{console.parent.name}.console")
        shutil.rmtree(self.folder, ignore_errors=True)
        for kept in (disks_of(self.name), stage.snapshots_of(self.name)):
            shutil.rmtree(kept, ignore_errors=True)
        remove_empty(RUN_ROOT)


def _appears(path: Path, log: Path, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            text = log.read_text(errors="replace")[-600:] if log.exists() else ""
            raise LabError(f"{path} did not appear", text)
        time.sleep(0.02)


def checkout_of(name: str) -> str:
    """The checkout that all VMs of a lab were started from; "" if they differ, or nothing tells."""
    found = {str(json.loads(path.read_text()).get("checkout", "")) for path in (RUN_ROOT / name).glob("*/vm.json")}
    return found.pop() if len(found) == 1 else ""


def known() -> list[str]:
    """VM labs with any trace on this machine."""
    found = {path.name for path in RUN_ROOT.iterdir()} if RUN_ROOT.is_dir() else set()
    found |= {path.name.removeprefix("pillion-vm-") for path in cgroups.mount_point().glob("pillion-vm-*")}
    return sorted(found)
