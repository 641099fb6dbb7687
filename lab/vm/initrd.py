"""The initramfs of both kinds of VM: loads what it takes to mount the root, then hands over."""

from __future__ import annotations

import gzip
import lzma
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lab.vm import guest
from lab.vm.kernels import Kernel, require

MODULES = ("virtio_pci", "virtio_console", "virtio_net", "virtio_rng", "virtiofs", "virtio_blk", "ext4", "overlay")

# The network is set here, so that it is the same for both kinds and nothing about it is on a disk.
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
for m in /mods/*; do insmod $m || echo "vm: $m does not load"; done
for word in $(cat /proc/cmdline); do case $word in
  pillion.kind=*) kind=${word#*=};; pillion.host=*) host=${word#*=};; pillion.ip=*) ips=${word#*=};;
  pillion.modules=*) modules=${word#*=};; pillion.outside=*) outside=${word#*=};;
esac; done
fail() { echo "vm: $1"; poweroff -f; }
release=$(uname -r)
if [ "$kind" = quick ]; then
  mount -t virtiofs -o ro root /low || fail "the host's root does not mount"
  mount -t tmpfs -o size=75% t /up && mkdir /up/u /up/w
  mount -t overlay -o lowerdir=/low,upperdir=/up/u,workdir=/up/w o /new || fail "no overlay"
  mkdir -p /new/lib/modules/$release && mount --bind /low$modules /new/lib/modules/$release
  rm -f /new/etc/resolv.conf; echo "# no network" > /new/etc/resolv.conf
else
  mount -t ext4 /dev/vda /new || fail "the disk does not mount"
  mkdir -p /new/lib/modules/$release
  mount -t ext4 -o ro /dev/vdb /new/lib/modules/$release || fail "the disk with the modules does not mount"
fi
mount -t tmpfs -o mode=755 t /new/run; mkdir -p /new/run/pillion-vm; cp /guest.py /new/run/pillion-vm/
hostname $host; ip link set lo up
for ip in $(echo "$ips" | tr , ' '); do ip addr add $ip dev eth0; done
[ -d /sys/class/net/eth0 ] && { echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad; ip link set eth0 up; }
if [ -n "$outside" ]; then
  ip addr add 10.0.2.15/24 dev $outside; ip link set $outside up; ip route add default via 10.0.2.2
  rm -f /new/etc/resolv.conf; echo "nameserver 10.0.2.3" > /new/etc/resolv.conf
fi
if [ "$kind" = quick ]; then
  echo "127.0.0.1 localhost $host" > /new/etc/hosts; echo "::1 localhost" >> /new/etc/hosts
  mount -t proc p /new/proc; mount -t sysfs s /new/sys; mount -t devtmpfs d /new/dev
  mkdir -p /new/dev/pts /new/dev/shm /new/run/lock /new/run/netns
  mount -t devpts p /new/dev/pts; mount -t tmpfs t /new/dev/shm
  mount -t cgroup2 c /new/sys/fs/cgroup; mount -t bpf b /new/sys/fs/bpf
  mount -t tracefs t /new/sys/kernel/tracing 2>/dev/null
  umount /proc /sys 2>/dev/null
  exec switch_root /new /usr/bin/python3 -u /run/pillion-vm/guest.py --init
fi
echo $host > /new/etc/hostname
units=/new/run/systemd/system; mkdir -p $units/sysinit.target.wants
cp /agent.service $units/pillion-vm.service; ln -s ../pillion-vm.service $units/sysinit.target.wants/
umount /proc /sys /dev 2>/dev/null
exec switch_root /new /lib/systemd/systemd
"""

# Not stopped at shutdown before all else is, and never killed with what it started.
UNIT = """[Unit]
Description=The command channel of the VM lab
DefaultDependencies=no
[Service]
ExecStart=/usr/bin/python3 -u /run/pillion-vm/guest.py
KillMode=process
Restart=always
"""


def build(kernel: Kernel) -> bytes:
    """A gzipped cpio archive in the kernel's `newc` format."""
    return gzip.compress(archive(_entries(kernel)), 1)


def _entries(kernel: Kernel) -> Iterator[tuple[str, int, bytes]]:
    for folder in ("bin", "mods", "proc", "sys", "dev", "low", "up", "new"):
        yield folder, stat.S_IFDIR | 0o755, b""
    yield "bin/busybox", stat.S_IFREG | 0o755, require("busybox").read_bytes()
    yield "init", stat.S_IFREG | 0o755, INIT.encode()
    yield "guest.py", stat.S_IFREG | 0o644, Path(guest.__file__).read_bytes()
    yield "agent.service", stat.S_IFREG | 0o644, UNIT.encode()
    for number, path in enumerate(kernel.with_dependencies(MODULES)):
        yield f"mods/{number:02}-{path.name.partition('.')[0]}.ko", stat.S_IFREG | 0o644, unpacked(path)


def unpacked(module: Path) -> bytes:
    """As busybox loads it."""
    match module.suffix:
        case ".xz":
            return lzma.decompress(module.read_bytes())
        case ".zst":  # Ubuntu's
            return subprocess.run([require("zstd"), "-dqc", module], stdout=subprocess.PIPE, check=True).stdout
        case _:
            return module.read_bytes()


def archive(entries: Iterator[tuple[str, int, bytes]]) -> bytes:
    """`newc`: a header of 8-digit hex numbers, the name, the data; each padded to 4 bytes."""
    out = bytearray()

    def add(name: str, mode: int, data: bytes, number: int) -> None:
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        out.extend(bytes(-len(out) % 4))
        out.extend(data)
        out.extend(bytes(-len(out) % 4))

    for number, (name, mode, data) in enumerate(entries, start=1):
        add(name, mode, data, number)
    add("TRAILER!!!", 0, b"", 0)
    return bytes(out)
