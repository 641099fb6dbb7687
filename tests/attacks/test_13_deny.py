"""security.md 13: a deny that never reaches what is open: native connections, tunnelled streams, idle ones.

(A frozen agent and the lease: tests/e2e/test_lease.py. Under load: tests/e2e/test_deny_under_load.py.)
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.pace import SLOW
from tests.attacks.actions import FAMILIES, address
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import ECHO_PORT, Background, Mesh, policy

FOR_EVER = Mutant(
    "b4",
    "what is open is decided anew",
    ("bpf/packet.h", "conn->generation && conn->generation == c->generation &&", "conn->generation &&"),
    ("nodeagent/datapath_live.py", "ended += len(destroy_where(", "ended += 0 * len((lambda *_: ())("),
    ("l7proxy/worker.py", "            session.recheck()\n", "            pass\n"),
)  # fmt: skip
SERVERS = ("echo", "echo-far")  # native; through a tunnel
HELD_S = 60.0 * SLOW
IN_FORCE_S = 1.0 * SLOW
DENY = "".join(policy(f"deny-{server}", server, action="DENY") for server in SERVERS)
OTHERS = "".join(policy(f"others-{server}", server, who="intruder") for server in SERVERS)


@contextmanager
def streams(mesh: Mesh, name: str, families: tuple[str, ...] = FAMILIES) -> Iterator[dict[tuple[str, str, str], Background]]:
    """Open ones of a workload, by server, family, and whether they idle."""
    held = {
        (server, family, how): mesh.program(name, "hold.py", address(mesh.w[server], family), ECHO_PORT, HELD_S, how)
        for server in SERVERS
        for family in families
        for how in ("idle", "busy")
    }
    try:
        for stream in held.values():
            assert stream.first_line().startswith("open ")
        yield held
    finally:
        for stream in held.values():
            stream.popen.kill()
            stream.popen.wait()


def ended(stream: Background, timeout_s: float) -> bool:
    try:
        return bool(stream.report(timeout_s)["error"])
    except subprocess.TimeoutExpired:
        return False


@pytest.mark.attack("keep what was open before the deny")
def test_a_deny_ends_what_is_open(mesh: Mesh, counted: Counted) -> None:
    mesh.apply(OTHERS)
    try:
        with streams(mesh, "client") as denied, streams(mesh, "intruder", ("v4",)) as allowed:
            ended_before = mesh.metric("n1", "pillion_datapath_connections_ended_total")
            with counted(mesh, "n1", "generation_denied", times=3):
                mesh.apply(DENY)
                left = [which for which, stream in denied.items() if not ended(stream, IN_FORCE_S)]
            assert left == []
            assert mesh.metric("n1", "pillion_datapath_connections_ended_total") >= ended_before + 3  # native and idle
            for stream in allowed.values():
                stream.popen.terminate()
            reports = [stream.report(5) for stream in allowed.values()]
            assert not any(report["error"] for report in reports), reports
    finally:
        for server in SERVERS:
            mesh.delete("AuthorizationPolicy", f"deny-{server}")
            mesh.delete("AuthorizationPolicy", f"others-{server}")
    assert mesh.echo("client", "echo.shop.mesh")


@pytest.mark.red("keep what was open before the deny", FOR_EVER)
def test_what_is_open_stays_without(broken: Mesh) -> None:
    with streams(broken, "client", ("v4",)) as denied:
        broken.apply(DENY)
        assert not any(ended(stream, IN_FORCE_S / 4) for stream in denied.values())
    for server in SERVERS:
        broken.delete("AuthorizationPolicy", f"deny-{server}")
