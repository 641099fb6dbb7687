"""Stock kernels from the distribution's packages, or Ubuntu's: downloaded and unpacked into a cache, never installed."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.state import LabError

CACHE = Path(os.environ.get("PILLION_VM_CACHE", "/var/cache/pillion/vm"))
UBUNTU = "ubuntu-"
UBUNTU_SOURCES = Path(__file__).with_name("ubuntu.sources")
VERSION = re.compile(rf"({UBUNTU})?\d+\.\d+")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Kernel:
    """An unpacked package. `tree` has boot/ and lib/modules/<release>/ with modules.dep."""

    version: str  # "6.1", "ubuntu-6.8"
    release: str  # "6.1.0-56-cloud-amd64"
    tree: Path

    @property
    def image(self) -> Path:
        return self.tree / "boot" / f"vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        return self.tree / "lib" / "modules" / self.release

    def config(self, option: str) -> str:
        """`y`, `m` or "" of CONFIG_<option>."""
        for line in (self.tree / "boot" / f"config-{self.release}").read_text().splitlines():
            if line.startswith(f"CONFIG_{option}="):
                return line.partition("=")[2]
        return ""

    def with_dependencies(self, names: Iterable[str]) -> list[Path]:
        """Files of these modules and all they need, in the order to load them. What is built in is left out; so is what
        this kernel does not have."""
        needs: dict[str, tuple[Path, list[str]]] = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            file, _, others = line.partition(":")
            needs[module_name(file)] = (self.modules / file, [module_name(other) for other in others.split()])
        ordered: list[Path] = []

        def add(name: str) -> None:
            if name in needs and needs[name][0] not in ordered:
                for other in reversed(needs[name][1]):
                    add(other)
                ordered.append(needs[name][0])

        for name in names:
            add(name)
        return ordered


def module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """A folder of the cache, for one process at a time."""
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(fd)


def kernel(version: str, say: Say = print) -> Kernel:
    """The newest kernel of this series, the distribution's ("6.1") or Ubuntu's ("ubuntu-6.8"), from the cache if one is there."""
    if not VERSION.fullmatch(version):
        raise LabError(f"kernel {version!r} is not a series", "name it like 6.1, or ubuntu-6.8")
    with locked("kernels") as folder:
        for tree in sorted(folder.glob(f"{version}_*"), reverse=True):
            if found := _unpacked(version, tree):
                return found
        package = newest(version)
        say(f"downloading {package}")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            tree = Path(scratch) / "tree"
            for deb in download(packages(package), Path(scratch), archive_of(version)):
                tool("dpkg-deb", "-x", str(deb), str(tree))
            release = next((tree / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
            tool("depmod", "-b", str(tree), release)
            place = folder / f"{version}_{release}"
            shutil.rmtree(place, ignore_errors=True)
            tree.rename(place)
        return Kernel(version, release, place)


def _unpacked(version: str, tree: Path) -> Kernel | None:
    found = Kernel(version, tree.name.partition("_")[2], tree)
    return found if found.image.exists() and (found.modules / "modules.dep").exists() else None


def archive_of(version: str) -> list[str]:
    """apt's options for where a series is: this machine's sources, or Ubuntu's archive, by its key and in a state of its own."""
    if not version.startswith(UBUNTU):
        return []
    with locked("ubuntu") as folder:
        for each in ("lists/partial", "cache/archives/partial"):
            (folder / each).mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::Etc::SourceList": UBUNTU_SOURCES,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::Status": "/dev/null",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def newest(version: str) -> str:
    """The package with the newest stock kernel of a series; the small build for virtual machines where there is one."""
    series, apt = version.removeprefix(UBUNTU), archive_of(version)
    for refreshed in (False, True):
        if refreshed:
            tool("apt-get", *apt, "update", "-qq")
        names = [line.split()[0] for line in tool("apt-cache", *apt, "search", "--names-only", "^linux-image-[0-9]").splitlines()]
        if found := pick(series, names):
            return found
    there = sorted({match[1] for name in names if (match := re.match(r"linux-image-(\d+\.\d+)\.", name))}, key=_numbers)
    whose = "Ubuntu's archive has" if apt else "this machine's package sources have"
    raise LabError(f"{whose} no kernel {series}", f"there are: {', '.join(there) or 'none'}")


def pick(version: str, names: Iterable[str]) -> str | None:
    """By name alone: Debian's numbers its builds (6.1.0-56, 6.12.117+deb12); real-time, unsigned and debug ones are left out."""
    pattern = re.compile(rf"linux-image-{re.escape(version)}\.[0-9][^-]*(-\d+)?(-cloud)?(-amd64|-generic)")
    found = [name for name in names if pattern.fullmatch(name)]
    return max(found, key=lambda name: ("-cloud-" in name, _numbers(name)), default=None)


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", name))


def packages(image: str) -> list[str]:
    """All that a kernel is packed as. Pure: Ubuntu packs modules apart."""
    return [image, image.replace("-image-", "-modules-")] if image.endswith("-generic") else [image]


def download(names: Sequence[str], folder: Path, apt: Sequence[str]) -> list[Path]:
    """The packages' files, in `folder`."""
    argv = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *apt, *names]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    found = list(folder.glob("*.deb"))
    if done.returncode != 0 or len(found) < len(names):
        raise LabError(f"{' '.join(names)} could not be downloaded: {done.stderr.strip()[-300:]}", "look at: apt-get update")
    return found


def tool(*argv: str, timeout_s: float = 300.0, **more: str) -> str:
    """Output of a program that must succeed."""
    require(argv[0])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False, **more)  # type: ignore[call-overload]  # cwd
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)[:200]}: {done.stderr.strip()[-400:]}", "")
    return str(done.stdout)


@functools.cache
def require(program: str) -> Path:
    """Where a program of the VM lab is."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/lib/qemu", "/usr/libexec"])
    found = shutil.which(program, path=path)
    if found is None:
        raise LabError(f"{program} is missing", "run: deploy/setup.sh vm")
    return Path(found)
