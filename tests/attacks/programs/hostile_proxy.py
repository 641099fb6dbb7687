"""A hostile process where a proxy's worker should be: its user, cgroup, seccomp filter and empty netns. The agent dials it,
takes it for a worker and hands it what a worker gets; then it does what a worker should not.

argv: PROXY_CGROUP WORKER_SOCKET WAY [ARGUMENT …]. Prints a JSON object. Ways:
sockets HOST PORT CALLER: with a stock socket of the netns where HOST is a workload: what became of connect, bind, listen;
keys: the identities whose keys came; stock COUNT NETNS …: how many sockets came for each of these namespaces;
say FRAMES …: hex of what is said, each on a link of its own; whether the agent hung up on it; lie SECONDS: acknowledges every
state with a digest of its own; flow JSON: a Flow as it says; ask HOST PORT CALLER OWN GRANTS: the agent's answers when it asks
that the kernel carries what the workload OWN sends on connections made for CALLER to HOST, and that addresses be open (GRANTS:
JSON, [workload, name, addresses] each); legs HOST PORT CALLER OTHER OWN: the answers when it asks for legs with
descriptors and words that do not belong together, and then as it may (OTHER: another caller); keep HOST PORT CALLER LEG ACKS
SECONDS: asks HOST again and again, by a "leg" or not, sending "acks" or not, and says "ready" first: when it had the last
answer, and what ended it.
"""

import contextlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from l7proxy.confine import confine
from mesh import link, snapshot
from mesh.model import Workload

SLOW = max(1.0, float(os.environ.get("PILLION_SLOW", "1")))  # as in lab/pace.py, which is not of the product
LATE_S = 0.3  # what the agent does comes within a few ms; after so long of silence nothing more does
HANGS_UP_S = 1.0
PAUSE_S, READY = 0.02, 10

proxy, path, way, *rest = sys.argv[1:]
Path(proxy, "cgroup.procs").write_text("0")
door = socket.socket(socket.AF_UNIX)
with contextlib.suppress(FileNotFoundError):
    os.unlink(path)
door.bind(path)
door.listen(4)
confine(65471, 65471)

state: dict = {}
local: tuple = ()
svids: set[str] = set()
stock: dict[tuple[int, int], list[int]] = {}
doors: dict[int, int] = {}  # by netns: where captured connections come to
answers: dict[int, str] = {}  # to what it asked, by number
agent: socket.socket
decoder = link.Decoder()
ended = False
acks = True


def send(message: link.Message) -> None:
    with contextlib.suppress(OSError):  # hung up on: what is heard says so
        agent.sendall(link.encode(message))


def hear(seconds: float, done: Callable[[], object] = lambda: False, silence_s: float = float("inf")) -> None:
    """What the agent says for so long (of a machine that is not slow); until `done`, or until it has said nothing for a while."""
    global ended, local
    until = time.monotonic() + seconds * SLOW
    while not ended and not done() and (left := until - time.monotonic()) > 0:
        agent.settimeout(min(left, silence_s * SLOW))
        try:
            data, fds, _, _ = socket.recv_fds(agent, 1 << 18, 128)
        except TimeoutError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            ended = True
            return
        for message, came in decoder.feed(data, fds):
            if isinstance(message, link.Update):
                if message.full:
                    state.clear()
                state.update(message.put)
                for key in message.delete:
                    state.pop(key, None)
                local = message.local
                if acks:
                    send(link.Ack(message.revision, "0" * 64 if way == "lie" else snapshot.digest(state)))
            elif isinstance(message, link.Svid):
                svids.add(message.spiffe)
            elif isinstance(message, link.Stock):
                stock.setdefault((message.netns, message.family), []).extend(came)
            elif isinstance(message, link.Listener) and (message.kind, message.address) == ("outbound", "127.0.0.1"):
                doors[message.netns] = came[0]
            elif isinstance(message, link.Paired):
                answers[message.session] = "paired" if message.ok else message.reason
            elif isinstance(message, link.Legged):
                answers[message.number] = "made" if message.ok else message.reason
            elif isinstance(message, link.Granted):
                answers[message.number] = message.reason or "granted"


def equipped() -> bool:
    """It has what a worker of this node has."""
    mine = [state[each.key] for each in local if each.key in state]
    return bool(mine) and all((each.netns, 2) in stock for each in local) and svids >= {workload.spiffe for workload in mine}


def link_up() -> None:
    """The agent dials, again after every end."""
    global agent, decoder, ended
    agent, _ = door.accept()
    decoder, ended = link.Decoder(), False
    send(link.Ready(7, os.getpid()))


def outcome(work, *arguments: object) -> str:
    try:
        work(*arguments)
    except OSError as error:
        return type(error).__name__
    return "passed"


def name_for(sock: socket.socket, text: str) -> None:
    """For whom it calls."""
    address, port, identity = text.split(",")
    packed = socket.inet_pton(socket.AF_INET6, f"::ffff:{address}")
    sock.setsockopt(0x50494C, 2, packed + struct.pack("=IHH", int(identity), int(port), 0))


def sockets(host: str, port: str, caller: str) -> dict[str, str]:
    netns = next(each.netns for each in local if each.key == workload_at(host))
    fresh = [socket.socket(fileno=fd) for fd in stock[netns, socket.AF_INET]]

    def dial(to: str, number: int) -> None:
        sock = fresh.pop()
        sock.settimeout(SLOW)
        name_for(sock, caller)
        sock.connect((to, number))

    def fast(to: str, number: int) -> None:
        sock = fresh.pop()
        name_for(sock, caller)
        sock.sendto(b"x", socket.MSG_FASTOPEN, (to, number))

    return {
        "own": outcome(dial, host, int(port)),
        "undeclared": outcome(dial, host, 9999),
        "loopback": outcome(dial, "127.0.0.1", int(port)),
        "listener": outcome(dial, "127.0.0.1", 15001),
        "fast open": outcome(fast, host, 9999),
        "bind": outcome(lambda: fresh.pop().bind(("0.0.0.0", 9999))),
        "listen": outcome(lambda: fresh.pop().listen(1)),
        "socket": outcome(lambda: socket.socket(socket.AF_INET)),
    }


def place_of(workload: str) -> int:
    return next(each.netns for each in local if each.key == f"Workload/shop/{workload}")


def workload_at(host: str) -> str:
    return next(key for key, item in state.items() if isinstance(item, Workload) and host in item.addresses)


def captured(own: str) -> socket.socket:
    """The connection of a workload that waits."""
    hear(5.0, lambda: place_of(own) in doors)
    with socket.socket(fileno=doors[place_of(own)]) as door_of_own:
        door_of_own.settimeout(5 * SLOW)
        return door_of_own.accept()[0]


def dialled(host: str, port: int, caller: str) -> socket.socket:
    sock = socket.socket(fileno=stock[place_of(workload_at(host).rpartition("/")[2]), socket.AF_INET].pop())
    sock.settimeout(2 * SLOW)
    name_for(sock, caller)
    sock.connect((host, port))
    return sock


def leg(number: int, workload: str, fds: list[int], *, dialled: bool) -> str:
    message = link.Leg(number, workload, dialled)
    socket.send_fds(agent, [link.encode(message, len(fds))], fds)
    hear(5.0, lambda: number in answers)
    return answers.get(number, "")


def legs(host: str, port: int, caller: str, other: str, own: str) -> dict[str, str]:
    """By what was wrong with it: the answer."""
    server, client = workload_at(host), f"Workload/shop/{own}"
    accepted, up, renamed = captured(own), dialled(host, port, caller), dialled(host, port, caller)
    name_for(accepted, caller)  # it may say so of any socket, at any time
    name_for(renamed, other)
    unconnected = stock[place_of(own), socket.AF_INET].pop()
    asked = {
        "no socket": (server, [], True),
        "a socket that leads nowhere": (client, [unconnected], False),
        "a workload that is not here": ("Workload/shop/far", [up.fileno()], True),
        "another workload's": (client, [up.fileno()], True),
        "a client's, as if it were a server's": (client, [accepted.fileno()], True),
        "a server's, as if it were a client's": (server, [up.fileno()], False),
        "another caller's": (server, [renamed.fileno()], True),
        "its own, of a client": (client, [accepted.fileno()], False),
        "its own, of a server": (server, [up.fileno()], True),
    }
    return {
        what: leg(number, workload, fds, dialled=dials)
        for number, (what, (workload, fds, dials)) in enumerate(asked.items(), 200)
    }


def keep(host: str, port: int, caller: str, seconds: float, *, by_leg: bool) -> dict[str, object]:
    sock = dialled(host, port, caller)
    made = leg(300, workload_at(host), [sock.fileno()], dialled=True) if by_leg else ""
    answered, count, error, over = 0.0, 0, "", time.monotonic() + seconds * SLOW
    while not error and time.monotonic() < over:
        hear(PAUSE_S, silence_s=PAUSE_S)
        try:
            sock.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            if sock.recv(1 << 16):
                answered, count = time.monotonic(), count + 1
            else:
                error = "ended"
        except OSError as failed:
            error = type(failed).__name__
        if count == READY:
            print("ready", flush=True)
    return {"leg": made, "answered": answered, "count": count, "error": error}


def pairings(host: str, port: int, caller: str, own: str) -> dict[str, str]:
    """By what was wrong with it: the answer. Of the workload OWN a captured connection waits."""
    here = workload_at(host)
    server = here.rpartition("/")[2]
    accepted = captured(own)
    fresh = [dialled(host, port, caller) for _ in range(2)]
    ends = (link.PairEnd(here, port),)
    named = dict.fromkeys(["not captured", "another's name", "another's connection"], "Workload/shop/client")
    named["another's connection"] = f"Workload/shop/{own}"
    for number, (what, who) in enumerate(named.items(), 1):
        fds = [(fresh[1] if what == "not captured" else accepted).fileno(), fresh[0].fileno()]
        message = link.Pair(number, f"Service/shop/{server}", port, who, ends)
        socket.send_fds(agent, [link.encode(message, len(fds))], fds)
        hear(5.0, lambda number=number: number in answers)
    return {what: answers.get(number, "") for number, what in enumerate(named, 1)}


def grants(wanted: list[tuple[str, str, list[str]]]) -> list[str]:
    numbers = range(100, 100 + len(wanted))
    for number, (workload, name, addresses) in zip(numbers, wanted, strict=True):
        netns = place_of(workload) if workload else 1 << 62
        send(link.Grant(number, netns, ("127.0.0.1", 4711), "udp", name, tuple(addresses), 60.0))
    hear(5.0, lambda: answers.keys() >= set(numbers))
    return [answers.get(number, "") for number in numbers]


def asked(count: int, *spaces: int) -> list[int]:
    """How many sockets came for each namespace. Its own are asked for last: when they are here, no answer is outstanding."""
    own = local[0].netns
    before = {netns: len(stock.get((netns, 2), [])) for netns in (*spaces, own)}

    def came(netns: int) -> int:
        return len(stock.get((netns, 2), [])) - before[netns]

    for netns in spaces:
        send(link.NeedStock(netns, 2, count))
    if own not in spaces:
        send(link.NeedStock(own, 2, 1))
        hear(5.0, lambda: came(own))
    else:
        hear(30.0, lambda: came(own))
        hear(30.0, lambda: came(own) >= count, 1.0)
    hear(LATE_S, silence_s=LATE_S)
    return [came(netns) for netns in spaces]


def hung_up(words: str) -> bool:
    hear(5.0, equipped)
    with contextlib.suppress(OSError):
        agent.sendall(bytes.fromhex(words))
    hear(HANGS_UP_S)
    found = ended
    agent.close()
    return found


link_up()
said: object
if way == "lie":
    until = time.monotonic() + float(rest[0]) * SLOW
    while time.monotonic() < until:
        hear((until - time.monotonic()) / SLOW)
        if ended:  # hung up on: it is there again at once
            link_up()
    said = {"ended": ended}
elif way == "say":
    found = []
    for number, words in enumerate(rest):
        if number:
            link_up()
        found.append(hung_up(words))
    said = {"ended": found}
else:
    hear(5.0, equipped)
    hear(LATE_S, silence_s=LATE_S)  # and whatever else there is for it
    if way == "sockets":
        said = sockets(*rest)
    elif way == "ask":
        said = {"grants": grants(json.loads(rest[4])), "pairs": pairings(rest[0], int(rest[1]), *rest[2:4])}
    elif way == "legs":
        said = legs(rest[0], int(rest[1]), *rest[2:5])
    elif way == "keep":
        acks = rest[4] == "acks"
        said = keep(rest[0], int(rest[1]), rest[2], float(rest[5]), by_leg=rest[3] == "leg")
    elif way == "keys":
        said = {"svids": sorted(svids)}
    elif way == "stock":
        said = {"came": asked(*map(int, rest)), "ended": ended}
    else:
        agent.sendall(link.encode(link.Flow(**json.loads(rest[0]))))
        hear(LATE_S)
        said = {"ended": ended}
print(json.dumps(said))
