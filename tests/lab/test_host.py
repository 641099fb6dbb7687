"""A host of namespaces: systemd runs in it, this machine's own kernel settings are out of its reach, and nothing of it stays."""

from __future__ import annotations

import os
import tempfile
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


def test_another_system_keeps_what_its_packages_enabled() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as layer:  # of another file system than the layer below
        units = Path(layer) / "etc/systemd/system"
        wants = units / "multi-user.target.wants"
        wants.mkdir(parents=True)
        Path(layer).chmod(0o755)
        os.setxattr(units, "trusted.overlay.opaque", b"y")  # nothing of this machine's
        (units / "kept.service").write_text("[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n")
        (wants / "kept.service").symlink_to("../kept.service")
        with Container(f"{SESSION}o", root=Path(f"{layer}:/")) as host:
            assert host.active("kept.service")
