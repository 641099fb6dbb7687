"""threats.md 10: the proxy that runs, as the kernel sees it. (What its confinement refuses: tests/l7proxy/test_confine.py.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.mesh import Mesh


@pytest.mark.parametrize("what", ["proxy", "proxy-worker"])
def test_the_running_proxy_has_nothing(mesh: Mesh, what: str) -> None:
    for node in ("n1", "n2"):
        pids = mesh.lab.pids(node, what)
        assert pids
        for pid in pids:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
            for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(status[name], 16) == 0, name
            assert status["NoNewPrivs"].strip() == "1"
            assert status["Seccomp"].strip() == "2"
            assert "0" not in status["Uid"].split()
            assert "0" not in status["Gid"].split()
            assert status["Groups"].strip() in ("", status["Gid"].split()[0])
            assert [line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]] == ["lo"]
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
            assert not any(Path(f"/proc/{pid}/net/route").read_text().splitlines()[1:])
