"""What is older than the programs, or came from outside."""

from __future__ import annotations

import os
import socket

import pytest

from nodeagent.datapath_live import Datapath
from nodeagent.enrol import foreign, inodes_of, plan
from nodeagent.sockdiag import Sock, State
from tests.nodeagent.kernel_world import world

SEEN, INSIDE = frozenset({5, 6}), frozenset({70})


def sock(**changes: object) -> Sock:
    fields: dict[str, object] = {
        "family": socket.AF_INET, "protocol": socket.IPPROTO_TCP, "state": State.ESTABLISHED, "local": "10.0.0.1",
        "local_port": 1, "remote": "10.0.0.2", "remote_port": 2, "inode": 9, "cgroup": 70, "id": b"",
        "storage": {5: b""},
    }  # fmt: skip
    return Sock(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"storage": {6: b""}}, False),
        ({"storage": {}}, True),
        ({"storage": {7: b""}}, True),
        ({"cgroup": 1}, True),  # passed in from outside
        ({"storage": {}, "state": State.TIME_WAIT}, False),
        ({"storage": {}, "protocol": socket.IPPROTO_UDP}, False),
        ({"cgroup": 1, "protocol": socket.IPPROTO_UDP}, True),
    ],
)
def test_foreign(changes: dict[str, object], expected: bool) -> None:
    assert foreign(sock(**changes), SEEN, INSIDE) is expected


def test_listeners_are_told_and_others_ended() -> None:
    old = sock(storage={})
    listener = sock(storage={}, state=State.LISTEN)
    elsewhere = sock(storage={}, inode=10)
    assert plan([old, listener, elsewhere, sock()], SEEN, INSIDE, None) == ([old, elsewhere], [listener])
    assert plan([old, listener, elsewhere], SEEN, INSIDE, {10}) == ([elsewhere], [])


def test_a_listener_that_no_hook_will_ever_see_is_ended() -> None:
    outside = [
        sock(cgroup=1, state=State.LISTEN, remote_port=0),
        sock(cgroup=1, protocol=socket.IPPROTO_UDP, state=State.CLOSE, remote_port=0),
    ]
    assert plan(outside, SEEN, INSIDE, None) == (outside, [])


def test_inodes_are_those_of_sockets() -> None:
    with socket.socket() as one:
        assert os.fstat(one.fileno()).st_ino in inodes_of([os.getpid()])
    assert inodes_of([2**22 + 1]) == set()


def test_a_connection_older_than_the_programs_is_ended() -> None:
    code = """
s = socket.create_server(("127.0.0.1", 9000))
c = socket.create_connection(("127.0.0.1", 9000))
a, _ = s.accept()
say("up")
try: c.recv(1)
except OSError as error: say(error.strerror)
"""
    with world() as made:
        workload = made.a.start(code)
        assert workload.stdout is not None and workload.stdout.readline() == "up\n"
        datapath = Datapath(made.cgroup, made.bpf_dir, made.run_dir)
        try:
            datapath.load()
            cookie = datapath.adopt(made.a.path)
            datapath.open_listeners(cookie, made.a.addresses)
            report = datapath.enrol(cookie)
            assert len(report.destroyed) >= 1 and not report.survived
            assert report.old_listeners == ("tcp 127.0.0.1:9000 -> 0.0.0.0:0 (listen)",)
            assert workload.stdout.readline().strip() in ("Software caused connection abort", "Connection reset by peer")
            again = datapath.enrol(cookie)
            assert not again.destroyed and not again.survived
            assert len(datapath.open_listeners(cookie, made.a.addresses)) == 8  # ours still stand
        finally:
            datapath.close()
            datapath.unload()


def test_on_a_shared_netns_only_the_workloads_own_sockets() -> None:
    code = """
s = socket.create_server(("127.0.0.1", {port}))
c = socket.create_connection(("127.0.0.1", {port}))
a, _ = s.accept()
say("up")
try: c.recv(1)
except OSError as error: say(error.strerror)
"""
    with world() as made:
        one, other = made.a.start(code.format(port=9000)), made.a.start(code.format(port=9001), made.cgroup / "workloads/b")
        assert one.stdout is not None and other.stdout is not None
        assert one.stdout.readline() == other.stdout.readline() == "up\n"
        datapath = Datapath(made.cgroup, made.bpf_dir, made.run_dir)
        try:
            datapath.load()
            report = datapath.enrol(datapath.adopt(made.a.path), made.a.cgroup)
            assert report.destroyed and all(":9000" in text for text in report.destroyed)
        finally:
            datapath.close()
            datapath.unload()
