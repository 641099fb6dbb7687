from __future__ import annotations

import ctypes
import struct
import time

from tests.bpf.families import Family
from tests.bpf.steps import connect, refused, serve
from tests.bpf.world import IDENTITY, WORKLOAD, World, addr, wait_for

PORT = 7900


def drain(world: World) -> list[dict[str, object]]:
    """Events since the last time."""
    libbpf = ctypes.CDLL("libbpf.so.1")
    sample = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    libbpf.ring_buffer__new.restype = ctypes.c_void_p
    libbpf.ring_buffer__new.argtypes = (ctypes.c_int, sample, ctypes.c_void_p, ctypes.c_void_p)
    libbpf.ring_buffer__consume.argtypes = libbpf.ring_buffer__free.argtypes = (ctypes.c_void_p,)
    layout = world.layouts["structs"]["pl_event"]
    names = [field[0] for field in layout["fields"]]
    found: list[dict[str, object]] = []

    def take(_context: object, data: int, size: int) -> int:
        assert size == layout["size"]
        found.append(dict(zip(names, struct.unpack(layout["format"], ctypes.string_at(data, size)), strict=True)))
        return 0

    callback = sample(take)
    ring = libbpf.ring_buffer__new(world.maps["events"].fd, callback, None, None)
    libbpf.ring_buffer__consume(ring)
    libbpf.ring_buffer__free(ring)
    return found


def test_allowed_connects_and_denials_are_told(world: World, family: Family) -> None:
    serve(world, family, PORT, rule=4711)
    drain(world)
    connect(world, family, family.vip, 80)
    world.a(family.tcp("t"))
    found: dict[object, dict[str, object]] = {}

    def both() -> bool:
        """A former test's denials may have used up what is told of them in a second."""
        refused(world.a, f"t.connect(({family.spell(family.host('out'))!r}, 99))")
        found.update((event["dport"], event) for event in drain(world) if event["src_workload"] == WORKLOAD["a"])
        return {80, 99} <= found.keys()

    wait_for(both, "both are told")
    allowed, denied = found[80], found[99]
    constants = world.layouts["constants"]
    assert abs(int(str(allowed["time_ns"])) - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) < 5e9
    assert allowed | {"time_ns": 0} == {
        "time_ns": 0,
        "src": bytes(16),
        "dst": addr(family.vip),
        "verdict": 1,
        "reason": constants["PL_R_NATIVE_ALLOWED"],
        "src_identity": IDENTITY["a"],
        "src_workload": WORKLOAD["a"],
        "dst_workload": WORKLOAD["b"],
        "rule": 4711,
        "sport": 0,
        "dport": 80,
        "proto": 6,
        "hook": constants["PL_HOOK_CONNECT"],
        "pad": 0,
    }
    assert (denied["verdict"], denied["reason"], denied["dport"]) == (0, constants["PL_R_OUTBOUND_DENIED"], 99)


def test_a_dropped_syn_says_where_it_came_from(world: World, family: Family) -> None:
    world.b(family.server("l", family.host("b"), PORT))
    drain(world)

    def told() -> list[dict[str, object]]:
        """As above."""
        world.out(family.tcp("s", 0.3))
        try:
            world.out(f"s.connect(({family.spell(family.host('b'))!r}, {PORT}))")
        except TimeoutError:
            pass
        world.out("s.close()")  # else its next SYN comes in the next test, which counts
        return [event for event in drain(world) if event["dport"] == PORT]  # others may have said something meanwhile

    event = wait_for(told, "the dropped SYN is told")[0]
    assert event["reason"] == world.layouts["constants"]["PL_R_INGRESS_PLAINTEXT"]
    assert (event["src"], event["dst"]) == (addr(family.host("out")), addr(family.host("b")))
    assert (event["dst_workload"], event["src_identity"]) == (WORKLOAD["b"], 0)


def test_a_flood_is_counted_exactly_and_told_in_part(world: World) -> None:
    drain(world)
    untold, denied = world.count("events_sampled") + world.count("events_lost"), world.count("outbound_denied")
    entries = 5000
    world.a(
        f"import contextlib\nfor _ in range({entries}):\n  s = socket.socket()\n"
        "  with contextlib.suppress(PermissionError): s.connect(('10.201.9.2', 1)); print('leak')\n  s.close()"
    )
    told = sum(event["dport"] == 1 for event in drain(world))
    assert 0 < told < entries
    assert world.count("events_sampled") + world.count("events_lost") - untold == entries - told
    assert world.count("outbound_denied") == denied + entries


def test_a_datagrams_destination_is_told_once(world: World, family: Family) -> None:
    world.egress(f"{family.host('out')}/{128 if family.name == 'v6' else 32}")
    drain(world)
    before = world.count("outbound_allowed")
    world.a(family.udp("s"))
    world.a(f"for _ in range(5): s.sendto(b'x', ({family.spell(family.host('out'))!r}, {PORT}))")
    (event,) = [event for event in drain(world) if event["src_workload"] == WORKLOAD["a"] and event["dport"] == PORT]
    assert (event["verdict"], event["proto"], event["dport"]) == (1, 17, PORT)
    assert event["hook"] == world.layouts["constants"]["PL_HOOK_SENDMSG"]
    assert world.count("outbound_allowed") == before + 1
