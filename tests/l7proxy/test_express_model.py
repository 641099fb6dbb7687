"""Paired sessions against a model of bpf/express.c, turn by turn of a loop whose events come in every order: whatever the
kernel carries and whatever comes through user space, each request is answered once, in order, and counted once."""

from __future__ import annotations

import random
import socket
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from l7proxy.config import Endpoint
from l7proxy.express import ARM, HOLD, NO_SLOT, REQUEST_BODY, RESPONSE_BODY, RESPONSE_HEAD, RESTS, TAKE, View
from l7proxy.session import HttpSession
from l7proxy.target import Caller
from l7proxy.worker import Worker
from mesh import link
from mesh.link import LocalWorkload, PairEnd, Update
from mesh.model import Backend, Route, RouteRule, Workload, key_of
from tests.l7proxy.rig import NODE_NETNS, FakeKernel, Mesh

STEPS_MAX = 20_000
BUDGET = 300  # bytes of a response that the kernel carries


class Timer:
    def __init__(self, at: float, call: Callable[[], Any]) -> None:
        self.at, self.call, self.cancelled = at, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """What the proxy's loop does in one turn, by hand."""

    def __init__(self) -> None:
        self.ready: deque[Callable[[], Any]] = deque()
        self.timers: list[Timer] = []
        self.now = 0.0

    def call_soon(self, call: Callable[..., Any], *args: Any) -> Timer:
        timer = Timer(0.0, lambda: call(*args))
        self.ready.append(lambda: None if timer.cancelled else timer.call())
        return timer

    def call_later(self, delay: float, call: Callable[..., Any], *args: Any) -> Timer:
        timer = Timer(self.now + delay, lambda: call(*args))
        self.timers.append(timer)
        return timer

    def create_task(self, coroutine: Any) -> Any:
        coroutine.close()

    def turn(self) -> None:
        for _ in range(len(self.ready)):
            self.ready.popleft()()

    def next_timer(self) -> Timer | None:
        self.timers = [timer for timer in self.timers if not timer.cancelled]
        return min(self.timers, key=lambda timer: timer.at, default=None)

    def fire(self) -> None:
        timer = self.next_timer()
        if timer is not None:
            self.timers.remove(timer)
            self.now = max(self.now, timer.at)
            timer.call()


class Peer:
    """An application's socket and the proxy's end of the same connection."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.redirected, self.queue = b"", b""  # at the application: what the kernel moved, what TCP brought
        self.write_seq = self.rcv_nxt = 0  # of the application
        self.up: deque[bytes] = deque()  # to the proxy; b"" is FIN
        self.down: deque[bytes] = deque()
        self.out = b""  # in the proxy's transport
        self.protocol: Any = None
        self.reading = True
        self.closing = self.lost = self.reset = False

    # ---- the proxy's transport

    def write(self, data: bytes) -> None:
        if not self.closing:
            self.out += data

    def get_write_buffer_size(self) -> int:
        return len(self.out)

    def get_extra_info(self, name: str) -> Any:
        return self if name == "socket" else None

    def fileno(self) -> int:
        return 1_000_000 + self.number

    def setsockopt(self, *_: object) -> None: ...

    def is_closing(self) -> bool:
        return self.closing

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.world.loop.call_soon(self._closed)

    def abort(self) -> None:
        self.reset = True
        self.close()

    def _closed(self) -> None:
        if self.out:
            self.world.loop.call_soon(self._closed)
            return
        if not self.lost:
            self.lost = True
            self.down.append(b"")
            self.protocol.connection_lost(None)

    # ---- events

    def flush(self) -> None:
        if self.out:
            self.down.append(self.out)
            self.out = b""

    def to_proxy(self) -> None:
        data = self.up.popleft()
        if self.closing:
            return
        if data:
            self.protocol.data_received(data)
        else:
            self.reading = False
            if not self.protocol.eof_received():
                self.close()

    def to_app(self) -> None:
        data = self.down.popleft()
        self.queue += data
        self.rcv_nxt += len(data)

    def sent_slow(self, data: bytes) -> None:
        self.write_seq += len(data)
        self.up.append(data)

    @property
    def unread(self) -> bool:
        return bool(self.queue or self.redirected)

    def read(self) -> bytes:
        data, self.redirected, self.queue = self.redirected + self.queue, b"", b""
        return data


class Server(Peer):
    """Answers each request with its path; by the path it knows how."""

    def __init__(self, world: World, number: int, endpoint: Endpoint) -> None:
        super().__init__(world, number)
        self.endpoint = endpoint
        self.buffer = b""
        self.answers: deque[bytes] = deque()
        self.gone = False
        self.served = 0

    def act(self) -> None:
        rng = self.world.rng
        if self.unread and (not self.answers or rng.random() < 0.5):
            self.buffer += self.read()
            self._understand()
        elif self.answers:
            self.world.server_sends(self, self.answers.popleft())

    def _understand(self) -> None:
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            length = int(head.rpartition(b"Content-Length: ")[2]) if b"Content-Length" in head else 0
            if len(rest) < length:
                return
            self.buffer = rest[length:]
            path = head.split(b" ")[1]
            self.world.reached.append(path)
            self.served += 1
            response = answer(path)
            while response:
                take = self.world.rng.choice((len(response), 1, 40, 200))
                self.answers.append(response[:take])
                response = response[take:]

    def closes(self) -> None:
        """Between answers. A fresh one that closes unheard is a 502 with the kernel or without."""
        if self.served and not self.answers and not self.gone:
            self.gone = True
            self.up.append(b"")

    @property
    def can_act(self) -> bool:
        return not self.gone and bool(self.unread or self.answers)


def answer(path: bytes) -> bytes:
    number = int(path[1:].split(b"/")[0])
    body = path * (1 + number % 5 * (number % 3))
    if number % 7 == 3:
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    if number % 11 == 5:
        body *= 20
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class Slot:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.base_in = self.base_out = self.up_seq = self.srv_seq = 0
        self.dirty = True
        self.clean_at = -1


class Model(FakeKernel):
    """bpf/express.c of one client."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.express = True
        self.recorded = self.armed = self.hold = self.handed = False
        self.slots: dict[int, Slot] = {}
        self.busy = 0
        self.phase = RESTS
        self.base_in = self.base_out = self.arm_up = self.arm_down = 0
        self.req_left = self.resp_left = self.status = self.handed_at = 0
        self.head, self.started, self.carried = b"", 0.0, 0

    def express_view(self, sock: Any) -> View | None:
        if not self.recorded:
            return None
        slow = self.handed_at - self.slots[self.busy - 1].srv_seq if self.handed and self.busy else 0
        return View(
            self.busy - 1, self.phase, self.handed, slow, self.status, self.head, self.req_left, self.resp_left, "", self.started
        )

    def express_op(
        self, sock: Any, op: int, slot: int, consumed: int = 0, sent: int = 0, up_sent: int = 0, up_consumed: int = 0
    ) -> bool:
        if not self.recorded:
            return False
        if op == HOLD:
            self.hold = True
        elif op == TAKE:
            self.armed, self.busy, self.phase, self.handed = False, 0, RESTS, False
        elif op == ARM:
            if self.busy:
                return False
            if slot != NO_SLOT:
                s = self.slots[slot]
                s.dirty, s.up_seq, s.srv_seq = False, s.base_out + up_sent, s.base_in + up_consumed
            self.arm_up, self.arm_down = self.base_in + consumed, self.base_out + sent
            self.hold, self.armed = False, True
        return True

    def client_sends(self, client: Peer, data: bytes) -> None:
        if not self.recorded:
            client.sent_slow(data)
            return
        if self.busy:
            left = min(self.req_left, len(data))
            server = self.slots[self.busy - 1].server
            if not left or self.handed or server.gone:
                self.hold = True
                client.sent_slow(data)
                return
            server.redirected += data[:left]
            self.req_left -= left
            if not self.req_left:
                self.phase = RESPONSE_HEAD
            if data[left:]:
                self.client_sends(client, data[left:])
            return
        end = data.find(b"\r\n\r\n") + 4
        length = int(data[:end].rpartition(b"Content-Length: ")[2]) if b"Content-Length" in data[:end] else 0
        usable = [
            number
            for number, s in self.slots.items()
            if not s.dirty and s.clean_at == s.up_seq and not s.server.gone and not s.server.unread
        ]
        if (
            not self.armed
            or self.hold
            or client.write_seq != self.arm_up
            or client.rcv_nxt != self.arm_down
            or client.unread
            or end < 4
            or len(data) > end + length
            or not usable
            or self.rng.random() < 0.1
        ):
            client.sent_slow(data)
            return
        slot = self.rng.choice(usable)
        self.slots[slot].server.redirected += data
        self.head, self.status, self.resp_left, self.handed, self.started = data[:end], 0, 0, False, perf_counter()
        self.req_left = end + length - len(data)
        self.phase = REQUEST_BODY if self.req_left else RESPONSE_HEAD
        self.busy = slot + 1

    def server_sends(self, client: Peer, server: Server, data: bytes) -> None:
        slot = next((number for number, s in self.slots.items() if s.server is server), None)
        if not self.recorded or slot is None:
            server.sent_slow(data)
            return
        s = self.slots[slot]
        s.clean_at = -1 if server.unread else server.rcv_nxt
        if self.busy != slot + 1:
            s.dirty = True
            server.sent_slow(data)
            return
        if self.handed:
            server.sent_slow(data)
            return
        total = self.resp_left
        if self.phase != RESPONSE_BODY:
            end = data.find(b"\r\n\r\n") + 4
            fits = end >= 4 and b"Content-Length" in data[:end]
            length = int(data[:end].rpartition(b"Content-Length: ")[2]) if fits else BUDGET + 1
            total = end + length
        if self.hold or self.req_left or server.write_seq != s.srv_seq or (total > BUDGET and self.phase != RESPONSE_BODY):
            self.handed, self.handed_at = True, server.write_seq
            server.sent_slow(data)
            return
        client.redirected += data[:total]
        self.status, self.resp_left, self.phase = 200, total - len(data[:total]), RESPONSE_BODY
        if not self.resp_left:
            self.carried += 1
            self.busy, self.phase = 0, RESTS
        if data[total:]:
            s.dirty = True
            server.sent_slow(data[total:])


class World:
    def __init__(
        self, seed: int, *, closes: bool = False, pipelines: bool = False, restless: bool = False, requests: int = 30
    ) -> None:
        self.rng = random.Random(seed)
        self.closes, self.pipelines, self.restless = closes, pipelines, restless
        self.loop, self.kernel = Loop(), Model(self.rng)
        mesh = Mesh()
        caller, web, other = mesh.workload("client-1", "client"), mesh.service("web", [8080]), mesh.service("other", [8081])
        for name in ("web", "other"):
            mesh.allow(name, "client")
        backends = (Backend(key_of(web), 80), Backend(key_of(other), 80))
        mesh.add(Route("split", "shop", ((key_of(web), 0),), (RouteRule((), backends),)))
        with tempfile.TemporaryDirectory() as directory:
            listen = socket.socket(socket.AF_UNIX)
            listen.bind(str(Path(directory) / "s"))
            self.worker = Worker(0, listen, kernel=self.kernel)
            listen.close()
        self.worker.loop = self.loop  # type: ignore[assignment]
        self.worker.rng = self.rng
        local = tuple(LocalWorkload(key, NODE_NETNS, 1) for key, item in mesh.state.items() if isinstance(item, Workload))
        self.worker.adopt(self.worker.config.updated(Update(1, True, mesh.state, (), local, 1), "n1"))
        self.worker.send = self._agent  # type: ignore[method-assign]
        self.worker.upstreams.dial = self._dial  # type: ignore[method-assign]
        who = Caller(caller.spiffe, caller.identity, "127.0.0.1", 1234, key_of(caller))
        destination = self.worker.config.destination(web.vips[0], 80)
        assert destination is not None
        scope = self.worker.scope(self.worker.config, who, destination, inbound=False)
        self.ends = [PairEnd("Workload/shop/web-1", 8080), PairEnd("Workload/shop/other-1", 8081)]
        self.servers: list[Server] = []
        self.reached: list[bytes] = []
        self.answers: deque[Callable[[], None]] = deque()  # of the agent
        self.client = Peer(self, 0)
        self.session = HttpSession(self.worker, scope, who, NODE_NETNS)
        self.session.sockets = 1
        self.client.protocol = self.session
        self.session.connection_made(self.client)  # type: ignore[arg-type]
        self.asked = [self._request(number) for number in range(requests)]
        self.unsent = deque(b for request in self.asked for b in self._pieces(request[1]))
        self.expected = b"".join(answer(path) for path, _ in self.asked)
        self.got = b""
        self.sent = 0

    def _request(self, number: int) -> tuple[bytes, bytes]:
        path = b"/%d/x" % number
        if number % 4 == 1 and not self.closes:
            body = b"b" * (number * 3)
            return path, b"POST %b HTTP/1.1\r\nHost: web\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body)
        return path, b"GET %b HTTP/1.1\r\nHost: web\r\n\r\n" % path

    def _pieces(self, request: bytes) -> list[bytes]:
        if self.rng.random() < 0.7:
            return [request]
        head = request.find(b"\r\n\r\n") + 4
        cut = self.rng.choice((head, head + 5, 9))
        return [piece for piece in (request[:cut], request[cut:]) if piece]

    def _dial(self, endpoint: Endpoint, caller: object, netns: int, protocol: Any, failed: object, *, opaque: bool) -> Timer:
        server = Server(self, 1 + len(self.servers), endpoint)
        self.servers.append(server)

        def made() -> None:
            server.protocol = protocol
            protocol.connection_made(server)

        return self.loop.call_soon(made)

    def _agent(self, message: link.Message, fds: object = ()) -> bool:
        if isinstance(message, link.Pair):
            servers = [self.servers[fd - 1_000_001] for fd in list(fds)[1:]]  # type: ignore[call-overload]
            self.answers.append(lambda: self._pair(message, servers))
        elif isinstance(message, link.Unpair):
            self.answers.append(self._unpair)
        return True

    def _unpair(self) -> None:
        self.kernel.recorded = self.kernel.armed = False

    def _pair(self, message: link.Pair, servers: list[Server]) -> None:
        kernel = self.kernel
        if self.rng.random() < 0.1:
            self._unpair()
            self.worker.express.hear(link.Paired(message.session, False, reason="chance"))
            return
        kernel.recorded, kernel.armed, kernel.hold, kernel.busy = True, False, False, 0
        # the proxy reads nothing meanwhile: what it has not read is not below the base
        kernel.base_in = self.client.write_seq - sum(map(len, self.client.up))
        kernel.base_out = self.client.rcv_nxt + sum(map(len, self.client.down)) + len(self.client.out)
        kernel.slots = {}
        slots = []
        for end, server in zip(message.endpoints, servers, strict=True):
            slot = self.ends.index(end)
            slots.append(slot)
            s = kernel.slots[slot] = Slot(server)
            s.base_in = server.write_seq - sum(map(len, server.up))
            s.base_out = server.rcv_nxt + sum(map(len, server.down)) + len(server.out)
            s.clean_at = -1 if server.unread else server.rcv_nxt
        missing = tuple(end for end in self.ends if end not in message.endpoints)
        self.worker.express.hear(link.Paired(message.session, True, tuple(slots), missing))

    def server_sends(self, server: Server, data: bytes) -> None:
        self.kernel.server_sends(self.client, server, data)

    # ---- turns

    def _client_may_send(self) -> bool:
        if not self.unsent:
            return False
        if self.pipelines and self.rng.random() < 0.01:
            return True
        done, size = 0, 0  # everything asked so far is answered, or the request is not whole yet
        for path, request in self.asked:
            if size + len(request) > self.sent:
                return len(self.got) >= done
            size += len(request)
            done += len(answer(path))
        return False

    def turn(self) -> bool:
        """False: nothing is left that could happen by itself."""
        self.loop.turn()
        peers: list[Peer] = [self.client, *self.servers]
        for peer in peers:
            peer.flush()
        events: list[Callable[[], None]] = []
        for peer in peers:
            if peer.up and (peer.reading or peer.closing) and peer.protocol is not None:
                events.append(peer.to_proxy)
            if peer.down:
                events.append(peer.to_app)
        events += [server.act for server in self.servers if server.can_act]
        if self.client.unread:
            events.append(self._client_reads)
        if self._client_may_send():
            events += [self._client_sends] * 2
        if self.answers:
            events.append(lambda: self.answers.popleft()())
        if self.restless and self.rng.random() < 0.02:
            events = [self.rng.choice((self._agent_lets_go, self.worker.express.relinked, self._sweep, self.session.recheck))]
        elif self.closes and self.servers and self.rng.random() < 0.02:
            events = [self.rng.choice(self.servers).closes]
        elif self.loop.next_timer() is not None and (not events or self.rng.random() < 0.05):
            events = [self.loop.fire]
        if events:
            self.rng.choice(events)()
        return bool(events or self.loop.ready)

    def _agent_lets_go(self) -> None:
        for number in list(self.worker.express.pairs.keys() - self.worker.express.asks):
            self.worker.express.hear(link.Paired(number, False, reason="restless"))

    def _sweep(self) -> None:
        self.worker.express.sweep(perf_counter())

    def _client_reads(self) -> None:
        self.got += self.client.read()

    def _client_sends(self) -> None:
        data = self.unsent.popleft()
        self.sent += len(data)
        self.kernel.client_sends(self.client, data)

    def run(self) -> None:
        for _ in range(STEPS_MAX):
            if not self.turn() or self.got == self.expected or not self.expected.startswith(self.got):
                break
        assert self.got == self.expected, f"after {len(self.got)} of {len(self.expected)} bytes"

    @property
    def counted(self) -> int:
        labels = ("shop/client", "shop/web", "local"), ("shop/client", "shop/other", "local")
        return sum(sum(self.worker.metrics.http(*label).codes.values()) for label in labels)


MODES = [{}, {"pipelines": True}, {"closes": True}, {"restless": True}, {"pipelines": True, "closes": True, "restless": True}]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode) or "plain")
def test_every_request_is_answered_once_in_order(mode: dict[str, bool]) -> None:
    carried = total = 0
    for seed in range(100):
        world = World(seed, **mode)
        try:
            world.run()
            assert world.counted + world.kernel.carried == len(world.asked)
            if not world.closes:  # else some reached a server that closed instead
                assert sorted(world.reached) == sorted(path for path, _ in world.asked)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        carried, total = carried + world.kernel.carried, total + len(world.asked)
    assert carried > total / 5, f"the kernel carried {carried} of {total}"
