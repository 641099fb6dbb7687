"""threats.md 5: a socket made outside the workload's cgroup, used inside it: no hook of its creation knows it."""

from __future__ import annotations

import subprocess
import sys

from tests.e2e.mesh import Mesh

SMUGGLE = """
import socket, sys
s = socket.socket()                                   # made outside: the maker's cgroup is the host's
open(sys.argv[1] + "/cgroup.procs", "w").write("0")   # and only then a member
s.settimeout(3)
try:
    s.connect((sys.argv[2], int(sys.argv[3])))
    print("PASSED")
except OSError as e:
    print(type(e).__name__)
"""


def smuggle(mesh: Mesh, host_cgroup: str, port: int, target: str) -> str:
    """From a cgroup of the node's own, below the hooks but no workload's, into the client's."""
    client = mesh.w["client"]
    join = f'echo $$ > {host_cgroup}/cgroup.procs; exec nsenter --net={client.pod.netns_path} "$@"'
    argv = ["sh", "-c", join, "sh", sys.executable, "-c", SMUGGLE, str(client.cgroup), mesh.w[target].addresses[0], str(port)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False).stdout.strip()


def test_a_socket_made_outside_is_refused(mesh: Mesh) -> None:
    """The maker sits below the hooks but is no member: its socket is foreign wherever it is used."""
    outside = mesh.lab.cgroup / "n1" / "workloads" / "outside"
    outside.mkdir()
    try:
        for target, port in (("web", 8080), ("echo", 7000)):
            assert smuggle(mesh, str(outside), port, target) in ("PermissionError", "")
    finally:
        outside.rmdir()


def test_a_socket_made_by_another_workload_is_refused(mesh: Mesh) -> None:
    before = mesh.denied("n1", "foreign_socket")
    assert smuggle(mesh, str(mesh.w["intruder"].cgroup), 8080, "web") == "PermissionError"
    assert mesh.denied("n1", "foreign_socket") > before
