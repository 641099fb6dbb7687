"""install.sh as it works on a host's files: twice is once, an upgrade replaces, --remove leaves nothing, the lock is held to.

It runs in a mount namespace of its own, on an overlay of this machine's root. systemctl, and pip where nothing depends on what it
puts there, are stand-ins that write down what they were asked; the real ones are in lab/vm and tests/deploy/restarts.py."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lock import entries
from lab import cgroups
from tests.conftest import SESSION

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "deploy/requirements.lock"
# Of the stand-ins, or looked at apart
OURS = re.compile(
    r"run/systemd|run/mount|run/fake|run/lock|wheels|tmp|usr/share|usr/local/sbin|"
    r"etc/(\.pwd\.lock|passwd|g?shadow|group|sub[ug]id)-?$"
)
SETUP = r"""
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
root=$1/root
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mkdir -p "$root/sys/fs/cgroup"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs tmpfs "$root/run"
mkdir -p "$root/run/systemd/system" "$root/run/fake/changed" "$root/run/lock"
mount --bind "$1/upper" "$root/run/fake/changed"
ip link set lo up
exec chroot "$root" sh -c 'echo ready; cat'
"""
SYSTEMCTL = r"""#!/bin/sh
# What is active and enabled are files here
echo "$*" >>/run/fake/calls
words=$* quiet=no
for each; do case $each in -q | --no-block | --now | -P) shift ;; *) break ;; esac; done
verb=$1; shift
at_it() { # a restart: until then the unit that was is still active
    [ -e "/run/fake/next-$1" ] || return 1
    mv "/run/fake/next-$1" "/run/fake/invocation-$1"
    date +%N >"/run/fake/invocation-$1"
    [ ! -e "/run/fake/slowly-$1" ] || cp "/run/fake/slowly-$1" "/run/fake/slow-$1"
}
for each; do
    case $verb$each in is-active* | show* | *--now | *--no-block | *-P | *-q) continue ;; esac
    case $verb in
    enable) : >"/run/fake/enabled-$each" ;;
    start) : >"/run/fake/active-$each" ;;
    restart)
        : >"/run/fake/active-$each" >"/run/fake/next-$each"
        [ -e /run/fake/late ] || at_it "$each" ;;
    stop) rm -f "/run/fake/active-$each" ;;
    disable) rm -f "/run/fake/enabled-$each" "/run/fake/active-$each" ;;
    esac
done
case $verb in
show)
    case $words in
    *InvocationID*) cat "/run/fake/invocation-$each" 2>/dev/null || echo one; at_it "$each" || : ;;
    *) cat /run/fake/says 2>/dev/null ;;
    esac ;;
is-active)
    ! at_it "$1" || { echo active; exit 0; }
    left=$(cat "/run/fake/slow-$1" 2>/dev/null || echo 0) # so many looks until it is
    [ "$left" = 0 ] || [ ! -e "/run/fake/active-$1" ] || { echo $((left - 1)) >"/run/fake/slow-$1"; echo activating; exit 3; }
    [ -e "/run/fake/active-$1" ] && echo active || { echo inactive; exit 3; } ;;
is-enabled) [ -e "/run/fake/enabled-$1" ] && echo enabled || { echo disabled; exit 1; } ;;
esac
"""
PIP = """
import os, sys
with open("/run/fake/pip", "a") as file:
    print(*sys.argv[1:], file=file)
if sys.argv[-1].endswith(".whl"):
    for name in ("pillion", "pillion-agent", "pillion-proxy", "pillion-controller"):
        path = os.path.join(sys.prefix, "bin", name)
        with open(path, "w") as file:
            file.write("#!/bin/sh\\nexit 0\\n")
        os.chmod(path, 0o755)
"""
CONTROLLER = ("controller", "--listen", "10.99.0.1:15443")
NODE = ("node", "--name", "n1", "--address", "10.99.0.1")


# In its network namespace: a pod's interface as the agent leaves it
POD = """
from nodeagent import tc
from pillion import preflight
from pyroute2 import IPRoute
with IPRoute() as route:
    route.link("add", ifname="pod", kind="veth", peer="pod1")
    (index,) = route.link_lookup(ifname="pod")
    route.tc("add", "clsact", index)
    of = {"fd": preflight.load(*preflight.SCHED_CLS), "classid": 1, "direct_action": True}
    where = {"parent": tc.INGRESS_PARENT, "prio": tc.PREFERENCE, "protocol": tc.ETH_P_ALL}
    route.tc("add-filter", "bpf", index, 1, name=tc.NAME, **of, **where)
    if OTHERS:
        route.tc("add-filter", "bpf", index, 2, name="others", **of, **where)
"""


class Host:
    """Its root is a folder of ours, and so is that of its cgroups; programs run in it by nsenter."""

    def __init__(self, folder: Path) -> None:
        self.cgroup = cgroups.mount_point() / f"pillion-{SESSION}-install"
        self.cgroup.mkdir()
        inside = ["unshare", "-m", "-n", "-C", "--propagation", "private", "sh", "-c", SETUP, "sh", str(folder)]
        argv = ["sh", "-c", 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"', "sh", str(self.cgroup), *inside]
        self.holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout is not None and self.holder.stdout.readline() == "ready\n"
        self.root = Path(f"/proc/{self.holder.pid}/root")
        self.put("usr/local/sbin/systemctl", SYSTEMCTL, 0o755)
        self.put("wheels/pillion-1.0-py3-none-any.whl", "one build")

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)

    def fake_pip(self) -> None:
        """In place of the distribution's: it sorts last."""
        self.put("usr/share/python-wheels/pip-99.whl/pip/__main__.py", PIP)

    @property
    def enter(self) -> list[str]:
        return ["nsenter", "-t", str(self.holder.pid), "-m", "-n", "-r", "sh", "-c", 'cd / && exec "$@"', "sh"]

    def install(self, *arguments: str, wait_s: int = 120) -> subprocess.CompletedProcess[str]:
        """install.sh of this checkout."""
        with self.installing(*arguments, wait_s=wait_s) as running:
            out, err = running.communicate(timeout=100)
        return subprocess.CompletedProcess(running.args, running.returncode, out, err)

    def installing(self, *arguments: str, wait_s: int = 120, script: str = f"{ROOT}/deploy/install.sh") -> subprocess.Popen[str]:
        for name in ("calls", "pip"):
            (self.root / "run/fake" / name).write_text("")
        more = () if "--remove" in arguments else ("--wheelhouse", "/wheels")
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        environment["PILLION_INSTALL_WAIT_S"] = str(wait_s)
        argv = [*self.enter, script, *arguments, *more]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def cut(self, before: str, *arguments: str) -> None:
        """The same, killed before this line of it."""
        text = (ROOT / "deploy/install.sh").read_text()
        assert text.count(f"\n{before}\n") == 1, before
        shutil.copytree(ROOT / "deploy", self.root / "run/fake/cut/deploy", dirs_exist_ok=True)
        (self.root / "run/fake/cut/deploy/install.sh").write_text(text.replace(f"\n{before}\n", f"\nkill -9 $$\n{before}\n"))
        with self.installing(*arguments, script="/run/fake/cut/deploy/install.sh") as running:
            out, err = running.communicate(timeout=100)
        assert running.returncode == -signal.SIGKILL, f"{before}: {out}{err}"

    def calls(self, *verbs: str) -> list[str]:
        """What systemctl was asked to do."""
        lines = (self.root / "run/fake/calls").read_text().splitlines()
        return [line for line in lines if any(verb in line.split() for verb in verbs)]

    def pips(self) -> list[list[str]]:
        return [line.split() for line in (self.root / "run/fake/pip").read_text().splitlines()]

    def files(self) -> dict[str, str]:
        """Path -> what it is, of all that differs from this machine."""
        found = {}
        for top in (self.root / "run/fake/changed", self.root / "run"):
            for folder, names, files in os.walk(top):
                for name in (*names, *files):
                    path = Path(folder) / name
                    shown = str(path.relative_to(self.root if top.name == "run" else top))
                    there = path.is_dir() and top.name != "run" and Path("/", shown).is_dir()
                    if not there and not OURS.match(shown):
                        found[shown] = _what(path)
        return found

    def users(self) -> set[str]:
        return {line.split(":")[0] for line in (self.root / "etc/passwd").read_text().splitlines()}

    def close(self) -> None:
        cgroups.remove(self.cgroup)
        self.holder.communicate()


def _what(path: Path) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    seen = path.lstat()
    content = f"{seen.st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else ""
    return f"{seen.st_mode:o} {content}"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    folder = tmp_path / "host"
    folder.mkdir()
    made = Host(folder)
    try:
        yield made
    finally:
        made.close()


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_twice_is_once_and_removed_is_removed(host: Host) -> None:
    host.fake_pip()
    before, users = host.files(), host.users()
    assert "done: controller" in ok(host.install(*CONTROLLER)) and "done: node" in ok(host.install(*NODE))
    assert host.users() - users == {"pillion-controller", "pillion-proxy"}
    after = host.files()
    units = {path.name for path in (ROOT / "deploy/systemd").iterdir()}
    assert {path.rsplit("/", 1)[1] for path in after if path.startswith("usr/local/lib/systemd/system/")} == units
    for again in (CONTROLLER, NODE):
        assert "nothing to do" in ok(host.install(*again))
        assert host.files() == after
        assert not host.calls("start", "restart", "enable", "stop", "daemon-reload") and not host.pips()
    for role in ("node", "controller"):
        ok(host.install(role, "--remove"))
    assert host.files() == before and host.users() == users
    assert "nothing to do" in ok(host.install("node", "--remove"))


@pytest.mark.parametrize("others", [False, True])
def test_removed_is_removed_from_the_kernel_too(host: Host, others: bool) -> None:
    """A program of `pillion run` ends: nothing would hold it to a policy. Cgroups go, and a pod's filter with what it hung on,
    unless there is another's beside it."""
    host.fake_pip()
    ok(host.install(*NODE))
    for name in ("pillion-agent.slice", "pillion-proxy.slice/pillion-proxy.service", "workloads/run-shop.web"):
        (host.cgroup / "pillion.slice" / name).mkdir(parents=True)
    network = ["nsenter", "-t", str(host.holder.pid), "-n"]
    subprocess.run([*network, sys.executable, "-c", POD.replace("OTHERS", str(others))], cwd=ROOT, check=True, timeout=60)
    rules = ["sh", "-c", "tc qdisc show dev pod; tc filter show dev pod ingress"]
    assert "pillion-veth" in subprocess.run([*network, *rules], capture_output=True, text=True, check=True).stdout
    with subprocess.Popen(["sleep", "60"]) as program:
        (host.cgroup / "pillion.slice/workloads/run-shop.web/cgroup.procs").write_text(str(program.pid))
        said = ok(host.install("node", "--remove"))
        assert program.wait(10) == -signal.SIGKILL
    assert "ended the programs of `pillion run`" in said
    assert not (host.cgroup / "pillion.slice").exists()
    left = subprocess.run([*network, *rules], capture_output=True, text=True, check=True).stdout
    assert "pillion" not in left and ("clsact" in left) is ("others" in left) is others


def test_an_upgrade_restarts_both_roles_from_one_new_environment(host: Host) -> None:
    host.fake_pip()
    ok(host.install(*CONTROLLER))
    ok(host.install(*NODE))
    old = os.readlink(host.root / "opt/pillion/current")
    host.put("wheels/pillion-1.0-py3-none-any.whl", "another build")
    ok(host.install("node"))
    new = os.readlink(host.root / "opt/pillion/current")
    environments = [path.name for path in (host.root / "opt/pillion").glob("venv-*")]
    assert new != old and environments == [Path(new).name]
    # All, or one would go on from an environment that is no more; the agent before the proxy, which then gets all from it
    order = ("pillion-controller", "pillion-agent", "pillion-proxy")
    assert host.calls("restart") == [f"restart --no-block {unit}.service" for unit in order]


def test_one_is_ready_before_the_next_is_restarted(host: Host) -> None:
    """However long it compiles, and although the manager may begin late: until then the unit that was is still active."""
    host.fake_pip()
    host.put("token", "a-token")
    ok(host.install(*NODE, "--token", "/token"))
    host.put("wheels/pillion-1.0-py3-none-any.whl", "another build")
    host.put("run/fake/says", "compiling for this kernel: nodeagent.loader, 90 s so far\n")
    host.put("run/fake/slowly-pillion-agent.service", "2\n")
    host.put("run/fake/late", "")
    ok(host.install("node", wait_s=1))
    asked = host.calls("restart", "is-active")
    agent, proxy = (asked.index(f"restart --no-block pillion-{name}.service") for name in ("agent", "proxy"))
    assert asked[agent:proxy].count("is-active pillion-agent.service") == 3, asked


def test_what_still_runs_keeps_its_environment(host: Host) -> None:
    """A proxy of before that has open connections; the first run after it has ended removes that."""
    host.fake_pip()
    ok(host.install(*NODE))
    old = os.readlink(host.root / "opt/pillion/current")
    shutil.copy2("/bin/sleep", host.root / old.lstrip("/") / "bin/held")
    host.put("wheels/pillion-1.0-py3-none-any.whl", "another build")
    with subprocess.Popen([*host.enter, f"{old}/bin/held", "60"]) as running:
        while f"{old}/bin/held" not in Path(f"/proc/{running.pid}/maps").read_text():
            assert running.poll() is None
        said = ok(host.install("node"))
        assert f"kept {old}" in said and (host.root / old.lstrip("/")).exists()
        running.kill()
    assert f"removed {old}" in ok(host.install("node"))
    assert "nothing to do" in ok(host.install("node"))


def test_only_what_the_lock_names_is_installed(host: Host) -> None:
    host.fake_pip()
    ok(host.install(*NODE))
    locked, own = host.pips()
    assert {"install", "--require-hashes", "--no-deps", "--no-index"} <= set(locked)
    assert locked[locked.index("--only-binary") + 1] == ":all:" and locked[-2:] == ["-r", str(LOCK)]
    assert own[-1].startswith("/wheels/pillion-") and {"--no-deps", "--no-index"} <= set(own)
    for name, text in entries(LOCK.read_text()).items():
        assert "--hash=sha256:" in text, name


def test_another_wheel_than_the_locked_one_is_refused(host: Host) -> None:
    """By the distribution's own pip, and before anything of it is in place."""
    name, text = next(iter(entries(LOCK.read_text()).items()))
    version = re.match(r"\S+==(\S+)", text)
    assert version is not None
    for each in entries(LOCK.read_text()):
        number = re.match(r"\S+==(\S+)", entries(LOCK.read_text())[each])
        assert number is not None
        host.put(f"wheels/{each.replace('-', '_')}-{number[1]}-py3-none-any.whl", "not what was locked")
    done = host.install(*NODE)
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr, done.stderr
    assert not (host.root / "opt/pillion/current").is_symlink() and not host.calls("start", "enable")
    assert name in done.stderr.lower()


def test_a_token_that_is_none_is_refused(host: Host) -> None:
    """What makes it failed, at the other end of a pipe."""
    host.fake_pip()
    done = host.install(*NODE, "--token", "/dev/null")
    assert done.returncode == 1 and "no token in /dev/null\n  on the controller: pillion node token n1" in done.stderr
    host.put("token", "a-token")
    ok(host.install(*NODE, "--token", "/token"))
    assert (host.root / "etc/pillion/join-token").read_text() == "a-token\n"
    assert "nothing to do" in ok(host.install("node", "--token", "/token"))


@pytest.mark.parametrize(("says", "waited"), [("compiling for this kernel: nodeagent.loader, 90 s so far", True), ("", False)])
def test_a_host_that_compiles_slowly_is_waited_for(host: Host, says: str, waited: bool) -> None:
    """The agent itself limits that; one that does not say what it is at is given up as ever."""
    host.fake_pip()
    host.put("token", "a-token")
    host.put("run/fake/says", f"{says}\n")
    host.put("run/fake/slow-pillion-agent.service", "2\n")
    done = host.install(*NODE, "--token", "/token", wait_s=1)
    assert (done.returncode == 0) is waited, done.stderr
    assert waited or "pillion-agent.service is not ready after 1 s: no reason given" in done.stderr


def test_on_another_system_nothing_is_done(host: Host) -> None:
    before = host.files()
    host.put("etc/os-release", 'ID=fedora\nVERSION_ID="42"\n')
    done = host.install(*NODE)
    assert done.returncode == 1 and "fedora 42" in done.stderr and "Debian 12" in done.stderr
    (host.root / "etc/os-release").unlink()
    assert {path for path in host.files().items() ^ before.items() if "os-release" not in path[0]} == set()


def test_what_an_operator_put_there_stays(host: Host) -> None:
    host.fake_pip()
    ok(host.install(*NODE))
    host.put("etc/pillion/own.yaml", "mine\n")
    host.put("usr/local/lib/systemd/system/own.service", "[Service]\nExecStart=/bin/true\n")
    assert "kept /etc/pillion" in ok(host.install("node", "--remove"))
    assert (host.root / "etc/pillion/own.yaml").read_text() == "mine\n"
    assert (host.root / "usr/local/lib/systemd/system/own.service").exists()
