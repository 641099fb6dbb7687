"""The proxy's first process: makes the workers' sockets, confines itself, forks workers and keeps them alive."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from l7proxy.confine import ConfineError, confine, die_with_parent, user_ids
from mesh.notify import Notify

WORKERS_MAX = 256
BACKLOG = 16
STEADY_S = 10.0  # a worker that lived this long is restarted at once
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 5.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
DRAIN_S = 35.0  # after SIGTERM; then SIGKILL
SILENCE_S = 30.0  # a worker whose loop does not turn for so long is killed

log = structlog.get_logger()
Beat = Callable[[], None]


def configure_logging() -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def worker_socket(run_dir: Path, index: int) -> socket.socket:
    """``worker-<i>.sock``, listening, for root alone."""
    path = run_dir / f"worker-{index}.sock"
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(before)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def tune_allocator() -> None:
    """Buffers of a bulk transfer come and go: keep their memory instead of giving it back each time."""
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # not glibc
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 32 << 20)


def run_worker(index: int, listen: socket.socket, beat: Beat = lambda: None) -> int:
    """One worker, until it is drained; ``beat`` is called every second. Returns the exit status."""
    import uvloop

    from l7proxy import inbound
    from l7proxy.worker import Worker

    tune_allocator()

    async def live() -> None:
        worker = Worker(index, listen)
        inbound.install(worker)
        worker.on_sweep.append(lambda _: beat())
        asyncio.get_running_loop().call_soon(beat)  # its loop turns, so it listens
        await worker.run()

    uvloop.run(live())
    return 0


def _beat(fd: int, index: int) -> None:
    with suppress(OSError):  # the pipe is full: the main process has been told often enough
        os.write(fd, bytes((index,)))


@dataclass(slots=True)
class Slot:
    """A worker's place."""

    index: int
    listen: socket.socket
    pid: int = 0
    started: float = 0.0
    delay: float = 0.0
    due: float = 0.0  # when to start it (again)
    heard: float = 0.0  # its last sign of life; 0: none yet


class Supervisor:
    """Forks a worker for each slot and replaces those that die. ``run``: the worker's life, returns its exit status."""

    def __init__(
        self, listens: list[socket.socket], notify: Notify, run: Callable[[int, socket.socket, Beat], int] = run_worker
    ) -> None:
        self._slots = [Slot(index, sock) for index, sock in enumerate(listens)]
        self._notify, self._told_at, self._ready = notify, 0.0, False
        self._run = run
        self._beats, self._beat = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # workers write their index
        self._stopping = 0.0

    def serve(self) -> int:
        """Until SIGTERM and the last worker's end."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            now = time.monotonic()
            self._reap(now)
            if self._stopping:
                if not any(slot.pid for slot in self._slots):
                    return 0
                if now > self._stopping:
                    self._signal(signal.SIGKILL)
            else:
                for slot in self._slots:
                    if not slot.pid and slot.due <= now:
                        self._fork(slot, now, (wake_read, wake_write))
                self._watch(now)
            waits = [slot.due - now for slot in self._slots if not slot.pid and not self._stopping]
            waits.append(min(SILENCE_S, self._notify.interval_s))
            if self._stopping:
                waits.append(max(0.2, self._stopping - now))
            with suppress(InterruptedError):
                select.select([wake_read, self._beats], [], [], max(0.0, min(waits)))
            with suppress(BlockingIOError):
                while os.read(wake_read, 512):
                    pass
            with suppress(BlockingIOError):
                for index in os.read(self._beats, 4096):
                    self._slots[index].heard = time.monotonic()

    def _watch(self, now: float) -> None:
        """Ready once every worker listens. One that hangs is killed here, alone; who hears no more of us kills us all."""
        for slot in self._slots:
            if slot.pid and now - max(slot.heard, slot.started) > SILENCE_S:
                log.error("worker hangs; killed", worker=slot.index, pid=slot.pid, silent_s=SILENCE_S)
                with suppress(ProcessLookupError):
                    os.kill(slot.pid, signal.SIGKILL)
        if not self._ready and all(slot.heard for slot in self._slots):
            self._ready = True
            self._notify.tell(READY=1, STATUS=f"{len(self._slots)} workers listen for the agent")
        if now - self._told_at >= self._notify.interval_s:
            self._told_at = now
            self._notify.tell(WATCHDOG=1)

    def _stop(self, *_: object) -> None:
        if not self._stopping:
            self._notify.tell(STOPPING=1, STATUS="draining")
            self._stopping = time.monotonic() + DRAIN_S
            self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for slot in self._slots:
            if slot.pid:
                with suppress(ProcessLookupError):
                    os.kill(slot.pid, number)

    def _reap(self, now: float) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for slot in self._slots:
                if slot.pid == pid:
                    slot.pid = 0
                    lived = now - slot.started
                    slot.delay = 0.0 if lived > STEADY_S else min(BACKOFF_MAX_S, max(BACKOFF_MIN_S, 2 * slot.delay))
                    slot.due = now + slot.delay
                    code = os.waitstatus_to_exitcode(status)
                    if not self._stopping:
                        log.error(
                            "worker ended", worker=slot.index, pid=pid, code=code, lived_s=round(lived, 1), again_s=slot.delay
                        )

    def _fork(self, slot: Slot, now: float, close: tuple[int, int]) -> None:
        parent = os.getpid()
        slot.started = now
        pid = os.fork()
        if pid:
            slot.pid = pid
            return
        code = 1
        try:
            die_with_parent(signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            for fd in (*close, self._beats):
                os.close(fd)
            for other in self._slots:
                if other is not slot:
                    other.listen.close()
            code = self._run(slot.index, slot.listen, partial(_beat, self._beat, slot.index))
        except BaseException:
            log.exception("worker failed", worker=slot.index)
        finally:
            sys.stderr.flush()
            os._exit(code)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m l7proxy", description="Pillion's node proxy. Start it as root; it gives that up."
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="where the workers' sockets are made, for the agent")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--user", default=None, help="name or uid to run as (default: pillion-proxy, else 65471)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    configure_logging()
    if not 0 < arguments.workers <= WORKERS_MAX:
        log.error("--workers is out of range", workers=arguments.workers, most=WORKERS_MAX)
        return 2
    # Everything is imported before the fork: workers share its pages, and need less of the file system.
    import uvloop  # noqa: F401

    from l7proxy import dns, inbound, tunnel_pool, worker  # noqa: F401

    try:
        uid, gid = user_ids(arguments.user)
        notify = Notify(os.environ, partial(socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM))  # while it may make a socket
        arguments.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        listens = [worker_socket(arguments.run_dir, index) for index in range(arguments.workers)]
        os.chdir("/")
        confine(uid, gid)
    except (ConfineError, OSError) as error:
        log.error("the proxy cannot start", error=str(error))
        return 1
    gc.collect()
    gc.freeze()
    log.info("proxy started", workers=arguments.workers, uid=uid)
    return Supervisor(listens, notify).serve()
