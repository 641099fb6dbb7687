"""For every test: root or nothing, labs by name that are taken down, and a run that leaves the machine as it found it.

A run may have several workers (pytest -n): each brings up labs of its own, and the run judges what they leave as a whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from lab import Lab, LabError, cgroups
from lab.pace import PATIENCE
from lab.vm.stage import PROJECT, STAND_IN
from tests.trees import COMPILED, copied

LEFTOVER_GRACE_S = 3.0 * PATIENCE
SESSION = f"t{os.getpid()}"  # labs of this worker are named so
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # "gw0", …, or there is but one
MARK = "PILLION_TEST_RUN"  # in the environment of every process this run starts
LOCK = Path("/run/lock/pillion-tests")

ATTACKS = "tests/attacks/"
ON_A_HOST = (f"{ATTACKS}test_05_hosts.py", f"{ATTACKS}test_11_leaving.py")  # one, for those with and those without a defence
SHARED_ADDRESSES = ("tests/l7proxy/",)  # their servers listen on :15008 of the same loopback addresses

LabFactory = Callable[..., Lab]

# How long an example takes, or making one, is the machine's business: what claims a time says so itself
hypothesis.settings.register_profile("pillion", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("pillion")


def pytest_sessionstart(session: pytest.Session) -> None:
    if WORKER:
        session.config.workeroutput["session"] = SESSION  # type: ignore[attr-defined]  # of a worker's config
        return
    if os.geteuid() != 0:
        pytest.exit("the tests make network namespaces and load eBPF: run them as root (sudo make test)", returncode=1)
    os.environ[MARK] = SESSION
    if not _in_a_vm():
        session.config.stash[_COMPILED_KEY] = os.environ[COMPILED] = tempfile.mkdtemp(prefix="pillion-compiled-")
    session.config.stash[_NAMES_KEY] = {SESSION}
    session.config.stash[_LOCK_KEY] = _lock()
    session.config.stash[_BEFORE_KEY] = _traces()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _BEFORE_KEY not in session.config.stash:
        return
    if compiled := session.config.stash.get(_COMPILED_KEY, ""):
        shutil.rmtree(compiled)
    deadline = time.monotonic() + LEFTOVER_GRACE_S
    while left := _leftovers(session):
        if time.monotonic() > deadline:
            print("\n\nleft behind by this run:\n  " + "\n  ".join(left))
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        time.sleep(0.05)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByLab(LoadScopeScheduling):
        """A worker runs all that share a lab. (The plugin's own groups, by a mark, do nothing under pytest 9.)"""

        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            if file in ON_A_HOST or (file.startswith(ATTACKS) and name.partition("[")[0].endswith("_without")):
                return "attacks without their defence"  # in the order of their labs, see tests/attacks/conftest.py
            return next((folder for folder in SHARED_ADDRESSES if file.startswith(folder)), file)

    return ByLab(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    names = node.config.stash[_NAMES_KEY]
    names.add(getattr(node, "workeroutput", {}).get("session", SESSION))


def _in_a_vm() -> bool:
    """There all is compiled beforehand, see lab/vm/stage.py."""
    found = find_spec("bcc")
    return bool(found and found.origin and Path(found.origin).resolve().is_relative_to(PROJECT / STAND_IN))


def opened(folder: Path) -> Path:
    """For servers that run as other users: pytest keeps its folders to itself."""
    for each in (folder, *list(folder.parents)[:3]):
        if each.stat().st_mode & 0o077 == 0:
            each.chmod(0o755)
    return folder


_NAMES_KEY = pytest.StashKey[set[str]]()
_COMPILED_KEY = pytest.StashKey[str]()
_LOCK_KEY = pytest.StashKey[int]()
_BEFORE_KEY = pytest.StashKey[frozenset[str]]()


def _lock() -> int:
    """Shared while a run lasts: who can get it alone at the end knows that all that is new is its own."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def _alone(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _traces() -> frozenset[str]:
    """Namespaces, cgroups and mounts named as ours are."""
    found = {f"netns {path.name}" for path in Path("/run/netns").glob("pl-*")}
    found |= {f"cgroup {path}" for path in cgroups.mount_point().glob("pillion-*")}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point, kind = line.split()[4], line.partition(" - ")[2].split()[0]
        if "pillion" in point or (kind == "bpf" and point != "/sys/fs/bpf"):
            found.add(f"mount {point}")
    found |= {f"folder {path}" for kind in ("lab", "host") for path in Path(f"/run/pillion/{kind}").glob("*")}
    return frozenset(found)


def _processes() -> list[str]:
    """Living processes this run started, by the mark in their environment."""
    needle = f"{MARK}={SESSION}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:160]
                found.append(f"process {entry.name} {command}")
        except OSError:
            continue
    return found


def _leftovers(session: pytest.Session) -> list[str]:
    new = _traces() - session.config.stash[_BEFORE_KEY]
    if not _alone(session.config.stash[_LOCK_KEY]):  # another run is at work: judge what bears our name
        new = frozenset(trace for trace in new if any(name in trace for name in session.config.stash[_NAMES_KEY]))
    return sorted(new) + _processes()


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product as it is, for labs whose agents' compiling is not what is tested."""
    return copied(opened(tmp_path_factory.mktemp("tree")) / "code")


@pytest.fixture(scope="session")
def labs(request: pytest.FixtureRequest, tree: Path) -> Iterator[LabFactory]:
    """`labs("two", nodes=2, mesh=False)`: a lab that is up, one for each name and run; all are down at the end."""
    made: dict[str, Lab] = {}

    def make(name: str = "", nodes: int = 2, *, mesh: bool = True, workers: int = 1) -> Lab:
        full = f"{SESSION}{name}"
        if full not in made:
            made[full] = Lab(full, print, code=tree)
            made[full].up(nodes, mesh=mesh, workers=workers)
        return made[full]

    yield make
    errors = []
    for lab in made.values():
        if request.session.testsfailed:
            _show_logs(lab)
        try:
            lab.down()
        except LabError as error:
            errors.append(str(error))
    assert not errors, errors


def _show_logs(lab: Lab, lines: int = 30) -> None:
    """When a test failed, the ends of the mesh's own logs are worth more than their absence."""
    for log in sorted(lab.paths.logs.glob("*.log")):
        text = log.read_text(errors="replace").splitlines()[-lines:]
        print(f"\n---- {lab.name} {log.name}\n" + "\n".join(line[:300] for line in text))


@pytest.fixture(scope="session")
def lab(labs: LabFactory) -> Lab:
    """A mesh on two nodes, shared by the run's tests: leave it as you found it."""
    return labs()


@pytest.fixture
def fresh_lab(tree: Path) -> Iterator[LabFactory]:
    """Like `labs`, for tests that break their lab: down after the test."""
    made: list[Lab] = []

    def make(name: str = "f", nodes: int = 2, *, mesh: bool = True, workers: int = 1) -> Lab:
        made.append(Lab(f"{SESSION}{name}", print, code=tree))
        return made[-1].up(nodes, mesh=mesh, workers=workers)

    yield make
    for lab in made:
        lab.down()
