"""install.sh where something goes wrong half way: the next run goes on from there, and --remove leaves nothing all the same."""

from __future__ import annotations

import fcntl
import subprocess

from tests.deploy import test_install
from tests.deploy.test_install import CONTROLLER, NODE, Host, ok

host = test_install.host
# In place of the distribution's: what is said of one package, and what was asked for
DPKG_QUERY = r"""#!/bin/sh
for last; do :; done
case $*$last in *Status*python3-bpfcc) [ -e /run/fake/has-bpfcc ] || exit 1 ;; esac
exec /usr/bin/dpkg-query "$@"
"""
APT_GET = r"""#!/bin/sh
echo "$*" >>/run/fake/apt
case " $* " in
*" update "*)
    [ -e /run/fake/busy ] || exit 0
    rm /run/fake/busy
    echo "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)"
    exit 100 ;;
*" -s install "*) echo "Inst libc6 [2.36] (2.37 Debian:12)"; echo "Inst python3-bpfcc (0.26 Debian:12)" ;;
*" install "*) : >/run/fake/has-bpfcc; kill -9 $PPID ;;
*" -s purge "*) echo "Purg python3-bpfcc [0.26]" ;;
*" purge "*) [ ! -e /run/fake/broken ] || { echo "E: dpkg was interrupted"; exit 100; }; rm /run/fake/has-bpfcc ;;
esac
"""
UNIT = "usr/local/lib/systemd/system/pillion-agent.service"
UPGRADE = """\
        new_code=yes
    settings_$role
    install_units
    did "wrote $1"
    begin
    did "restarted $1"
    rm -f $record/pending""".splitlines()
INSTALL = """\
    packages
    environment
    install_units
    pending
    did "wrote $1"
    begin
    old_environments""".splitlines()
REMOVE = """\
    for file in $settings; do rm -f "$etc/$file" "$etc/$file.new"; done
    # What says that there is something to remove goes last
        for each in $(sort -u $record/users); do
    rm -rf $record""".splitlines()


def test_an_upgrade_that_was_cut_is_finished(host: Host) -> None:
    """Wherever it was: what runs is what is there afterwards, of both roles, whichever of them is installed again."""
    host.fake_pip()
    host.put("token", "a-token")
    ok(host.install(*CONTROLLER))
    ok(host.install(*NODE))
    for number, line in enumerate(UPGRADE):
        if number < 2:
            host.put("wheels/pillion-1.0-py3-none-any.whl", line)
        else:
            host.put("token", f"token {number}")
            host.put(UNIT, "of before")
        host.cut(line, "node", "--token", "/token")
        said = ok(host.install(*((CONTROLLER, NODE)[number % 2])))
        restarted = {call.split()[-1] for call in host.calls("restart")}
        wanted = {f"pillion-{name}.service" for name in ("controller", "agent", "proxy")}
        assert restarted == wanted and host.calls("daemon-reload") and "nothing to do" not in said, f"{line}: {said}"
        ok(host.install("node", "--token", "/token"))
        said = ok(host.install("node", "--token", "/token"))
        if "removed /opt/pillion/venv-" in said and not host.calls("restart"):  # what was killed still ran from it a moment ago
            said = ok(host.install("node", "--token", "/token"))
        assert "nothing to do" in said, line


def test_what_is_not_started_is_not_forgotten(host: Host) -> None:
    host.fake_pip()
    ok(host.install(*NODE))
    host.put("wheels/pillion-1.0-py3-none-any.whl", "another build")
    ok(host.install("node", "--no-start"))
    assert not host.calls("restart")
    ok(host.install("node"))
    assert len(host.calls("restart")) == 2


def test_whatever_was_cut_is_removed(host: Host) -> None:
    """Installs, and removals."""
    host.fake_pip()
    host.put("tmp/token", "a-token")
    before, users = host.files(), host.users()
    for line in INSTALL:
        host.cut(line, *NODE, "--token", "/tmp/token")
        ok(host.install("node", "--remove"))
        assert host.files() == before and host.users() == users, line
    for line in REMOVE:
        ok(host.install(*NODE))
        host.cut(line, "node", "--remove")
        ok(host.install("node", "--remove"))
        assert host.files() == before and host.users() == users, line


def test_a_removal_that_cannot_go_on_says_so_and_can_be_repeated(host: Host) -> None:
    """A file system that is in use, a user who is."""
    host.fake_pip()
    before, users = host.files(), host.users()
    ok(host.install(*NODE))
    subprocess.run([*host.enter, "sh", "-c", "mkdir -p /run/pillion/bpf && mount -t tmpfs tmpfs /run/pillion/bpf"], check=True)
    with subprocess.Popen([*host.enter, "sh", "-c", "cd /run/pillion/bpf && echo ready && exec sleep 60"], stdout=-1) as within:
        assert within.stdout and within.stdout.readline()
        done = host.install("node", "--remove")
        assert done.returncode == 1 and "/run/pillion/bpf is in use" in done.stderr, done.stderr
        within.kill()
    host.put("usr/local/sbin/userdel", "#!/bin/sh\necho user $1 is used by process 7\nexit 8\n", 0o755)
    done = host.install("node", "--remove")
    assert done.returncode == 1 and "could not be removed: user pillion-proxy is used by process 7" in done.stderr
    assert "removed the user" not in done.stdout
    (host.root / "usr/local/sbin/userdel").unlink()
    assert "removed the user pillion-proxy" in ok(host.install("node", "--remove"))
    assert host.files() == before and host.users() == users


def test_a_full_disk_is_told_and_nothing_is_cut_off(host: Host) -> None:
    host.fake_pip()
    units = host.root / UNIT.rpartition("/")[0]
    units.mkdir(parents=True)
    subprocess.run([*host.enter, "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", f"/{UNIT.rpartition('/')[0]}"], check=True)
    done = host.install(*NODE)
    assert done.returncode == 1 and "could not be written\n  is the disk full?" in done.stderr, done.stdout + done.stderr
    assert not host.calls("start") and [each.name for each in units.iterdir()] == ["pillion.slice"]
    assert len((units / "pillion.slice").read_text()) > 100


def test_another_programs_name_is_seen_first(host: Host) -> None:
    host.fake_pip()
    host.put("usr/local/bin/pillion", "mine")
    before = host.files()
    done = host.install(*NODE)
    assert done.returncode == 1 and "/usr/local/bin/pillion is there and not ours" in done.stderr
    assert host.files() == before


def test_one_setting_leaves_the_others_as_they_are(host: Host) -> None:
    host.fake_pip()
    ok(host.install(*CONTROLLER, "--listen", "10.99.0.2:15443"))
    ok(host.install("controller", "--advertise", "10.1.1.1:15443"))
    ok(host.install("controller", "--trust-domain", "mesh.example"))
    assert host.calls("restart") == ["restart --no-block pillion-controller.service"]
    assert (host.root / "etc/pillion/controller.env").read_text().splitlines()[-1] == (
        "PILLION_CONTROLLER_OPTIONS=--listen 10.99.0.1:15443 --listen 10.99.0.2:15443 --advertise 10.1.1.1:15443"
        " --trust-domain mesh.example"
    )
    assert "nothing to do" in ok(host.install("controller", "--advertise", "10.1.1.1:15443"))
    ok(host.install(*NODE))
    ok(host.install("node", "--address", "10.99.0.7"))
    assert "PILLION_NODE=n1\nPILLION_AGENT_OPTIONS=--address 10.99.0.7\n" in (host.root / "etc/pillion/agent.env").read_text()


def test_one_at_a_time_though_the_lock_is_taken_away(host: Host) -> None:
    """Whoever waits for the lock of one that ends must not go on beside the one that came in between."""
    host.fake_pip()
    lock = host.root / "run/pillion-install.lock"
    with lock.open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with host.installing(*NODE) as running:
            assert running.stdout and "waiting for it" in running.stdout.readline()
            lock.unlink()
            with lock.open("w") as second:
                fcntl.flock(second, fcntl.LOCK_EX)
                fcntl.flock(first, fcntl.LOCK_UN)
                assert "waiting for it" in running.stdout.readline()
            out, err = running.communicate(timeout=100)
        assert running.returncode == 0, out + err
    assert not lock.exists()


def test_packages_are_waited_for_and_noted_before_they_are_there(host: Host) -> None:
    """Beside a host's own upgrade. Killed while apt-get is at it: what it put there is removed, what it replaced is not."""
    host.fake_pip()
    for name, text in {"dpkg-query": DPKG_QUERY, "apt-get": APT_GET, "sleep": "#!/bin/sh\n"}.items():
        host.put(f"usr/local/sbin/{name}", text, 0o755)
    host.put("run/fake/busy", "")
    assert host.install(*NODE).returncode == -9
    host.put("run/fake/broken", "")
    done = host.install("node", "--remove")
    assert done.returncode == 1 and "E: dpkg was interrupted" in done.stderr and "removed the packages" not in done.stdout
    (host.root / "run/fake/broken").unlink()
    assert "removed the packages it had installed" in ok(host.install("node", "--remove"))
    asked = (host.root / "run/fake/apt").read_text().splitlines()
    assert [each for each in asked if "install" in each or "purge" in each]
    assert all("-o DPkg::Lock::Timeout=" in each for each in asked if "-s purge" not in each), asked
    assert [each.partition("purge -y ")[2] for each in asked if "purge -y" in each] == ["python3-bpfcc"] * 2
    assert sum(each.endswith("update") for each in asked) == 2
