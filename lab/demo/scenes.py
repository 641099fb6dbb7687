"""What the demo shows, one function for each line. A scene returns what it observed; NotSeen tells what was instead."""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.demo import wire
from lab.demo.shop import PORTS, NotSeen, Shop, is_virtual
from mesh.ports import HBONE_PORT

Scene = Callable[[Shop], str]
SPLIT_REQUESTS = 1000
SPLIT_PERCENT = (6.0, 14.0)  # around 10; four standard deviations of 1,000 draws
PACKETS_MIN = 100
MARKED_REQUESTS = 200
CONNECT_FAIL_S_MAX = 3.0
KERNEL_SHARE_MIN = 0.5  # the proxy's are what came before the pairing, and one sample in a hundred
KILLED_S = 2.0  # after a load has begun
BEGUN_S_MAX = 60.0
CURL_TIMED_OUT = 28
CARRIED_S_MAX = 15.0  # until then: a busy machine's agent takes its time to pair


def expect(condition: object, observed: str) -> None:
    if not condition:
        raise NotSeen(observed)


def discovery(shop: Shop) -> str:
    found: dict[str, list[str]] = {}
    for name in shop.names:
        addresses = []
        for family in ("ahostsv4", "ahostsv6"):
            lines = shop["client"].run(["getent", family, name]).stdout.splitlines()
            addresses += [line.split()[0] for line in lines[:1]]
        found[name] = addresses
    first = found[shop.names[0]]
    expect(len(first) == 2 and all(map(is_virtual, first)), f"{shop.names[0]} resolved to {first}")
    expect(all(each == first for each in found.values()), f"they resolved to {found}")
    return f"{' and '.join(shop.names)}: {' and '.join(first)}"


def same_node(shop: Shop) -> str:
    answers = (shop.ask("client", "http://catalog-v1.shop.mesh/items") for _ in range(20))
    caller = next((answer["caller"] for answer in answers if answer["by"] == "catalog-v1a"), "")
    expect(caller, "20 requests, none to the endpoint on the client's node")
    expect(caller in shop["client"].addresses, f"the server saw the caller as {caller}")
    return f"client → catalog-v1a, both on {shop.near}: 200, the server sees the caller as {caller}"


def cross_node(shop: Shop) -> str:
    answer = shop.ask("client", "http://catalog-v2.shop.mesh/items")
    expect(answer["caller"] in shop["client"].addresses, f"the server saw the caller as {answer['caller']}")
    through = shop.ask("client", "http://front.shop.mesh/catalog/items")
    expect(through["caller"] in shop["front"].addresses, f"behind nginx the caller was {through['caller']}")
    return (
        f"client on {shop.near} → catalog-v2 on {shop.far}: 200, caller seen as {answer['caller']}; "
        f"client → nginx → {through['by']}: caller seen as nginx's {through['caller']}"
    )


def carried(shop: Shop) -> str:
    deadline = time.monotonic() + CARRIED_S_MAX
    while True:
        before = shop.agent_api(shop.near, "GET", "/v1/express")
        report = shop.load("client", "front.shop.mesh", "/who", "1s", 2)
        after = shop.agent_api(shop.near, "GET", "/v1/express")
        expect(report["errors"] == 0, f"{report['errors']} errors: {report['first_errors']}")
        asked = f"client → nginx, both on {shop.near}, {report['ok']} requests on 2 connections in {report['seconds']} s"
        if not after["on"]:
            return f"{asked}, all by the proxy: express is off on this kernel ({after['why']})"
        kernel = after["carried"]["requests"] - before["carried"]["requests"]
        observed = f"{asked}: {kernel} matched and handed on by the kernel, the others by the proxy"
        if kernel >= KERNEL_SHARE_MIN * report["ok"]:
            return observed
        expect(time.monotonic() < deadline, observed)


def split(shop: Shop) -> str:
    report = shop.load("client", "catalog.shop.mesh", "/items", str(SPLIT_REQUESTS), 4)
    new = report["by"].get("catalog-v2", 0)
    percent = 100 * new / max(report["ok"], 1)
    observed = f"{report['ok']} requests in {report['seconds']} s: v1 {report['ok'] - new}, v2 {new} ({percent:.1f} %)"
    expect(report["errors"] == 0, f"{observed}, {report['errors']} errors: {report['first_errors']}")
    expect(SPLIT_PERCENT[0] <= percent <= SPLIT_PERCENT[1], observed)
    return observed


def redis(shop: Shop) -> str:
    value = secrets.token_hex(4)
    done = shop["client"].run(["redis-cli", "-h", "redis.shop.mesh", "set", "demo", value], timeout=10)
    expect(done.stdout.strip() == "OK", f"SET answered {done.stdout.strip()!r} {done.stderr.strip()!r}")
    got = shop["client"].run(["redis-cli", "-h", "redis.shop.mesh", "get", "demo"], timeout=10).stdout.strip()
    expect(got == value, f"GET answered {got!r}, {value!r} was set")
    visits = shop.ask("client", "http://catalog-v2.shop.mesh/visits")["visits"]
    expect(visits.isdigit(), f"catalog-v2 on {shop.far} got {visits!r} from redis on {shop.near}")
    return f"client on its node: SET, GET {got}; catalog-v2 from the other node: INCR {visits}"


def mariadb(shop: Shop) -> str:
    query = "SELECT name FROM shop.items WHERE id = 3"
    argv = ["mariadb", "--no-defaults", "-h", "mariadb.shop.mesh", "-u", "shop", "-pshop", "--skip-ssl", "-N", "-e", query]
    done = shop["client"].run(argv, timeout=15)
    expect(done.stdout.strip() == "pillion", f"{done.stdout.strip()!r} {done.stderr.strip()[-200:]!r}")
    return f"client on {shop.near} → mariadb on {shop.far}, which speaks first: {query}: {done.stdout.strip()}"


def intruder_l4(shop: Shop) -> str:
    timed = "LC_ALL=C TIMEFORMAT=%R; time redis-cli -h redis.shop.mesh get demo"  # by bash: what starts it takes its time too
    done = shop["intruder"].run(["bash", "-c", timed], timeout=15)
    errors, _, took_s = done.stderr.strip().rpartition("\n")
    said, took = (done.stdout + errors).strip(), float(took_s or "inf")
    expect(
        "refused" in said or "not permitted" in said or "reset" in said or "Could not connect" in said, f"redis-cli said {said!r}"
    )
    expect(took < CONNECT_FAIL_S_MAX, f"the refusal took {took:.1f} s")
    why = shop.why("shop/intruder", "shop/redis")
    expect(why is None or why["rule"] == "shop/redis-no-intruder#0", f"policy why says {why}")
    denied = [flow for flow in shop.flows(shop.near) if flow["verdict"] == "denied" and "sa/intruder" in flow.get("source", "")]
    expect(denied, "no denied flow of the intruder was told")
    error = said.splitlines()[0].rpartition(": ")[2]
    rule = f", by rule {why['rule']}" if why else ""
    return f"redis-cli: {error}, after {took * 1000:.0f} ms; the flow says {denied[-1]['reason']}{rule}"


def intruder_l7(shop: Shop) -> str:
    look, _ = shop.curl("intruder", "http://catalog.shop.mesh/items")
    expect(look == 200, f"GET /items, which a rule allows, answered {look}")
    status, body = shop.curl("intruder", "http://catalog.shop.mesh/admin")
    expect(status == 403 and "shop/catalog-admin" in body, f"GET /admin answered {status} {body.strip()[:200]}")
    post, said = shop.curl("intruder", "http://catalog.shop.mesh/items", "-d", "x")
    expect(post == 403, f"POST /items answered {post} {said.strip()[:200]}")
    admin, _ = shop.curl("client", "http://catalog.shop.mesh/admin")
    expect(admin == 200, f"the client's GET /admin answered {admin}")
    return f"GET /items 200, GET /admin 403 “{body.strip()}”, POST /items 403; the client's GET /admin 200"


def plaintext(shop: Shop) -> str:
    node, name = shop.stranger
    target, port, before = shop[name].address, PORTS[name], shop.dropped()
    with shop.capture(shop.near) as seen:
        argv = ["curl", "-sS", "-o", "/dev/null", "--max-time", "2", "-w", "%{http_code}", f"http://{target}:{port}/items"]
        done = shop.outside(node, argv)
    expect(done.returncode != 0 and done.stdout in ("", "000"), f"the dial was answered: {done.stdout} {done.stderr.strip()}")
    after, syns = shop.dropped(), len(wire.tcp_on(seen, port))
    observed = f"node {node} → {target}:{port}: {syns} packets on the wire at {shop.near}"
    if before is None or after is None:  # what is refused or has no route is no drop
        expect(done.returncode == CURL_TIMED_OUT and syns, f"{observed}, {done.stderr.strip()}")
        return f"{observed}, none answered: {done.stderr.strip()}"
    expect(after > before, f"nothing was counted as ingress_plaintext; curl said {done.stderr.strip()!r}")
    return f"{observed}, {after - before:.0f} dropped as ingress_plaintext, none answered"


def encrypted(shop: Shop) -> str:
    marker = f"marker-{secrets.token_hex(8)}"
    with shop.capture(shop.far) as seen:
        report = shop.load("client", "catalog-v2.shop.mesh", "/echo", str(MARKED_REQUESTS), 1, marker)
    expect(report["errors"] == 0, f"{report['errors']} errors: {report['first_errors']}")
    packets, found = len(wire.tcp_on(seen, HBONE_PORT)), seen.contains(marker.encode())
    expect(packets > PACKETS_MIN, f"{packets} packets on :{HBONE_PORT} between the nodes, {len(seen.frames)} in all")
    expect(found == 0, f"the marker is in {found} of {len(seen.frames)} frames")
    plain = shop.in_the_clear(marker, MARKED_REQUESTS)
    expect(plain > 0, "the marker was not seen without the mesh either: the capture proves nothing")
    return f"{MARKED_REQUESTS} marked requests: {packets} packets on :{HBONE_PORT}, marker in 0; without the mesh in {plain}"


@contextmanager
def loaded(shop: Shop, host: str) -> Iterator[dict[str, Any]]:
    """Beside a load of five seconds, which has begun; what it reports is there after the block."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder) / "begun"

        def load() -> None:
            result.update(shop.load("client", host, "/items", "5s", 2, begun=begun))

        thread = threading.Thread(target=load)
        thread.start()
        try:
            deadline = time.monotonic() + BEGUN_S_MAX
            while not begun.exists() and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.02)
            expect(begun.exists(), "the load had no answer")
            yield result
        finally:
            thread.join()
    expect(result, "the load ended without a report")


def failover(shop: Shop) -> str:
    try:
        with loaded(shop, "catalog-v1.shop.mesh") as result:
            time.sleep(KILLED_S)  # the scene's own time: the load shall have met both endpoints
            shop.kill("catalog-v1a")
        by, killed_at = result["by"], KILLED_S
        expect(by.get("catalog-v1a") and by.get("catalog-v1b"), f"answers came from {by}")
        observed = f"{result['ok']} answers ({by}), {result['errors']} errors, slowest {result['slowest_ms']} ms"
        expect(result["errors"] <= 4 and result["last_error_s"] < killed_at + 2.0, f"{observed}: {result['first_errors']}")
        after = shop.load("client", "catalog-v1.shop.mesh", "/items", "100")
        expect(after["errors"] == 0 and set(after["by"]) == {"catalog-v1b"}, f"afterwards: {after}")
        return f"catalog-v1a killed under load: {observed}; then 100 of 100 by catalog-v1b"
    finally:
        shop.restore("catalog-v1a")


def rotation(shop: Shop) -> str:
    old, spiffe = shop.certificate()
    with loaded(shop, "catalog-v2.shop.mesh") as result:
        shop.rotate()
        new, deadline = old, time.monotonic() + 10.0
        while new == old and time.monotonic() < deadline:
            new, _ = shop.certificate()
    expect(new != old, f"after 10 s :15008 still shows serial {old}")
    expect(result["errors"] == 0, f"{result['errors']} errors in {result['ok']} requests: {result['first_errors']}")
    told = shop.serial(*shop.shown_as)
    expect(told.lower().lstrip("0") == new.lstrip("0"), f"the wire shows {new}, the agent tells {told}")
    return f"{spiffe}: serial …{old[-8:]} → …{new[-8:]} on the wire, {result['ok']} requests meanwhile, 0 errors"


SCENES: dict[str, Scene] = {
    "discovery by name": discovery,
    "request, same node": same_node,
    "request, cross node": cross_node,
    "carried by the kernel": carried,
    "90/10 split": split,
    "redis": redis,
    "mariadb, server first": mariadb,
    "intruder, L4": intruder_l4,
    "intruder, L7": intruder_l7,
    "plaintext to the pod": plaintext,
    "encrypted between nodes": encrypted,
    "endpoint killed": failover,
    "certificates rotated": rotation,
}
