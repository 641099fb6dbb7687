"""The proxy's first process: makes the workers' sockets, confines itself, forks workers and keeps them alive.

SIGTERM is a planned end: it leaves its workers to themselves, and ends at once, so that a successor may start. They serve until
that one's do, and drain (`l7proxy.drain`). SIGINT stops them all within seconds. Whoever kills it kills them."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
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

from l7proxy.confine import ConfineError, confine, die_with_parent, live_without_parent, user_ids
from l7proxy.drain import LIMIT_S
from l7proxy.places import Place, PlacesError, claim
from mesh import logs
from mesh.notify import Notify

WORKERS_MAX = 256
DRAIN_LIMIT_MAX_S = 86_400.0
RETIRE = signal.SIGUSR2  # to a worker: see `Tie.cut`
STEADY_S = 10.0  # a worker that lived this long is restarted at once
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 5.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
DRAIN_S = 35.0  # after SIGINT; then SIGKILL
RETIRE_S = 5.0  # after SIGTERM; a worker that has not gone its own way by then dies with us
SILENCE_S = 30.0  # a worker whose loop does not turn for so long is killed

log = structlog.get_logger()


def tune_allocator() -> None:
    """Buffers of a bulk transfer come and go: keep their memory instead of giving it back each time."""
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # not glibc
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 32 << 20)


class Tie:
    """What binds a worker to the process that forked it: that one hears of it, and it dies with that one."""

    def __init__(self, fd: int, number: int) -> None:
        self._fd, self._number = fd, number

    def beat(self) -> None:
        """Called every second; a loop that does not turn for `SILENCE_S` is the end of its worker."""
        if self._fd < 0:
            signal.alarm(int(SILENCE_S))
            return
        with suppress(OSError):  # the pipe is full: the main process has been told often enough
            os.write(self._fd, bytes((self._number,)))

    def cut(self) -> None:
        """From here on nobody watches but itself."""
        if self._fd >= 0:
            live_without_parent()
            fd, self._fd = self._fd, -1
            self.beat()
            os.close(fd)


Run = Callable[[int, socket.socket, Tie], int]


def run_worker(index: int, listen: socket.socket, tie: Tie, generation: int = 0, limit_s: float = LIMIT_S) -> int:
    """One worker, until it is drained. Returns the exit status."""
    import uvloop

    from l7proxy import inbound, scheduling
    from l7proxy.worker import Worker

    tune_allocator()

    async def live() -> None:
        worker = Worker(index, listen)
        worker.generation = generation
        inbound.install(worker)
        thread = scheduling.LoopThread()
        worker.budgets.on_crowd = thread.crowd
        worker.on_sweep.append(lambda _: tie.beat())

        def retire() -> None:
            tie.cut()
            worker.ending.retire(limit_s)

        def look() -> None:
            thread.look(loop.time())
            loop.call_later(scheduling.LOOK_S, look)

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(RETIRE, retire)
        loop.call_soon(tie.beat)  # its loop turns, so it listens
        loop.call_soon(look)
        await worker.run()

    uvloop.run(live())
    return 0


@dataclass(slots=True)
class Slot:
    """Where a worker lives. ``number``: among those of this process."""

    number: int
    place: Place
    pid: int = 0
    started: float = 0.0
    delay: float = 0.0
    due: float = 0.0  # when to start it (again)
    heard: float = 0.0  # its last sign of life; 0: none yet


class Supervisor:
    """Forks a worker for each slot and replaces those that die. ``run``: the worker's life, returns its exit status."""

    def __init__(self, places: list[Place], notify: Notify, run: Run = run_worker) -> None:
        self._slots = [Slot(number, place) for number, place in enumerate(places)]
        self._notify, self._told_at, self._ready = notify, 0.0, False
        self._run = run
        self._beats, self._beat = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # workers write their number
        self._stopping = self._retiring = 0.0
        self._retires = False

    def serve(self) -> int:
        """Until SIGTERM, and no worker would die with us; or SIGINT and the last worker's end."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._retire)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            now = time.monotonic()
            self._reap(now)
            if self._retires and not self._retiring:
                self._leave()
            if self._retiring:
                if now > self._retiring:
                    return 0
            elif self._stopping:
                if not any(slot.pid for slot in self._slots):
                    return 0
                if now > self._stopping:
                    self._signal(signal.SIGKILL)
            else:
                for slot in self._slots:
                    if not slot.pid and slot.due <= now:
                        self._fork(slot, now, (wake_read, wake_write))
                self._watch(now)
            ending = self._stopping or self._retiring
            waits = [slot.due - now for slot in self._slots if not slot.pid and not ending]
            waits.append(min(SILENCE_S, self._notify.interval_s))
            if ending:
                waits.append(max(0.2, ending - now))
            with suppress(InterruptedError):
                select.select([wake_read, self._beats], [], [], max(0.0, min(waits)))
            with suppress(BlockingIOError):
                while os.read(wake_read, 512):
                    pass
            with suppress(BlockingIOError):
                beats = os.read(self._beats, 4096)
                if not beats:  # all its writers are gone
                    return 0
                for number in beats:
                    self._slots[number].heard = time.monotonic()

    def _watch(self, now: float) -> None:
        """Ready once every worker listens. One that hangs is killed here, alone; who hears no more of us kills us all."""
        for slot in self._slots:
            if slot.pid and now - max(slot.heard, slot.started) > SILENCE_S:
                log.error("worker hangs; killed", worker=slot.place.index, pid=slot.pid, silent_s=SILENCE_S)
                with suppress(ProcessLookupError):
                    os.kill(slot.pid, signal.SIGKILL)
        if not self._ready and all(slot.heard for slot in self._slots):
            self._ready = True
            self._notify.tell(READY=1, STATUS=f"{len(self._slots)} workers listen for the agent")
        if now - self._told_at >= self._notify.interval_s:
            self._told_at = now
            self._notify.tell(WATCHDOG=1)

    def _retire(self, *_: object) -> None:
        self._retires = not self._stopping

    def _leave(self) -> None:
        self._notify.tell(STOPPING=1, STATUS="left to its workers and to who comes next")
        self._retiring = time.monotonic() + RETIRE_S
        self._signal(RETIRE)
        os.close(self._beat)  # workers that go on without us close theirs

    def _stop(self, *_: object) -> None:
        if not self._stopping and not self._retires:
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
                    if not self._stopping and not self._retiring:
                        told = {"code": code, "lived_s": round(lived, 1), "again_s": slot.delay}
                        log.error("worker ended", worker=slot.place.index, pid=pid, **told)

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
                    other.place.close()
            code = self._run(slot.place.index, slot.place.listen, Tie(self._beat, slot.number))
        except BaseException:
            log.exception("worker failed", worker=slot.place.index)
        finally:
            sys.stderr.flush()
            os._exit(code)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m l7proxy", description="Pillion's node proxy. Start it as root; it gives that up."
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="where the workers' sockets are made, for the agent")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--drain-limit-s",
        type=float,
        default=LIMIT_S,
        help="how long open connections may last after a planned end (%(default)g)",
    )
    parser.add_argument("--user", default=None, help="name or uid to run as (default: pillion-proxy, else 65471)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    logs.configure(sys.stderr)
    if not 0 < arguments.workers <= WORKERS_MAX:
        log.error("--workers is out of range", workers=arguments.workers, most=WORKERS_MAX)
        return 2
    if not 0 < arguments.drain_limit_s <= DRAIN_LIMIT_MAX_S:
        log.error("--drain-limit-s is out of range", given=arguments.drain_limit_s, most=DRAIN_LIMIT_MAX_S)
        return 2
    # Everything is imported before the fork: workers share its pages, and need less of the file system.
    import uvloop  # noqa: F401

    from l7proxy import dns, inbound, tunnel_pool, worker  # noqa: F401

    try:
        uid, gid = user_ids(arguments.user)
        notify = Notify(os.environ, partial(socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM))  # while it may make a socket
        arguments.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        places = claim(arguments.run_dir, arguments.workers)
        os.chdir("/")
        confine(uid, gid)
    except (ConfineError, PlacesError, OSError) as error:
        log.error("the proxy cannot start", error=str(error))
        return 1
    gc.collect()
    gc.freeze()
    generation = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    log.info("proxy started", workers=[place.index for place in places], uid=uid, generation=generation)
    return Supervisor(places, notify, partial(run_worker, generation=generation, limit_s=arguments.drain_limit_s)).serve()
