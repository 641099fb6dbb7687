from __future__ import annotations

import pytest

from tests.bpf.families import FAMILIES, Family
from tests.bpf.steps import refused, silent
from tests.bpf.world import DNS, IDENTITY, World

PORT, UDP = 7500, 17
DGRAM = "socket.SOCK_DGRAM"


def serve(world: World, family: Family, backends: int = 1) -> None:
    """Workload b answers datagrams on ``backends`` ports, with its port in front."""
    for slot in range(backends):
        world.b(family.server(f"l{slot}", family.host("b"), PORT + slot, DGRAM))
        world.allow("b", IDENTITY["a"], PORT + slot, UDP)
    world.native(family.vip, 5353, [(family.host("b"), PORT + slot) for slot in range(backends)], proto=UDP)


def done(world: World, backends: int = 1) -> None:
    world.a("s.close()")
    for slot in range(backends):
        world.b(f"l{slot}.close()")
    assert world.maps["datagrams"].keys() == []


def test_a_service_answers_under_its_own_name(world: World, family: Family) -> None:
    serve(world, family)
    vip = (family.spell(family.vip), 5353)
    world.a(family.udp("s"))
    world.a(f"s.sendto(b'ask', {vip!r})")
    world.b("data, who = l0.recvfrom(9)")
    assert world.b("data, who[:2]") == (b"ask", (family.spell(family.host("a")), world.a("s.getsockname()[1]")))
    world.b("l0.sendto(b'answer', who)")
    assert world.a("s.recvfrom(9)")[1][:2] == vip
    done(world)


def test_a_connected_socket_does_the_same(world: World, family: Family) -> None:
    serve(world, family)
    vip = (family.spell(family.vip), 5353)
    world.a(family.udp("s"))
    world.a(f"s.connect({vip!r}); s.send(b'ask')")
    assert world.a("s.getpeername()[:2]") == vip
    world.b("data, who = l0.recvfrom(9); l0.sendto(b'answer', who)")
    answer = world.a("s.recvfrom(9)")
    assert answer[0] == b"answer" and answer[1][:2] == vip
    done(world)


def test_a_socket_made_by_another_member_sends_nothing(world: World, family: Family) -> None:
    serve(world, family)
    vip, before = (family.spell(family.vip), 5353), world.count("foreign_socket")
    world.b(family.udp("s"))
    world.a.give("s", world.b("s"))
    refused(world.a, f"s.sendto(b'ask', {vip!r})")
    refused(world.a, f"s.connect({vip!r})")
    assert world.count("foreign_socket") == before + 2
    world.b("s.close()")
    done(world)


def test_sockets_are_spread_over_backends_and_stay(world: World, family: Family) -> None:
    serve(world, family, backends=2)
    world.b("import select")
    taken = [0, 0]
    for _ in range(40):  # by chance; ten for one backend is not rare enough
        world.a(family.udp("s"))
        world.a(f"for _ in range(3): s.sendto(b'x', ({family.spell(family.vip)!r}, 5353))")
        world.b(
            "got = [0, 0]\nwhile sum(got) < 3:\n  ready, _, _ = select.select([l0, l1], [], [], 9)\n  assert ready\n"
            "  for l in ready: l.recv(1); got[l is l1] += 1"
        )
        got = world.b("got")
        assert sorted(got) == [0, 3]
        taken = [taken[slot] + (got[slot] > 0) for slot in (0, 1)]
        world.a("s.close()")
        if min(taken):
            break
    assert min(taken) > 0
    done(world, 2)


def test_a_dead_backend_is_left(world: World, family: Family) -> None:
    serve(world, family, backends=2)
    world.a(family.udp("s"))
    world.a(f"s.sendto(b'x', ({family.spell(family.vip)!r}, 5353))")
    world.b("import select; first = 0 if select.select([l0, l1], [], [], 2)[0] == [l0] else 1")
    other = 1 - world.b("first")
    world.native(family.vip, 5353, [(family.host("b"), PORT + other)], proto=UDP)
    world.a(f"s.sendto(b'y', ({family.spell(family.vip)!r}, 5353))")
    assert world.b(f"l{other}.recv(1)") == b"y"
    done(world, 2)


def test_policy_decides_at_send(world: World, family: Family) -> None:
    serve(world, family)
    world.forbid("b", IDENTITY["a"], PORT, UDP)
    before = world.count("policy_denied")
    world.a(family.udp("s"))
    refused(world.a, f"s.sendto(b'x', ({family.spell(family.vip)!r}, 5353))")
    refused(world.a, f"s.connect(({family.spell(family.vip)!r}, 5353))")
    assert world.count("policy_denied") == before + 2
    done(world)


def test_a_new_generation_stops_a_connected_socket(world: World, family: Family) -> None:
    serve(world, family)
    world.a(family.udp("s"))
    world.a(f"s.connect(({family.spell(family.vip)!r}, 5353)); s.send(b'1')")
    assert world.b("l0.recv(1)") == b"1"
    world.forbid("b", IDENTITY["a"], PORT, UDP)
    world.bump()
    before = world.count("generation_denied")
    refused(world.a, "s.send(b'2')")
    assert world.count("generation_denied") == before + 1
    done(world)


def test_services_elsewhere_are_denied(world: World, family: Family) -> None:
    world.dest(family.vip, 5353, "PROXY", proto=UDP)
    before = world.count("udp_remote")
    world.a(family.udp("s"))
    refused(world.a, f"s.sendto(b'x', ({family.spell(family.vip)!r}, 5353))")
    assert world.count("udp_remote") == before + 1
    world.a("s.close()")


def test_unknown_destinations_by_egress(world: World, family: Family) -> None:
    host = family.host("out")
    world.out(family.server("l", host, PORT, DGRAM))
    world.a(family.udp("s"))
    refused(world.a, f"s.sendto(b'x', ({family.spell(host)!r}, {PORT}))")
    world.egress(f"{host}/{128 if family.name == 'v6' else 32}", ports=(PORT,))
    world.a(f"s.sendto(b'ask', ({family.spell(host)!r}, {PORT}))")
    world.out("data, who = l.recvfrom(9); l.sendto(b'answer', who)")
    assert world.a("s.recv(9)") == b"answer"
    world.out("l.close()")
    world.a("s.close()")


def test_datagrams_from_outside_are_dropped(world: World, family: Family) -> None:
    world.b(family.server("s", family.host("b"), PORT, DGRAM))
    world.allow("b", 0, PORT, UDP)
    before = world.count("ingress_plaintext")
    world.out(family.udp("s"))
    world.out(f"s.sendto(b'x', ({family.spell(family.host('b'))!r}, {PORT}))")
    silent(world.b, "s.recv(1)")
    assert world.count("ingress_plaintext") == before + 1
    world.permissive("b")
    world.out(f"s.sendto(b'ask', ({family.spell(family.host('b'))!r}, {PORT}))")
    world.b("s.settimeout(3); data, who = s.recvfrom(9); s.sendto(b'answer', who)")
    assert world.out("s.recv(9)") == b"answer"
    world.b("s.close()")
    world.out("s.close()")


def test_answers_of_strangers_are_dropped(world: World, family: Family) -> None:
    """Only whom the socket asked may answer."""
    host = family.host("out")
    world.configure(outbound_allow=1)
    world.out(family.server("l", host, PORT, DGRAM))
    world.out(family.server("m", host, PORT + 1, DGRAM))
    world.a(family.udp("s"))
    world.a(f"s.sendto(b'ask', ({family.spell(host)!r}, {PORT}))")
    world.out("data, who = l.recvfrom(9); m.sendto(b'forged', who)")
    silent(world.a, "s.recv(9)")
    world.out("l.sendto(b'answer', who)")
    world.a("s.settimeout(3)")
    assert world.a("s.recv(9)") == b"answer"
    world.out("l.close(); m.close()")
    world.a("s.close()")


def test_loopback_of_ones_own_netns_passes(world: World, family: Family) -> None:
    world.a(family.server("l", family.loopback, PORT, DGRAM))
    world.a(family.udp("s"))
    world.a(f"s.sendto(b'own', ({family.spell(family.loopback)!r}, {PORT})); data, who = l.recvfrom(9); l.sendto(b'back', who)")
    assert world.a("s.recv(9)") == b"back"
    world.a("s.close(); l.close()")
    assert world.maps["datagrams"].keys() == []


@pytest.mark.parametrize("connected", [False, True])
def test_names_are_asked_of_the_resolver_whatever_the_server(world: World, family: Family, connected: bool) -> None:
    plain = "socket.AF_INET6" if family.name == "v6" else "socket.AF_INET"
    world.agent["a"](f"d = socket.socket({plain}, {DGRAM}); d.bind(({family.loopback!r}, {DNS}))")
    world.proxy.give("d", world.agent["a"]("d"))
    server = (family.spell("2001:db8::53" if family.name == "v6" else "192.0.2.53"), 53)
    world.a(family.udp("s"))
    refused(world.a, f"s.sendto(b'query', {server!r})")  # nobody of ours listens yet
    world.listeners("a")
    world.a(f"s.connect({server!r}); s.send(b'query')" if connected else f"s.sendto(b'query', {server!r})")
    world.proxy("d.settimeout(3); data, who = d.recvfrom(99); d.sendto(b'answer', who)")
    answer = world.a("s.recvfrom(9)")
    assert answer[0] == b"answer" and answer[1][:2] == server
    if connected:
        assert world.a("s.getpeername()[:2]") == server
    world.a("s.close()")
    world.proxy("d.close()")
    world.agent["a"]("d.close()")


def test_names_over_tcp_too(world: World, family: Family) -> None:
    plain = "socket.AF_INET6" if family.name == "v6" else "socket.AF_INET"
    code = f"l = socket.socket({plain}); l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); "
    world.agent["a"](f"{code}l.bind(({family.loopback!r}, {DNS})); l.listen(4); l.settimeout(3)")
    world.listeners("a")
    server = (family.spell("2001:db8::53" if family.name == "v6" else "192.0.2.53"), 53)
    world.a(family.tcp("s"))
    world.a(f"s.connect({server!r}); s.sendall(b'query')")
    world.agent["a"]("c, _ = l.accept()")
    assert world.agent["a"]("c.recv(9)") == b"query"
    world.a("s.close()")
    world.agent["a"]("c.close(); l.close()")


def test_the_proxy_sends_only_where_it_may(world: World, family: Family) -> None:
    world.agent["a"](family.udp("s"))
    world.proxy.give("s", world.agent["a"]("s"))
    before = world.count("dial_denied")
    refused(world.proxy, f"s.sendto(b'x', ({family.spell(family.host('out'))!r}, 53))")
    assert world.count("dial_denied") == before + 1
    world.dial("a", family.host("out"), 53)
    world.proxy(f"s.sendto(b'x', ({family.spell(family.host('out'))!r}, 53))")
    world.agent["a"]("s.close()")


def test_old_destinations_give_way_and_leave_nothing(world: World) -> None:
    """A socket keeps sixteen; the records of the others are gone at once, the rest with the socket."""
    v4 = FAMILIES[0]
    entries = world.layouts["constants"]["PL_PEERS"]
    for number in range(entries + 8):
        world.allow("b", IDENTITY["a"], PORT + number, UDP)
        world.native(v4.vip, 6000 + number, [(v4.host("b"), PORT + number)], proto=UDP)
    world.b(v4.server("l", v4.host("b"), PORT + entries + 7, DGRAM))
    world.a(v4.udp("s"))
    for number in range(entries + 8):
        world.a(f"s.sendto(b'x', ({v4.vip!r}, {6000 + number}))")
    assert len(world.maps["datagrams"].keys()) == entries
    world.b("data, who = l.recvfrom(1); l.sendto(b'y', who)")
    assert world.a("s.recvfrom(1)") == (b"y", (v4.vip, 6000 + entries + 7))
    world.a("s.close()")
    assert world.maps["datagrams"].keys() == []


def test_closing_one_of_two_sockets_on_a_port_leaves_the_other(world: World) -> None:
    v4 = FAMILIES[0]
    serve(world, v4)
    for name in ("s", "t"):
        world.a(
            v4.udp(name)
            + f"; {name}.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); {name}.bind(({v4.host('a')!r}, 9100))"
        )
        world.a(f"{name}.sendto(b'1', ({v4.vip!r}, 5353))")
        assert world.b("l0.recv(1)") == b"1"
    world.a("t.close()")
    world.a(f"s.sendto(b'2', ({v4.vip!r}, 5353))")
    assert world.b("l0.recv(1)") == b"2"
