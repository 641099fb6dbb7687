"""Pillion on machines of the VM lab, by deploy/install.sh alone: what a person would do, from an unpacked release and a
folder of wheels, with no network but the lab's."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from lab.machine import Machine
from lab.vm.kernels import locked, tool
from lab.vm.stage import LEFT_OUT, PROJECT
from mesh.ports import CONTROLLER_PORT

RELEASE, WHEELS, TOKEN = "/srv/pillion", "/srv/wheelhouse", "/srv/token"  # in the VM
LEFT_OUT_OF_A_RELEASE = (*LEFT_OUT, "tests", "bench", "fuzz")
INSTALL_TIMEOUT_S, READY_S = 1800.0, 900  # in emulation, on a machine with other work


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str) -> dict[str, str]:
    """Entries of requirements.lock with their hashes, by canonical name. Pure."""
    found = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", lock):
        if match := re.match(r"([A-Za-z0-9._-]+)==", block):
            found[canonical(match[1])] = block
    return found


def needed(known: dict[str, str], root: str = "pillion") -> list[str]:
    """What an install without extras needs, of what is pinned, from the metadata of this environment."""
    seen: set[str] = set()
    left = [root]
    while left:
        for requirement in metadata.requires(left.pop()) or []:
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            name = canonical(match[0]) if match else ""
            if "extra ==" not in requirement and name in known and name not in seen:
                seen.add(name)
                left.append(name)
    return sorted(seen)


def wheelhouse(say: Callable[[str], None]) -> Path:
    """The wheels of requirements.lock that an install needs, downloaded once for each lock, checked against its hashes."""
    lock = (PROJECT / "requirements.lock").read_text()
    mark = hashlib.sha256(lock.encode()).hexdigest()[:16]
    with locked("wheels") as folder:
        place = folder / mark
        if place.is_dir():
            return place
        say("downloading the wheels of requirements.lock")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            known = pins(lock)
            wanted, wheels = Path(scratch) / "wanted", Path(scratch) / "wheels"
            wanted.write_text("\n".join(known[name] for name in needed(known)) + "\n")
            options = ["-q", "--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes", "--no-deps"]
            tool(sys.executable, "-m", "pip", "download", *options, "-d", str(wheels), "-r", str(wanted), timeout_s=600)
            wheels.rename(place)
        return place


def prepare(vm: Machine, say: Callable[[str], None]) -> None:
    """An unpacked release in RELEASE, its wheel and all others in WHEELS."""
    wheels = wheelhouse(say)
    with tempfile.TemporaryDirectory() as scratch:
        release, house = _release(Path(scratch)), Path(scratch) / "wheels"
        shutil.copytree(wheels, house)
        _wheel(release, house)
        vm.copy_in(release, RELEASE)
        vm.copy_in(house, WHEELS)


def upgrade(vm: Machine) -> str:
    """Another build of the same sources over the one that is there. What install.sh said."""
    with tempfile.TemporaryDirectory() as scratch:
        release, house = _release(Path(scratch)), Path(scratch) / "wheels"
        with (release / "mesh" / "__init__.py").open("a") as file:
            file.write("# another build\n")
        vm.copy_in(_wheel(release, house), WHEELS)
    return install(vm, "node")


def _release(scratch: Path) -> Path:
    shutil.copytree(PROJECT, scratch / "release", ignore=shutil.ignore_patterns(*LEFT_OUT_OF_A_RELEASE))
    return scratch / "release"


def _wheel(release: Path, house: Path) -> Path:
    """The release's wheel, in `house`."""
    env = [f"PYTHON={sys.executable}", "BUILD_WITH=own"]
    return Path(tool("env", *env, str(release / "deploy" / "wheel.sh"), str(house)).strip().splitlines()[-1])


def install(vm: Machine, role: str, *arguments: str) -> str:
    """What install.sh said. Raises LabError."""
    argv = [f"{RELEASE}/deploy/install.sh", role, *arguments]
    if "--remove" not in arguments:
        argv += ["--wheelhouse", WHEELS]
    env = {"PILLION_INSTALL_WAIT_S": str(READY_S)}
    return vm.run(argv, cwd=RELEASE, env=env, timeout=INSTALL_TIMEOUT_S, check=True).stdout


def install_controller(vm: Machine) -> str:
    listen = [f"{vm.addresses[0]}:{CONTROLLER_PORT}", f"[{vm.addresses[1]}]:{CONTROLLER_PORT}"]
    return install(vm, "controller", *(word for each in listen for word in ("--listen", each)))


def install_node(vm: Machine, controller: Machine) -> str:
    """Joined with a token of the controller's; the node has the VM's name."""
    token = controller.run(["pillion", "node", "token", vm.name], timeout=READY_S, check=True).stdout.strip().splitlines()[-1]
    vm.put(TOKEN, token.encode(), 0o600)
    addresses = [word for each in vm.addresses for word in ("--address", each)]
    return install(vm, "node", "--name", vm.name, *addresses, "--token", TOKEN)


def status(vm: Machine) -> str:
    return vm.run(["pillion", "status"], timeout=120).stdout


def logs(vm: Machine, unit: str, lines: int = 40) -> str:
    return vm.run(["journalctl", "-u", unit, "-n", str(lines), "--no-pager", "-o", "cat"], timeout=120).stdout
