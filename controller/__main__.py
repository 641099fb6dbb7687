"""``python -m controller``: one controller with its state in a directory of its own."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import structlog
from aiohttp import web

from controller.agents import AgentApi
from controller.api import OperatorApi
from controller.ca import Authority
from controller.events import Telemetry
from controller.files import private_directory, write_atomically
from controller.grants import Grants
from controller.publish import Publisher
from controller.registry import Registry
from controller.server import BODY_BYTES_MAX, Gate, Tls, serve
from controller.sqlite import SqliteStore
from controller.status import Status
from controller.store import StoreError
from mesh import logs
from mesh.addresses import host_port, parse_host_port
from mesh.identity import IdentityError, check_trust_domain
from mesh.notify import Notify

UPKEEP_INTERVAL_S = 60.0

log = structlog.get_logger()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    about = "The controller of a mesh, with its state in a directory of its own."
    parser = argparse.ArgumentParser(prog="pillion-controller", description=about)
    parser.add_argument("--state-dir", type=Path, required=True, help="database and keys; back it up as a whole")
    parser.add_argument("--run-dir", type=Path, required=True, help="controller.sock and ready")
    parser.add_argument(
        "--listen", type=_address, action="append", required=True, metavar="IP:PORT", help="for operators and nodes; may repeat"
    )
    parser.add_argument(
        "--advertise", type=_address, action="append", metavar="IP:PORT", help="what nodes dial; default: --listen"
    )
    parser.add_argument("--trust-domain", type=_trust_domain, default="mesh.local", help="of a new mesh; fixed from then on")
    return parser.parse_args(argv)


def _address(text: str) -> tuple[str, int]:
    try:
        return parse_host_port(text, least=0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not 10.0.0.1:15443 or [fd00::1]:15443") from error


def _trust_domain(text: str) -> str:
    try:
        return check_trust_domain(text)
    except IdentityError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def url(address: tuple[str, int]) -> str:
    return f"https://{host_port(*address)}"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the state directory for this process alone; StoreError while another one has it."""
    descriptor = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"{directory} is in use by another controller; stop that one or give this one another --state-dir"
            ) from None
        yield
    finally:
        os.close(descriptor)


async def run(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT."""
    state, run_dir = options.state_dir, options.run_dir
    for directory in (state, run_dir):
        directory.mkdir(parents=True, exist_ok=True)
    ready: Path = run_dir / "ready"
    with locked(state):
        private_directory(state)
        ready.unlink(missing_ok=True)
        store = await SqliteStore.open(state / "pillion.db")
        try:
            await _serve(options, store, ready)
        finally:
            ready.unlink(missing_ok=True)
            await store.close()


async def _serve(options: argparse.Namespace, store: SqliteStore, ready: Path) -> None:
    telemetry = Telemetry()
    advertised = options.advertise or options.listen
    authority = await Authority.open(store, options.state_dir / "ca", options.trust_domain)
    registry = await Registry.open(store, authority, options.trust_domain)
    await authority.renew_intermediate()
    await registry.prune(time.time())
    addresses = sorted({host for host, _ in (*options.listen, *advertised) if not ipaddress.ip_address(host).is_unspecified})
    tls = Tls(authority, store, options.trust_domain, addresses)
    await tls.renew()
    publisher = Publisher(registry, telemetry)
    await publisher.attempt()
    status = Status(registry, publisher)
    app = web.Application(
        client_max_size=BODY_BYTES_MAX,
        middlewares=[Gate(store, authority, registry, telemetry, options.trust_domain).middleware],
    )
    app.on_response_prepare.append(_sign_off)
    app.add_routes(
        OperatorApi(store, authority, registry, publisher, status, telemetry, tls, [url(a) for a in advertised]).routes()
    )
    app.add_routes(AgentApi(store, authority, registry, Grants(registry), publisher, telemetry).routes())
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner, servers = await serve(app, options.listen, tls, options.run_dir / "controller.sock", telemetry.turned_away.inc)
    bundle = options.state_dir / "bundle.pem"
    notify = Notify(os.environ, partial(socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM))
    tasks = [
        asyncio.create_task(publisher.run(), name="publisher"),
        asyncio.create_task(_upkeep(authority, registry, publisher, tls, bundle), name="upkeep"),
        asyncio.create_task(_alive(notify, store), name="alive"),
        asyncio.create_task(stop.wait(), name="stop"),
    ]
    try:
        await _tell_roots(authority, bundle)
        ready.write_text(f"{os.getpid()}\n")
        notify.tell(READY=1, STATUS=f"revision {registry.revision}")
        log.info("serving", listen=[url(address) for address in options.listen], revision=registry.revision)
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        ready.unlink(missing_ok=True)
        log.info("stopping")
        notify.tell(STOPPING=1)
        for server in servers:
            server.close()
        for view in publisher.nodes.values():
            if view.close is not None:
                view.close("controller_stops")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await runner.cleanup()
        telemetry.sparing.close()


async def _alive(notify: Notify, store: SqliteStore) -> None:
    """Signs of life: the loop turns and the database answers."""
    while True:
        await store.revision()
        notify.tell(WATCHDOG=1)
        await asyncio.sleep(min(notify.interval_s, UPKEEP_INTERVAL_S))


async def _sign_off(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "pillion"  # not which versions of what


async def _tell_roots(authority: Authority, bundle: Path) -> None:
    """For whoever is to trust us: in a file, which the disk may take its time for."""
    await asyncio.to_thread(_keep, bundle, "".join(authority.bundle).encode())


def _keep(path: Path, data: bytes) -> None:
    """The file holds this; it is not written where it does."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == data:
            return
    write_atomically(path, data, 0o644)


async def _upkeep(authority: Authority, registry: Registry, publisher: Publisher, tls: Tls, bundle: Path) -> None:
    """What has to happen now and then; a failure is logged and tried again."""
    while True:
        await asyncio.sleep(UPKEEP_INTERVAL_S)
        try:
            await _tell_roots(authority, bundle)
            await registry.prune(time.time())
            await publisher.forget_gone()
            if await authority.renew_intermediate() or time.time() >= tls.renew_at:
                await tls.renew()
        except Exception:
            log.exception("upkeep failed; trying again", in_s=UPKEEP_INTERVAL_S)


def main() -> None:
    """Exit code 1 when the state or an address cannot be used, with the reason on stderr."""
    logs.configure(sys.stderr)
    options = arguments()
    try:
        asyncio.run(run(options))
    except (StoreError, OSError) as error:
        log.error("cannot serve", error=str(error))
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
