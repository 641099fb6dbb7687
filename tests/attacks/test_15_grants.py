"""security.md 15: a ServiceEntry opens the addresses that a name was answered with, to who asked for it, for a time. Whoever asks
by himself, lies to himself, or comes later, has nothing.

Outside is n2's host, with an address of the internet: the resolver the mesh asks, and a server.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from nodeagent.layouts import Layouts, address
from nodeagent.maps import BpfMap
from tests.attacks.actions import FAMILIES, PROGRAMS, OnHost, dial, on_host, run
from tests.attacks.mutants import Counted, Mutant
from tests.attacks.outside import FORGED, NODE, RIGHT, SERVERS, asking_outside, look_up, packed
from tests.attacks.test_15_names import ANY_SENDER
from tests.e2e.mesh import TRUST_DOMAIN, Mesh, until

RIGHT6 = "2606:2800:21f:cb07::14"
OTHER = "93.184.215.15"  # the server has it, and no name leads there
ON_LOOPBACK = (f"{RIGHT}/32", f"{OTHER}/32", f"{RIGHT6}/128")
OPEN, SHUT, DATAGRAMS = 443, 8443, 4433
TRIES = 5
METADATA = "169.254.169.254"

FOR_ALL = Mutant(
    "b1",
    "an answer opens its addresses to who asked",
    (
        "nodeagent/grants.py",
        "            Open(workload, text, port, protocol): rule_number(way.rule)\n            for way in ways\n",
        "            Open(each, text, port, protocol): rule_number(way.rule)\n"
        "            for each in self._netns\n            for way in ways\n",
    ),
)
FOR_EVER = Mutant(
    "b1",
    "what an answer opens has an end",
    ("bpf/common.h", "  return boot_ns() < g->until_ns ? PL_R_OUTBOUND_ALLOWED", "  return 1 ? PL_R_OUTBOUND_ALLOWED"),
)
ANYWHERE = Mutant(
    "b1",
    "the agent opens nothing that is inside",
    ("nodeagent/grants.py", "        return not outside(text) or str(", "        return 0 and str("),
)
KEPT = Mutant(
    "b1",
    "what no policy names any more is closed",
    (
        "nodeagent/grants.py",
        "        for opened, rules in self._open.items():\n            for rule",
        "        for opened, rules in ():\n            for rule",
    ),
)

FORWARD = '["*.known.test"]'
ENTRY = f"""---
apiVersion: mesh.pillion.dev/v1alpha1
kind: ServiceEntry
metadata: {{name: partner, namespace: shop}}
spec:
  hosts: ["*.partner.test"]
  ports: [{{number: {OPEN}, protocol: TLS}}, {{number: {DATAGRAMS}, protocol: UDP}}]
  principals: ["{TRUST_DOMAIN}/ns/shop/sa/client"]
"""


@dataclass
class Outside:
    mesh: Mesh

    def ask(self, who: str, name: str, kind: str = "A", **how: str) -> list[str]:
        return look_up(self.mesh, who, name, kind=kind, **how).answer

    def opens(self, name: str = "api.partner.test.", kind: str = "A", **how: str) -> list[str]:
        """What the client, who may, is answered. Anew where a busy agent was late: the answer went out and opened nothing."""
        for _ in range(TRIES):
            before = self.mesh.denied("n1", "grant_refused")
            answer = self.ask("client", name, kind, **how)
            if self.mesh.denied("n1", "grant_refused") == before:
                break
        return answer

    def reaches(self, who: str, to: str = RIGHT, port: int = OPEN) -> bool:
        """A whole exchange; what is not allowed is refused at connect()."""
        done = dial(self.mesh.w[who], to, port)
        assert done.error in ("", "PermissionError"), done
        return not done.error and done.answer.startswith("outside at")

    def close(self) -> None:
        """Nothing is open: what opened it is taken away, and comes back."""
        self.mesh.delete("ServiceEntry", "partner")
        self.mesh.apply(ENTRY)


@contextmanager
def world(mesh: Mesh) -> Iterator[Outside]:
    asking, there = mesh.lab.nodes["n1"], mesh.lab.nodes[NODE]
    v4, v6 = there.addresses[:2]
    beside = {
        "datagrams": ("resolver.py", DATAGRAMS, RIGHT, RIGHT6),
        "outside": ("outside.py", f"{OPEN},{SHUT}", RIGHT, OTHER, RIGHT6),
    }
    for each in ON_LOOPBACK:
        assert there.run(["ip", "address", "add", each, "dev", "lo"]).returncode == 0
    for to, via in ((RIGHT, v4), (OTHER, v4), (METADATA, v4), (RIGHT6, v6)):
        assert asking.run(["ip", "route", "replace", to, "via", via]).returncode == 0
    try:
        with asking_outside(mesh, FORWARD, ENTRY, beside=beside):
            yield Outside(mesh)
            mesh.delete("ServiceEntry", "partner")
    finally:
        for each in ON_LOOPBACK:
            there.run(["ip", "address", "del", each, "dev", "lo"])
        for to in (RIGHT, OTHER, METADATA, RIGHT6):
            asking.run(["ip", "route", "del", to])


@pytest.fixture(scope="module")
def _outside(mesh: Mesh) -> Iterator[Outside]:
    with world(mesh) as made:
        yield made


@pytest.fixture
def outside(_outside: Outside) -> Outside:
    _outside.close()
    return _outside


@pytest.fixture
def broken_outside(broken: Mesh) -> Iterator[Outside]:
    with world(broken) as made:
        yield made


# ---- what a name opens, and nothing beside it


@pytest.mark.attack("somebody else's answer")
@pytest.mark.parametrize("by", ["udp", "tcp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_opens_its_addresses_to_who_asked(outside: Outside, counted: Counted, family: str, by: str) -> None:
    mesh, there = outside.mesh, {"v4": RIGHT, "v6": RIGHT6, "mapped": f"::ffff:{RIGHT}"}[family]
    name = f"x{packed(RIGHT6)}.partner.test." if family == "v6" else "api.partner.test."
    with counted(mesh, "n1", "outbound_denied"):
        assert not outside.reaches("client", there)  # nobody has asked
    found = outside.opens(name, "AAAA" if family == "v6" else "A", family=family, by=by)
    assert found == [there.removeprefix("::ffff:")]
    assert outside.reaches("client", there)
    with counted(mesh, "n1", "outbound_denied", times=3):
        assert not outside.reaches("client", there, SHUT)
        assert not outside.reaches("client", OTHER)
        assert not outside.reaches("intruder", there)
    with counted(mesh, "n1", "dns_name_denied"):
        assert look_up(mesh, "intruder", name, family=family, by=by).rcode == "REFUSED"
    with counted(mesh, "n1", "outbound_denied"):
        assert not outside.reaches("intruder", there)


@pytest.mark.attack("somebody else's answer")
def test_datagrams_too(outside: Outside, counted: Counted) -> None:
    mesh = outside.mesh

    def served(who: str) -> str:
        return str(run(mesh.w[who], "lookup.py", RIGHT, DATAGRAMS, "udp", "A", "a.test.")["error"])

    assert outside.opens() == [RIGHT]
    assert served("client") == ""
    with counted(mesh, "n1", "outbound_denied"):
        assert served("intruder") == "PermissionError"


@pytest.mark.attack("somebody else's answer")
def test_what_may_be_known_may_not_be_reached(outside: Outside, counted: Counted) -> None:
    assert outside.ask("intruder", "www.known.test.") == [RIGHT]
    with counted(outside.mesh, "n1", "outbound_denied"):
        assert not outside.reaches("intruder")


@pytest.mark.attack("somebody else's answer")
def test_who_lives_beside_the_asker_has_no_part_in_it(outside: Outside, counted: Counted) -> None:
    """Two identities in the node's own namespace: the address is the same, the socket tells who asked. A name that not all of
    them may ask for is told to nobody there."""
    mesh = outside.mesh
    mesh.apply(ENTRY.replace("hosts: [", 'hosts: ["www.known.test", '))

    def ask(who: OnHost, name: str) -> str:
        found = run(who, "lookup.py", SERVERS["v4"], 53, "udp", "A", name)
        return ",".join(found["answer"]) or found["rcode"] or found["error"]

    with on_host(mesh, "n1", "good", "client") as good, on_host(mesh, "n1", "bad", "intruder") as bad:
        with counted(mesh, "n1", "dns_name_denied", times=2):
            assert [ask(who, "api.partner.test.") for who in (good, bad)] == ["REFUSED"] * 2
        with counted(mesh, "n1", "grant_refused"):
            assert ask(bad, "www.known.test.") == RIGHT
        with counted(mesh, "n1", "outbound_denied", times=2):
            assert not dial(good, RIGHT, OPEN).opened
            assert not dial(bad, RIGHT, OPEN).opened
        for _ in range(TRIES):  # as in `opens`
            assert ask(good, "www.known.test.") == RIGHT
            found = dial(good, RIGHT, OPEN)
            if found.opened:
                break
        assert found.answer.startswith("outside at")
        with counted(mesh, "n1", "outbound_denied"):
            assert not dial(bad, RIGHT, OPEN).opened


@pytest.mark.red("somebody else's answer", FOR_ALL)
def test_an_answer_opens_its_addresses_to_all_without(broken_outside: Outside) -> None:
    assert not broken_outside.reaches("intruder")
    assert broken_outside.opens() == [RIGHT]
    assert broken_outside.reaches("intruder")


# ---- lies


@pytest.mark.attack("an answer of one's own")
def test_only_the_meshs_resolver_opens_anything(outside: Outside, counted: Counted) -> None:
    """Its own resolver may say what it likes; who forges answers to the mesh's opens nothing."""
    mesh = outside.mesh
    client = mesh.w["client"]
    own = client.start([sys.executable, str(PROGRAMS / "resolver.py"), "5300", "127.0.0.1"], name="own-resolver")
    try:
        until(lambda: "ready" in own.output(), "its resolver does not listen")
        assert run(client, "lookup.py", "127.0.0.1", 5300, "udp", "A", "api.partner.test.")["answer"] == [RIGHT]
    finally:
        own.kill()
    with counted(mesh, "n1", "outbound_denied"):
        assert not outside.reaches("client")
    with counted(mesh, "n1", "dns_stray_answer", times=3):
        assert outside.ask("client", "forged.partner.test.") == [RIGHT]
    with counted(mesh, "n1", "outbound_denied"):
        assert not outside.reaches("client", FORGED)
    assert outside.reaches("client")


@pytest.mark.red("an answer of one's own", ANY_SENDER)
def test_a_forged_answer_opens_an_address_without(broken_outside: Outside) -> None:
    assert broken_outside.ask("client", "forged.partner.test.") == [FORGED]
    assert dial(broken_outside.mesh.w["client"], FORGED, OPEN, timeout_s=0.5).opened


# ---- inside


@pytest.mark.attack("a name for what is inside")
@pytest.mark.parametrize("there", [METADATA, "127.0.0.1", "fe80::1", "10.77.0.11", "10.77.0.12", "100.64.0.1"])
def test_no_name_opens_what_is_inside(outside: Outside, counted: Counted, there: str) -> None:
    mesh = outside.mesh
    with counted(mesh, "n1", "dns_rebinding"):
        assert look_up(mesh, "client", f"x{packed(there)}.partner.test.", kind="AAAA" if ":" in there else "A").answer == []
    if there != "127.0.0.1":  # its own
        with counted(mesh, "n1", "outbound_denied"):
            assert not dial(mesh.w["client"], there, OPEN).opened


@pytest.mark.red("a name for what is inside", ANYWHERE)
def test_a_name_opens_what_is_inside_without(broken_outside: Outside) -> None:
    """Together with what reads the answers: `test_a_name_from_outside_leads_inside_without`."""
    mesh = broken_outside.mesh
    assert look_up(mesh, "client", f"x{packed(METADATA)}.partner.test.").answer == [METADATA]
    assert dial(mesh.w["client"], METADATA, OPEN, timeout_s=0.5).opened


# ---- the end of it


class Map:
    """The kernel's own, of n1: time passes faster there."""

    def __init__(self, mesh: Mesh) -> None:
        run = mesh.lab.paths.base
        self._layouts = Layouts.read(next(run.glob("n1/**/layouts.json")))
        self._path = next(run.glob("n1/**/maps/grants"))

    def expire(self, there: str) -> int:
        """All that is open to this address is over now; how many entries."""
        table, key, value = BpfMap.open(self._path), self._layouts["pl_grant_key"], self._layouts["pl_grant"]
        try:
            found = {k: v for k, v in table.items().items() if key.unpack(k)["addr"] == address(there)}
            for raw, leaf in found.items():
                table.put(raw, value.pack(**{**value.unpack(leaf), "until_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME)}))
        finally:
            table.close()
        return len(found)


class Kept:
    """A connection that stays."""

    def __init__(self, mesh: Mesh, who: str, there: str) -> None:
        argv = [sys.executable, str(PROGRAMS / "stay.py"), there, str(OPEN)]
        self._popen = subprocess.Popen(
            mesh.w[who].place.argv(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._line() == "open"

    def _line(self) -> str:
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().strip()

    def says(self) -> str:
        assert self._popen.stdin is not None
        self._popen.stdin.write("\n")
        self._popen.stdin.flush()
        return self._line()

    def close(self) -> None:
        self._popen.communicate(timeout=20)


@pytest.fixture
def kept(outside: Outside) -> Iterator[Kept]:
    assert outside.opens() == [RIGHT]
    made = Kept(outside.mesh, "client", RIGHT)
    yield made
    made.close()


@pytest.mark.attack("an answer that is over")
def test_past_its_time_nothing_new_is_let_out(outside: Outside, counted: Counted, kept: Kept) -> None:
    mesh = outside.mesh
    assert Map(mesh).expire(RIGHT) == 4  # two ports, for the workload and for its cable
    with counted(mesh, "n1", "grant_expired"):
        assert not outside.reaches("client")
    assert kept.says() == f"outside at {RIGHT}"  # what is open goes on, also when all is judged anew
    mesh.apply(ENTRY.replace("hosts: [", 'hosts: ["more.test", '))
    assert kept.says() == f"outside at {RIGHT}"
    assert outside.opens() == [RIGHT]
    assert outside.reaches("client")


@pytest.mark.red("an answer that is over", FOR_EVER)
def test_past_its_time_all_is_let_out_without(broken_outside: Outside) -> None:
    assert broken_outside.opens() == [RIGHT]
    Map(broken_outside.mesh).expire(RIGHT)
    assert broken_outside.reaches("client")


@pytest.mark.attack("a right that was taken away")
def test_what_no_entry_names_is_closed(outside: Outside, counted: Counted, kept: Kept) -> None:
    mesh = outside.mesh
    assert kept.says() == f"outside at {RIGHT}"
    mesh.apply(ENTRY.replace("*.partner.test", "*.other.test"))
    assert kept.says() in ("ConnectionAbortedError", "ConnectionResetError", "TimeoutError", "closed")
    with counted(mesh, "n1", "outbound_denied"):
        assert not outside.reaches("client")
    assert outside.ask("client", "api.partner.test.") == []


@pytest.mark.red("a right that was taken away", KEPT)
def test_what_no_entry_names_stays_open_without(broken_outside: Outside) -> None:
    mesh = broken_outside.mesh
    assert broken_outside.opens() == [RIGHT]
    mesh.apply(ENTRY.replace("*.partner.test", "*.other.test"))
    assert broken_outside.reaches("client")
