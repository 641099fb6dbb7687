"""A host of namespaces: systemd runs in it, this machine's own kernel settings are out of its reach, and nothing of it stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab import __main__ as labs
from lab import cgroups, process
from lab.host import Container, container
from lab.pace import PATIENCE
from tests.conftest import SESSION
from tests.e2e.mesh import until

MAKER = """
import sys
from lab.host import Container
Container(sys.argv[1]).up()
print("up", flush=True)
sys.stdin.read()
"""


def test_it_boots_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "seen").write_text("from outside")
    with Container(f"{SESSION}b", binds={"/srv/outside": tmp_path}) as host:
        assert host.run(["cat", "/srv/outside/seen"]).stdout == "from outside"
        assert host.run(["touch", "/srv/outside/new"]).returncode != 0
        assert host.run(["sh", "-c", "echo 1 >/proc/sys/kernel/sysrq"]).returncode != 0
        host.put("/etc/systemd/system/one.service", b"[Service]\nType=oneshot\nExecStart=/bin/sh -c 'pwd >/run/one'\n")
        host.run(["systemctl", "start", "one"], check=True)
        assert host.run(["cat", "/run/one"]).stdout == "/\n"
        group = host.cgroup
        assert cgroups.populated(group)
    assert not group.exists() and not host.folder.exists()
    assert not Path("/etc/systemd/system/one.service").exists()
    assert f"pillion/host/{host.name}" not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("early", [True, False], ids=["while it boots", "when it is up"])
def test_down_takes_one_whose_maker_was_killed(early: bool, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{SESSION}k"
    argv = [sys.executable, "-c", MAKER, name]
    maker = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=process.environment())
    host = Container(name)
    try:
        if early:
            until(lambda: cgroups.populated(host.cgroup), "it does not boot")
        else:
            assert maker.stdout is not None and maker.stdout.readline() == "up\n"
        maker.kill()
        maker.communicate(timeout=10 * PATIENCE)
        assert cgroups.populated(host.cgroup)
        assert container.checkout_of(name) == str(container.CHECKOUT) and name in container.known()
        assert labs.main(["down", "--name", name]) == 0
        assert f"host {name} is down, nothing of it is left" in capsys.readouterr().err
        assert not host.cgroup.exists() and not host.folder.exists() and name not in container.known()
    finally:
        maker.kill()
        host.down()
