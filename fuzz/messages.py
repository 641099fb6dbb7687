"""Targets link (agent and proxy) and stream (controller and agent): frames from a peer that may be anybody in its place."""

from __future__ import annotations

import json
import struct
from collections.abc import Hashable
from random import Random
from typing import Any
from zlib import crc32

from fuzz.target import Disagreement, Target
from mesh import link, snapshot
from mesh.model import (
    Action,
    Budget,
    BudgetChange,
    Config,
    DnsForward,
    Identity,
    IdentityBudget,
    Item,
    OutboundAllow,
    Policy,
    Protocol,
    Route,
    Rule,
    Service,
    ServiceEntry,
    ServicePort,
    Source,
    State,
    Workload,
    key_of,
)

_ITEMS: tuple[Item, ...] = (
    Config(
        "mesh.local", outbound_allow=(OutboundAllow("10.0.0.0/8", (80,)),), dns_upstreams=("192.0.2.1:53",),
        dns_forward=(DnsForward(("*.test",), ("mesh.local/ns/shop/sa/*",)),), policy_lease_s=60.0, revoked=("0a", "node:n2"),
        budgets=Budget(connections=9),
    ),
    Identity(256, "spiffe://mesh.local/ns/shop/sa/web"),
    Service(257, "web", "shop", ("240.0.0.1",), (ServicePort(80, 8080, "http", Protocol.HTTP),), ("Workload/shop/web-1",)),
    Workload(258, "web-1", "shop", "n1", 256, "spiffe://mesh.local/ns/shop/sa/web", ("10.77.1.1",), {"app": "web"}, (8080,)),
    Policy("allow", "shop", Action.ALLOW, {"app": "web"}, rules=(Rule((Source(("mesh.local/ns/shop/sa/*",)),)),)),
    Route("r", "shop", (("Service/shop/web", 80),)),
    ServiceEntry("bank", "shop", ("api.bank.test", "*.cdn.test"), ((443, "tcp"), (4433, "udp")), ("mesh.local/ns/shop/sa/web",)),
    IdentityBudget("batch", "shop", BudgetChange(requests_per_s=2, worker_share=0.1), ("mesh.local/ns/shop/sa/web",)),
)  # fmt: skip
STATE: State = {key_of(item): item for item in _ITEMS}
_DIGEST = snapshot.digest(STATE)
MESSAGES: tuple[link.Message, ...] = (
    link.Hello("n1", "=II", ("a", "b"), "=I", ("c",)),
    link.Update(1, True, STATE, (), (link.LocalWorkload("Workload/shop/web-1", 1, 2),), 3),
    link.Update(2, False, {}, ("Route/shop/r",)),
    link.Listener("1/outbound/2", "outbound", 1, "127.0.0.1", 15001), link.CloseListener("1/outbound/2"), link.Stock(1, 2),
    link.Svid("spiffe://mesh.local/ns/shop/sa/web", "PEM", "0a", 1.5), link.DropSvid("spiffe://x"), link.Scrape(),
        link.Drain(1.0),
    link.Ready(0, 1), link.Ack(1, _DIGEST), link.Nack(1, "no"), link.NeedStock(1, 2, 3), link.Metrics(0, "a 1\n"),
    link.Flow(1.0, "denied", "r"),
    link.Pair(1 << 48, "Service/shop/web", 80, "Workload/shop/a", (link.PairEnd("Workload/shop/b", 8080),)), link.Unpair(1 << 48),
    link.Leaving(), link.Leaving(600.0), link.Left(1 << 48), link.Drained(3),
    link.Leg(1 << 48, "Workload/shop/a", True), link.Unleg(1 << 48), link.Legged(1 << 48, False, "lowat"),
    link.Paired(1, True, (0, -1), (link.PairEnd("Workload/shop/c", 1),)),
    link.Takeover(2, "Service/shop/web", 80, "Workload/shop/a", (link.PairEnd("Workload/shop/b", 8080),), (0,)),
    link.Grant(1, 2, ("127.0.0.1", 4711), "udp", "api.bank.test", ("93.184.215.14", "2606:2800::14"), 60.0),
    link.Granted(1, "not_named"), link.Lease(1 << 60),
)  # fmt: skip
_FRAMES = tuple(link.encode(message) for message in MESSAGES)
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1 << 31, 1 << 64, -(1 << 63) - 1, 1.5, 1e400, "", "a", "\0", "é", "\ud800", "x" * 300, [], {}, [[]],
        {"": ""},
    "spiffe://mesh.local/ns/a/sa/b", "Workload/shop/web-1", [1, "a"], {"kind": "Config"}, "ALLOW",
)  # fmt: skip
_TEXT = (
    b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\xed\xa0\x80", b'"\\ud800"', b'"\\u0000"', b"1e999", b"-", b"nul",
    b"\xef\xbb\xbf{}",
    b'{"type":"ping","type":"pong"}', b'{"type":"ping"} ', b'{"type":"ping"}x', b"NaN", b"9" * 400, b'"' + b"a" * 2000, b"-0",
    b"1.", b"01",
)  # fmt: skip


def change(rng: Random, value: Any, depth: int = 0) -> Any:
    """The same JSON with something replaced, left out, added or nested."""
    random = rng.random
    if isinstance(value, dict) and value and random() < 0.85:
        key = list(value)[int(random() * len(value))]
        kind = random()
        if kind < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if kind < 0.2:
            return value | {"surplus": VALUES[int(random() * len(VALUES))]}
        if kind < 0.25:
            return value | {str(key) + "x": value[key]}
        return value | {key: change(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and random() < 0.85:
        at = int(random() * len(value))
        return value[:at] + [change(rng, value[at], depth + 1)] * (1 + int(random() ** 3 * 3)) + value[at + 1 :]
    return VALUES[int(random() * len(VALUES))]


def _json(rng: Random, wire: bytes) -> bytes:
    value = json.loads(wire)
    for _ in range(1 + int(rng.random() * 3)):
        value = change(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    out = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        at = int(rng.random() * len(out))
        out = out[:at] + _TEXT[int(rng.random() * len(_TEXT))] + out[at + 1 :]
    return out


class Link(Target):
    """A case: how many descriptors ride along (one byte), then frames."""

    name = "link"
    tokens = (
        *_FRAMES,
        *_TEXT,
        b"\0\0\0\2\0\0\0\0{}",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        struct.pack("!II", 64 << 20, 0),
        b'"type":"',
    )

    def generate(self, rng: Random) -> bytes:
        out, descriptors = [], 0
        for _ in range(1 + int(rng.random() * 3)):
            body = _FRAMES[int(rng.random() * len(_FRAMES))][8:]
            if rng.random() < 0.7:
                body = _json(rng, body)
            count = int(rng.random() ** 4 * 6)
            descriptors += count
            out.append(struct.pack("!II", len(body) if rng.random() < 0.95 else int(rng.random() * 2 * len(body)), count) + body)
        if rng.random() < 0.1:
            descriptors = int(rng.random() * 8)
        return bytes([descriptors]) + b"".join(out)

    def check(self, case: bytes, *, deep: bool = False) -> Hashable:
        if not case:
            return None
        whole = self._run(case[0], [case[1:]])
        number, size = crc32(case), len(case)
        cuts = range(1, size) if deep and size < 400 else [1 + number % size]
        for cut in cuts:
            if (parts := self._run(case[0], [case[1:cut], case[cut:]])) != whole:
                raise Disagreement("pillion", "other messages when cut", f"at {cut}: {whole} then {parts}"[:1000])
        messages, error, _ = whole
        return (tuple(type(message).__name__ for message, _ in messages), error[:40])

    def _run(self, descriptors: int, pieces: list[bytes]) -> tuple[list[tuple[link.Message, list[int]]], str, int]:
        decoder = link.Decoder()
        given = list(range(descriptors))
        messages: list[tuple[link.Message, list[int]]] = []
        error = ""
        try:
            for piece in pieces:
                mine, given = given, []
                messages += decoder.feed(piece, mine)
        except link.LinkError as fault:
            error = str(fault)
        left = decoder.take_fds() + given
        if sorted(left + [fd for _, fds in messages for fd in fds]) != list(range(descriptors)):
            raise Disagreement("pillion", "descriptors got lost", f"{left} left")
        if error:
            messages = []  # those of the same read are lost with the link
        for message, _ in messages:
            try:
                again = link.Decoder().feed(link.encode(message), [])
            except (link.LinkError, UnicodeError) as fault:
                raise Disagreement("pillion", "a message it cannot say itself", f"{message!r}: {fault}"[:1000]) from fault
            if again[0][0] != message and "nan" not in repr(message):
                raise Disagreement("pillion", "a message changes when said again", repr(message)[:1000])
        return messages, error, len(left) if not error else 0


_STREAM_FRAMES = (
    *(
        b"S" + snapshot.encode(message)
        for message in (
            snapshot.make_snapshot(STATE, 5),
            snapshot.make_delta(STATE, {key: item for key, item in STATE.items() if key != "Route/shop/r"}, 5, 6),
            snapshot.Ping(),
        )
    ),
    *(
        b"A" + snapshot.encode(message)
        for message in (snapshot.Ack(5, _DIGEST), snapshot.Nack(5, "x"), snapshot.Ready(True), snapshot.Pong())
    ),
    b"F" + snapshot.encode_state(STATE),
)


class Stream(Target):
    """A case: S, A or F (from the controller, from an agent, a State in a file), then a frame. Deltas go onto STATE."""

    name = "stream"
    tokens = (*(frame[1:] for frame in _STREAM_FRAMES), *_TEXT)

    def __init__(self) -> None:
        super().__init__()
        self.base = snapshot.Versioned.of(dict(STATE), 5)

    def generate(self, rng: Random) -> bytes:
        frame = _STREAM_FRAMES[int(rng.random() * len(_STREAM_FRAMES))]
        return frame[:1] + _json(rng, frame[1:])

    def check(self, case: bytes, *, deep: bool = False) -> Hashable:  # noqa: ARG002  # of every target
        side, data = case[:1], case[1:]
        try:
            if side == b"F":
                state = snapshot.decode_state(data)
                if snapshot.decode_state(snapshot.encode_state(state)) != state:
                    raise Disagreement("pillion", "a state changes when said again")
                return ("state", len(state))
            if side not in (b"S", b"A"):
                return None
            forms: list[bytes | str] = [data]
            try:
                forms.append(data.decode())
            except UnicodeError:
                pass
            message: Any = None
            for form in forms:
                message = snapshot.decode_server(form) if side == b"S" else snapshot.decode_agent(form)
            if isinstance(message, snapshot.Snapshot):
                after = snapshot.Versioned.from_snapshot(message)
            elif isinstance(message, snapshot.Delta):
                after = self.base.apply(message)
            else:
                return type(message).__name__
            if snapshot.digest(after.state) != message.digest:
                raise Disagreement("pillion", "a digest that is not the state's")
            return (type(message).__name__, len(after.state))
        except snapshot.SnapshotError as error:
            if self.base.state != STATE:
                raise Disagreement("pillion", "a refused delta changed the state") from error
            return str(error)[:30]
