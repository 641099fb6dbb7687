"""The command lines: QEMU, and the daemon that shows it this machine's root. Pure but for the look at /dev/kvm."""

from __future__ import annotations

import os
from pathlib import Path

from lab.vm.channel import PORTS, Channel
from lab.vm.kernels import require
from lab.vm.plan import OUTSIDE_CARD, Kind, Vm

# Mounts are read with their own mount namespace: bound read-only there, so nothing in a VM can write to this machine.
_SHARE = """
mount --make-rprivate / && mount --bind / "$1" || exit 1
for path in $3; do mount --bind "$path" "$1$path" && mount -o remount,bind,ro "$1$path" || exit 1; done
mount -o remount,bind,ro "$1" && mount --bind "$6" "$1$5" && mount -o remount,bind,ro "$1$5" || exit 1
exec "$4" --socket-path="$2" -o source="$1" -o cache=always -o sandbox=chroot
"""


def accelerator() -> str:
    """KVM where stock kernels run under it: the device opens, and the processor has the extensions (some clouds offer a
    /dev/kvm for their own guests alone)."""
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    return "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) and {"vmx", "svm"} & set(flags) else "tcg"


def share_argv(vm: Vm, folder: Path) -> list[str]:
    """virtiofsd in a mount namespace of its own. Mounts that hold the project or the cache are shown as well."""
    root = os.stat("/").st_dev
    others = {mount_of(path) for path in vm.shown if path.stat().st_dev != root}
    shown = " ".join(str(path) for path in sorted(others))
    daemon = str(require("virtiofsd"))
    words = [folder / "root", folder / "root.sock", shown, daemon, vm.project, vm.snapshot]
    return ["unshare", "--mount", "sh", "-ec", _SHARE, "sh", *(str(word) for word in words)]


def mount_of(path: Path) -> Path:
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return path


def qemu_argv(vm: Vm, folder: Path, switch: Path) -> list[str]:
    """`timeout` is the VM's hard limit; the console's log is the serial port's."""
    accel = accelerator()
    argv = ["timeout", "--signal=KILL", str(vm.limit_s), str(require("qemu-system-x86_64"))]
    argv += ["-accel", "kvm" if accel == "kvm" else "tcg,thread=multi", "-cpu", "host" if accel == "kvm" else "max,la57=off"]
    argv += ["-smp", str(vm.cpus), "-m", f"{vm.memory_mib}M", "-nodefaults", "-display", "none", "-monitor", "none"]
    argv += ["-serial", f"file:{folder / 'console.log'}", "-device", "virtio-rng-pci"]
    argv += ["-kernel", str(vm.image), "-initrd", str(folder / "initrd"), "-append"]
    # What is compiled beforehand, for emulation, names an address of the kernel, so that is to be the same in each boot
    argv.append(command_line(vm) + (" nokaslr" if accel == "tcg" else ""))
    argv += ["-device", "virtio-serial-pci,max_ports=16"]
    for number in range(PORTS):
        path = Channel.socket_path(folder, number)
        argv += ["-chardev", f"socket,id=c{number},path={path},server=on,wait=off"]
        argv += ["-device", f"virtserialport,chardev=c{number},name=pillion.{number}"]
    if vm.addresses:
        argv += ["-netdev", f"stream,id=lan,server=off,addr.type=unix,addr.path={switch}"]
        argv += ["-device", f"virtio-net-pci,netdev=lan,mac={vm.mac},romfile="]
    if vm.outside:
        argv += ["-netdev", "user,id=out,ipv6=off", "-device", "virtio-net-pci,netdev=out,romfile="]
    if vm.kind is Kind.QUICK:
        argv += ["-object", f"memory-backend-memfd,id=ram,size={vm.memory_mib}M,share=on", "-numa", "node,memdev=ram"]
        argv += ["-chardev", f"socket,id=root,path={folder / 'root.sock'}"]
        argv += ["-device", "vhost-user-fs-pci,chardev=root,tag=root", "-no-reboot"]
    else:
        for name, file, mode in (("disk", vm.disk, "off"), ("modules", vm.modules_disk, "on")):
            argv += ["-drive", f"file={file},format=raw,if=none,id={name},readonly={mode},cache=unsafe"]
            argv += ["-device", f"virtio-blk-pci,drive={name}"]
    return argv


def command_line(vm: Vm) -> str:
    """`quiet`: a serial console in emulation is slow."""
    words = ["console=ttyS0", "quiet", "panic=-1", "net.ifnames=0", "mitigations=off", "random.trust_cpu=on"]
    words += [f"pillion.kind={vm.kind.value}", f"pillion.host={vm.name}", f"systemd.hostname={vm.name}"]
    words += [f"pillion.modules={vm.modules}", f"pillion.ip={','.join(vm.addresses)}"]
    if vm.kind is Kind.MACHINE:
        words += ["systemd.show_status=0", "systemd.unified_cgroup_hierarchy=1"]
    if vm.outside:
        words.append(f"pillion.outside={OUTSIDE_CARD if vm.addresses else 'eth0'}")
    return " ".join(words)
