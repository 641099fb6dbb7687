"""security.md 4: make the proxy read a wrong original destination."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.pace import SLOW
from tests.attacks.actions import FAMILIES, Dialled, address, dial, host, loopback, on_host, run
from tests.attacks.mutants import Counted, Mutant
from tests.e2e.mesh import HTTP_PORT, Mesh

OUR_PORTS_OPEN = Mutant(
    "a",
    "connect() denies our ports",
    (
        "bpf/choice.h",
        "  if (port == PL_PORT_OUTBOUND || port == PL_PORT_HBONE || (port == PL_PORT_DNS && is_loopback(dst)))\n"
        "    return PL_R_RESERVED_PORT;\n",
        "",
    ),
)
FIRST_ORIGIN_STAYS = Mutant(
    "a",
    "a new connect() ends the old origin",
    ("bpf/connect.c", "  origins.sk_storage_delete(sk);\n  leave_express(sk);\n", "  leave_express(sk);\n"),
)
_NEVER_FORGOTTEN = ("bpf/sockops.c", "  if (arriving.delete(f) != 0)", "  if (1)")
OLD_ARRIVAL_STAYS = Mutant(
    "b",
    "a record goes with its connection",
    _NEVER_FORGOTTEN,
    ("bpf/sockops.c", "    return false;\n  __sync_fetch_and_add(&u->arriving, 1);\n", "    return true;\n"),
)
EVICTING_MAP = Mutant(
    "c",
    "the origin is in the socket, not in an LRU map",
    (
        "bpf/maps.h",
        'PL_MAP("hash", arriving, struct pl_flow, struct pl_arrival, 16384, 0)',
        'PL_MAP("lru_hash", arriving, struct pl_flow, struct pl_arrival, 1024, 0)',
    ),
    ("bpf/connect.c", "  return u && u->arriving >= most;\n", "  return false && most;\n"),
    _NEVER_FORGOTTEN,
    ("bpf/sockops.c", "  if (!u || arriving.insert(f, a) != 0)", "  if (!u || arriving.update(f, a) != 0)"),
    ("bpf/sockops.c", "      origins.sk_storage_get(sk, &a->origin, BPF_SK_STORAGE_GET_F_CREATE);\n", "      ;\n"),
    (
        "bpf/origin.c",
        "  o = origins.sk_storage_get(sk, 0, 0);\n  if (!o)\n    return 1;\n",
        "  struct pl_flow f = {};\n  struct pl_addr there, here;\n  set_v4(&there, sk->dst_ip4);\n"
        "  set_v4(&here, sk->src_ip4);\n"
        "  set_flow(&f, netns_cookie(ctx), &there, ntoh16(sk->dst_port), &here, sk->src_port);\n"
        "  struct pl_arrival *late = arriving.lookup(&f);\n  if (!late)\n    return 1;\n  o = &late->origin;\n",
    ),
)
NAT_IS_BELIEVED = Mutant(
    "b",
    "SO_ORIGINAL_DST is not asked",
    (
        "l7proxy/capture.py",
        "        origin = worker.kernel.origin(sock)\n",
        "        origin = worker.kernel.origin(sock)\n"
        "        if origin is None:\n"
        "            raw = sock.getsockopt(0, 80, 16)\n"
        "            own = next(iter(worker.config.by_id.values()))\n"
        "            asked = socket.inet_ntoa(raw[4:8]), int.from_bytes(raw[2:4], 'big')\n"
        "            origin = Origin(*asked, '192.0.2.1', 1, listener.netns, own.id, own.identity, 0)\n"
        "            worker.metrics.denied('believed')\n",
    ),
)

# From each processor: what an LRU map took last on one of them is not evicted for what others bring
FLOOD = """
import os, socket, sys
for processor in os.sched_getaffinity(0):
    os.sched_setaffinity(0, [processor])
    for i in range(4000):
        to = sys.argv[1 + i % 2]
        s = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET)
        s.setblocking(False)
        s.connect_ex((to, 8080))
        s.close()
"""
WAYS = ("connect", "nonblocking", "fastopen", "mptcp", "uring")
SOURCE_PORT = 47011
UNDER_WAY_MAX = 2048  # connectsUnderWay of MeshConfig


@pytest.mark.attack("dial the proxy's listener")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_workload_cannot_dial_the_proxys_listener(mesh: Mesh, counted: Counted, family: str, way: str) -> None:
    intruder = mesh.w["intruder"]
    with counted(mesh, "n1", "reserved_port", times=2):
        assert not dial(intruder, loopback(family), 15001, way).opened
        assert not dial(intruder, address(mesh.w["web"], family), 15008, way).opened
    assert "web for" in dial(mesh.w["client"], address(mesh.w["web"], family), HTTP_PORT, way).answer


@pytest.mark.red("dial the proxy's listener", OUR_PORTS_OPEN)
def test_the_listener_is_dialled_without(broken: Mesh) -> None:
    assert dial(broken.w["intruder"], "127.0.0.1", 15001).opened


def reuse(mesh: Mesh, family: str, then: str = "far") -> Dialled:
    """A captured connection, disconnected (AF_UNSPEC) and used again for another destination."""
    return dial(mesh.w["client"], ",".join(address(mesh.w[name], family) for name in ("web", then)), HTTP_PORT, "again")


@pytest.mark.attack("a captured socket used again")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reused_socket_means_its_newest_destination(mesh: Mesh, counted: Counted, family: str) -> None:
    assert "far for" in reuse(mesh, family).answer
    with counted(mesh, "n1", "port_undeclared"):
        assert not reuse(mesh, family, "dark").opened


@pytest.mark.red("a captured socket used again", FIRST_ORIGIN_STAYS)
def test_a_reused_socket_means_its_first_destination_without(broken: Mesh) -> None:
    assert "web for" in reuse(broken, "v4").answer


@contextmanager
def two_in_one_netns(mesh: Mesh) -> Iterator[list[tuple[Dialled, Dialled]]]:
    """By family: an allowed identity's connection, and at once one of another identity of that namespace from the same port."""
    with on_host(mesh, "n1", "good", "client") as good, on_host(mesh, "n1", "bad", "intruder") as bad:

        def both(number: int, to: str) -> tuple[Dialled, Dialled]:
            port = SOURCE_PORT + number
            return dial(good, to, HTTP_PORT, source_port=port), dial(bad, to, HTTP_PORT, source_port=port)

        yield [both(number, address(mesh.w["web"], family)) for number, family in enumerate(FAMILIES)]


@pytest.mark.attack("an old source port, by another identity")
def test_a_source_port_carries_no_identity(mesh: Mesh, counted: Counted) -> None:
    with counted(mesh, "n1", "policy_denied", times=len(FAMILIES)), two_in_one_netns(mesh) as found:
        for good, bad in found:
            assert "web for" in good.answer
            assert "403" in bad.answer.partition("\r\n")[0]


@pytest.mark.red("an old source port, by another identity", OLD_ARRIVAL_STAYS)
def test_a_source_port_carries_an_identity_without(broken: Mesh) -> None:
    with two_in_one_netns(broken) as found:
        for good, bad in found:
            assert "web for" in good.answer
            assert "web for" in bad.answer


def flooded(mesh: Mesh) -> list[str]:
    """The victim connects, by IPv4 and by IPv6; 4,000 connects on each processor follow before the proxy comes to it, then more
    of them at once than one identity may have under way."""
    workers = mesh.lab.pids("n1", "proxy-worker")
    web, victims = mesh.w["web"].addresses[:2], []
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        for number, to in enumerate(web):
            argv = ["curl", "-sS", "--max-time", "20", f"http://{host(to)}:{HTTP_PORT}/"]
            victims.append(mesh.w["client"].start(argv, name=f"victim-{os.getpid()}-{number}"))
        for to in ("127.0.0.1", "[::1]"):
            mesh.established("client", 15001, to)
        mesh.w["intruder"].run([sys.executable, "-c", FLOOD, *web], timeout=30)
        run(mesh.w["intruder"], "under_way.py", UNDER_WAY_MAX + 100, 0, *web)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    for victim in victims:
        victim.wait(25.0)
    return [victim.output() for victim in victims]


@pytest.mark.attack("a flood of connects evicts an origin")
def test_a_flood_of_connects_evicts_nobodys_origin(mesh: Mesh, counted: Counted) -> None:
    with counted(mesh, "n1", "budget_connects", times=100):
        assert ["web for" in answer for answer in flooded(mesh)] == [True, True]


@pytest.mark.red("a flood of connects evicts an origin", EVICTING_MAP)
def test_a_flood_of_connects_evicts_an_origin_without(broken: Mesh) -> None:
    """That of the victim by IPv4: the patch knows no other."""
    assert "web for" in broken.curl("client", f"http://{host(broken.w['web'].addresses[0])}:{HTTP_PORT}/")[1]
    assert "web for" not in flooded(broken)[0]


def redirected(mesh: Mesh, to: str = "127.0.0.1") -> str:
    return str(run(mesh.w["intruder"], "redirect.py", to, 9999, 15001, 5.0 * SLOW)["error"])


@pytest.mark.attack("a NAT rule towards the listener")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_nat_rule_is_no_origin(mesh: Mesh, counted: Counted, family: str) -> None:
    with counted(mesh, "n1", "no_origin"):
        assert redirected(mesh, loopback(family)) in ("closed", "ConnectionResetError")


@pytest.mark.red("a NAT rule towards the listener", NAT_IS_BELIEVED)
def test_a_nat_rule_is_believed_without(broken: Mesh) -> None:
    before = broken.denied("n1", "believed")
    redirected(broken)
    assert broken.denied("n1", "believed") > before
