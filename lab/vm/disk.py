"""Disks of machines: a base made once from the distribution's packages, a copy for each machine, one with the modules of
each kernel. All are plain ext4 images, made without mounting anything."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.state import LabError
from lab.vm.kernels import CACHE, Kernel, locked, require, tool

SUITE = "bookworm"
DISK_SIZE = "6G"  # sparse
# What any Debian server has, and what install.sh would fetch: a VM need not reach the network.
PACKAGES = """systemd systemd-sysv udev dbus kmod procps iproute2 ca-certificates curl openssl python3 python3-venv
 python3-bpfcc libbpf1 linux-libc-dev nginx-light redis-server redis-tools iputils-ping less""".split()  # noqa: SIM905  # readable
BASE_TIMEOUT_S = 900


def disks_of(lab: str) -> Path:
    return CACHE / "disks" / lab


def machine_disk(lab: str, name: str, say: Callable[[str], None]) -> Path:
    """The machine's own disk; a copy of the base when there is none yet."""
    place = disks_of(lab) / f"{name}.ext4"
    if not place.exists():
        base = base_disk(say)
        place.parent.mkdir(parents=True, exist_ok=True)
        tool("cp", "--sparse=always", "--reflink=auto", str(base), f"{place}.part")
        Path(f"{place}.part").rename(place)
    return place


def base_disk(say: Callable[[str], None]) -> Path:
    """A minimal Debian with systemd. Made anew when the list of packages changes."""
    with locked("bases") as folder:
        place, stamp = folder / f"{SUITE}.ext4", folder / f"{SUITE}.packages"
        wanted = "\n".join([SUITE, DISK_SIZE, *PACKAGES])
        if place.exists() and stamp.exists() and stamp.read_text() == wanted:
            return place
        say(f"making a disk with {SUITE} (some minutes, once)")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            root = Path(scratch) / "root"
            debootstrap(root, Path(scratch) / "log", SUITE, PACKAGES)
            settle(root)
            _image(root, Path(scratch) / "disk", DISK_SIZE)
            (Path(scratch) / "disk").rename(place)
        stamp.write_text(wanted)
        return place


def _mirror(suite: str) -> list[str]:
    """Where this host has that suite's packages from; nothing, and debootstrap knows one, where it runs another suite."""
    wanted = ["Created-By: Packages", f"Codename: {suite}", "Component: main"]
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False).stdout.split()[:1]


def debootstrap(
    root: Path, log: Path, suite: str, packages: Sequence[str], options: Sequence[str] = (), mirror: Sequence[str] = ()
) -> None:
    """Unpack a system. `mirror`: its address, and the script where debootstrap does not know the suite. Raises LabError."""
    include = f"--include={','.join(packages)}"
    argv = [str(require("debootstrap")), "--variant=minbase", include, *options, suite, str(root)]
    argv = ["timeout", str(BASE_TIMEOUT_S), *argv, *(mirror or _mirror(suite))]
    with log.open("wb") as output:
        env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        done = subprocess.run(argv, stdout=output, stderr=subprocess.STDOUT, env=env, check=False)
    if done.returncode != 0:
        raise LabError(f"debootstrap failed: {log.read_text(errors='replace')[-800:]}", "can this machine reach the mirror?")


def settle(root: Path) -> None:
    """As a machine that was just installed: nothing of ours, no services that a package started by itself."""
    for path in (root / "var/cache/apt/archives").glob("*.deb"):
        path.unlink()
    (root / "etc/machine-id").write_text("")
    (root / "etc/fstab").write_text("")
    services, timers = ("nginx", "redis-server", "mariadb"), ("apt-daily", "apt-daily-upgrade", "dpkg-db-backup")
    for unit in (*(f"{each}.service" for each in services), *(f"{each}.timer" for each in timers)):
        for link in (root / "etc/systemd/system").glob(f"*.wants/{unit}"):
            link.unlink()


def modules_disk(kernel: Kernel, say: Callable[[str], None]) -> Path:
    """The modules of a kernel, read-only in every machine that runs it."""
    with locked("modules") as folder:
        place = folder / f"{kernel.release}.ext4"
        if not place.exists():
            say(f"making a disk with the modules of {kernel.release}")
            _image(kernel.modules, folder / "part", "400M")
            (folder / "part").rename(place)
        return place


def _image(source: Path, target: Path, size: str) -> None:
    target.unlink(missing_ok=True)
    options = "lazy_itable_init=1,root_owner=0:0"
    tool("mke2fs", "-q", "-t", "ext4", "-E", options, "-d", str(source), str(target), size, timeout_s=600)
