"""One such host. Everything of it is in its namespaces and one cgroup, so that nothing is left when it is down."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from lab import cgroups
from lab.machine import Machine, Sink
from lab.pace import SLOW
from lab.state import CHECKOUT, LabError, remove_empty

RUN = Path("/run/pillion/host")
GROUP = "pillion-host-"
BOOT_TIMEOUT_S = 60.0 * SLOW
ADDRESSES = ("10.99.0.1", "fd99::1")
PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# PID 1 of the new namespaces: a root that looks newly installed, an address to be reached at, then systemd. $1: our
# folder; $4: A=B… to be seen in there; $5: what its root is made of
BOOT = r"""
set -e
place=$1 name=$2
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs "$place"
mkdir "$place/upper" "$place/work" "$place/root"
mount -t overlay -o "lowerdir=$5,upperdir=$place/upper,workdir=$place/work" overlay "$place/root"
root=$place/root
rm -rf "$root"/etc/pillion "$root"/opt/pillion "$root"/var/lib/pillion-* "$root"/var/log/journal
# What was enabled on this machine is its own; another system keeps what its packages enabled
[ "$5" != / ] || rm -rf "$root"/etc/systemd/system/*
mkdir "$root/etc/systemd/system/pillion-agent.service.d"
cat >"$root/etc/systemd/system/pillion-agent.service.d/10-namespaces.conf" <<U
# These cgroups are a part of the machine's. To count levels from its root the agent opens that, which it need not on a host
[Service]
CapabilityBoundingSet=CAP_DAC_READ_SEARCH
SystemCallFilter=open_by_handle_at
U
: >"$root/etc/machine-id"
: >"$root/etc/fstab"
mkdir -p "$root/proc" "$root/sys" "$root/run" "$root/tmp" "$root/dev"
mount -t proc proc "$root/proc"
# What is not of a namespace is this machine's: to be looked at
mount --bind "$root/proc/sys" "$root/proc/sys"
mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t bpf bpf "$root/sys/fs/bpf"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs -o mode=0755 tmpfs "$root/dev"
for each in null zero full random urandom tty; do : >"$root/dev/$each"; mount --bind "/dev/$each" "$root/dev/$each"; done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"; ln -s /proc/self/fd/1 "$root/dev/stdout"; ln -s /proc/self/fd/2 "$root/dev/stderr"
for each in $4; do
    mkdir -p "$root${each#*=}"
    mount --bind "${each%%=*}" "$root${each#*=}"
    mount -o remount,bind,ro "$root${each#*=}"
done
hostname "$name"
echo "$name" >"$root/etc/hostname"
ip link set lo up
ip link add up0 type veth peer name up1
for each in up0 up1; do ip link set "$each" up; done
ip addr add 10.99.0.1/24 dev up0
ip -6 addr add fd99::1/64 dev up0 nodad
ip route add default via 10.99.0.2 dev up0
cd "$root"
mkdir -p srv/old
pivot_root . srv/old
umount -l /srv/old
mount --make-rshared / # as systemd would have it: credentials come by a mount that its services see
exec env -i container=other PATH="$3" /lib/systemd/systemd --unit=multi-user.target --log-target=journal --show-status=false
"""


def known() -> list[str]:
    """Hosts with any trace on this machine, also half-made ones, and those whose maker was killed."""
    found = {path.name.removesuffix(".log") for path in RUN.iterdir()} if RUN.is_dir() else set()
    return sorted(found | {path.name.removeprefix(GROUP) for path in cgroups.mount_point().glob(f"{GROUP}*")})


def checkout_of(name: str) -> str:
    """Whose it is; empty where that cannot be told."""
    try:
        return (RUN / name / "checkout").read_text()
    except OSError:
        return ""


def group_of(name: str) -> Path:
    return cgroups.mount_point() / f"{GROUP}{name}"


def remove(name: str) -> None:
    """By its name alone, whatever state it is in. Safe to repeat. What says whose it is goes last. Raises LabError."""
    if os.geteuid() != 0:
        raise LabError("only root can take a host down", "run it as root")
    cgroups.remove(group_of(name))
    (RUN / f"{name}.log").unlink(missing_ok=True)
    shutil.rmtree(RUN / name, ignore_errors=True)
    remove_empty(RUN)


class Container(Machine):
    """`with Container("n1") as host: host.run(["systemctl", "status"])`. `root`: another system than this machine's, unpacked."""

    def __init__(
        self,
        name: str,
        say: Callable[[str], None] = lambda _text: None,
        binds: Mapping[str, Path] | None = None,
        root: Path = Path("/"),
    ) -> None:
        self.root = root
        self.name, self.say, self.addresses = name, say, ADDRESSES
        self.binds = dict(binds or {})  # where it is in there, to be read -> folder of this machine
        self.folder = RUN / name
        self.cgroup = group_of(name)
        self._boot: subprocess.Popen[bytes] | None = None
        self._pid = 0  # of its systemd, as seen from here

    def __enter__(self) -> Container:
        try:
            return self.up()
        except BaseException:
            self.down()
            raise

    def __exit__(self, *_: object) -> None:
        self.down()

    # ---- up and down

    def up(self) -> Container:
        """Until systemd has started what it starts. Raises LabError."""
        if os.geteuid() != 0:
            raise LabError("a host of namespaces takes root", "run it with sudo")
        self.down()
        began = time.monotonic()
        self.folder.mkdir(parents=True)
        (self.folder / "checkout").write_text(CHECKOUT)
        self.cgroup.mkdir()
        # The cgroup namespace's root is where its first process is: the host's own, one level below the real one
        spaces = ["--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child"]
        script = 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"'
        binds = " ".join(f"{outside}={inside}" for inside, outside in self.binds.items())
        inner = ["unshare", *spaces, "sh", "-c", BOOT, "sh", str(self.folder), self.name, PATH, binds, str(self.root)]
        with (RUN / f"{self.name}.log").open("wb") as log:
            self._boot = subprocess.Popen(
                ["sh", "-c", script, "sh", str(self.cgroup), *inner],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = began + BOOT_TIMEOUT_S
        while True:
            self._pid = self._child()
            said = self.run(["systemctl", "is-system-running"], timeout=20 * SLOW).stdout.strip() if self._pid else ""
            if said in ("running", "degraded"):
                break
            if self._boot.poll() is not None or time.monotonic() > deadline:
                text = (RUN / f"{self.name}.log").read_text(errors="replace")[-1000:]
                raise LabError(f"the host {self.name} did not boot: {said or 'no systemd'}; {text}")
            time.sleep(0.05)
        self.say(f"{self.name} is up after {time.monotonic() - began:.1f} s")
        return self

    def _child(self) -> int:
        """Its systemd, once the boot script has become that."""
        if self._boot is None:
            return 0
        try:
            children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text().split()
            pid = int(children[0]) if children else 0
            return pid if pid and Path(f"/proc/{pid}/comm").read_text() == "systemd\n" else 0
        except (OSError, ValueError):
            return 0

    def down(self) -> None:
        """Nothing of it is left. Safe to repeat."""
        if self._boot is not None and self._boot.poll() is None:
            self._boot.kill()  # its systemd is killed with it, and with that all others of its pid namespace
        remove(self.name)
        if self._boot is not None:
            self._boot.wait()
        self._boot, self._pid = None, 0

    # ---- what it does

    def plug(self, netns: str, link: str, address: str) -> None:
        """A cable to a namespace of this machine, where its end is called `link`; here it has that address."""
        ends = ["ip", "link", "add", "lan0", "netns", str(self._pid), "type", "veth", "peer", "name", link, "netns", netns]
        subprocess.run(ends, check=True)
        self.run(["sh", "-c", f"ip address add {address} dev lan0 && ip link set lan0 up"], check=True)

    def argv(self, argv: Sequence[str], cwd: str = "/") -> list[str]:
        """To start a program in there from out here, as root, beside systemd's services."""
        enter = ["nsenter", "-t", str(self._pid), "-m", "-p", "-n", "-u", "-i", "-C", "--"]
        script = 'mkdir -p "$1" && echo $$ >"$1/cgroup.procs" || exit 125; shift; exec "$@"'
        within = ["sh", "-c", 'cd "$1" || exit 125; shift; exec "$@"', "sh", cwd]
        return ["sh", "-c", script, "sh", str(self.cgroup / "shell"), *enter, *within, *argv]

    def stream(
        self,
        argv: Sequence[str],
        *,
        input: bytes | BinaryIO | None = None,
        timeout: float = 60.0 * SLOW,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> int:
        """The sinks get all at the end."""
        done = subprocess.run(
            self.argv(argv, cwd),
            input=(input or b"") if isinstance(input, bytes | None) else input.read(),
            capture_output=True,
            timeout=timeout,
            env={"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", **(env or {})},
            check=False,
        )
        for sink, data in ((stdout, done.stdout), (stderr, done.stderr)):
            if sink is not None:
                sink.write(data)
        return done.returncode
