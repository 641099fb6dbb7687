"""A host of namespaces: systemd runs in it, this machine's own kernel settings are out of its reach, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path

from lab import cgroups
from lab.host import Container
from tests.conftest import SESSION


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
