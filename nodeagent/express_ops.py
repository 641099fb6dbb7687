"""What express does to sockets it holds no descriptor of: operations of bpf/express_control.c, run by BPF_PROG_TEST_RUN on one
thread that visits the sockets' network namespaces."""

from __future__ import annotations

import ctypes
import heapq
import itertools
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from nodeagent.datapath_api import DatapathError
from nodeagent.layouts import Layouts, address
from nodeagent.libbpf import libbpf
from nodeagent.maps import check
from nodeagent.netns import enter

OK = "ok"
# How long after an enrolment to look again: doubling from, to. The first is far more than a thread needs from choosing TCP's
# own recv() to be seen in it. A busy connection is at rest for moments only, so the pause grows slowly while it is young.
SETTLE_FIRST_S, SETTLE_BUSY_S, SETTLE_LAST_S = 0.001, 0.016, 10.0
SETTLE_YOUNG = 64  # looks
RESULTS = "PL_XQ_"
_AF_INET, _AF_INET6 = 2, 10


class Enrolment(NamedTuple):
    """One connection of a pair. ``local``, ``remote``: of the proxy's socket. Client side: the accepted socket; server side: the
    one to the endpoint, with its slot, the endpoint's workload id and port, and the address the server was shown."""

    record: int
    side: str  # "client" | "server"
    local: tuple[str, int]
    remote: tuple[str, int]
    identity: int  # the client's
    slot: int = 0
    workload: int = 0
    port: int = 0
    caller: tuple[str, int] = ("0.0.0.0", 0)
    leg: bool = False  # of itself alone: ``record`` is a leg's


class _Opts(ctypes.Structure):
    """struct bpf_test_run_opts (libbpf)"""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


class _Unsettled(NamedTuple):
    """Who waits for SETTLE, by when to look. netns: a descriptor of ours; done: to be called after the first look."""

    due: float
    order: int
    pause: float
    looks: int
    netns: int
    enrolment: Enrolment
    done: Callable[[], None] | None = None


class Operations:
    """``program``: the pin of express_control."""

    def __init__(self, program: Path, layouts: Layouts) -> None:
        self._fd = check(libbpf.bpf_obj_get(os.fsencode(program)), f"program {program}")
        self._layout, self._enums = layouts["pl_xop"], layouts.enums
        self._names = {code: name.removeprefix(RESULTS).lower() for name, code in self._enums.items() if name.startswith(RESULTS)}
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()  # SimpleQueue can miss a deadline
        self._unsettled: list[_Unsettled] = []
        self._order = itertools.count()
        self.failures = 0  # sockets never settled since the kernel refused
        self._here = 0  # inode of the thread's netns
        self._thread = threading.Thread(target=self._run, name="express", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        for waiting in self._unsettled:
            os.close(waiting.netns)
            if waiting.done is not None:
                waiting.done()
        os.close(self._fd)

    def enrol(self, items: Sequence[tuple[int, Enrolment]]) -> list[tuple[str, int]]:
        """For each (netns, enrolment): (OK or why not, key). Returns when each was looked at once whether it is settled:
        until then no byte should come to these sockets, since FIONREAD does not count TCP's own meanwhile. Raises what one of
        them met; the descriptors are of no use here any more then, either."""
        futures: list[Future[tuple[str, int]]] = [Future() for _ in items]
        for (netns_fd, enrolment), future in zip(items, futures, strict=True):
            self._jobs.put(partial(self._enrol, netns_fd, enrolment, future))
        wait(futures)
        return [future.result() for future in futures]

    def check(self, netns_fd: int, enrolment: Enrolment) -> str:
        return cast(str, self._call(lambda: self._on_sockets("CHECK", netns_fd, enrolment)[0]))

    def change(self, kind: str, record: int, program: int = 0) -> str:
        """FORGET or PROGRAM: needs no socket, so it runs where it is called."""
        enums = self._enums
        return self._execute(kind=enums[f"PL_XK_{kind}"], side=enums["PL_X_CLIENT"], record=record, program=program)[0]

    # ---- the thread

    def _call(self, work: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()

        def job() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # handed to the caller
                done.set_exception(error)

        self._jobs.put(job)
        return done.result()

    def _run(self) -> None:
        while True:
            pause = self._unsettled[0].due - time.monotonic() if self._unsettled else None
            due = pause is not None and pause <= 0
            if due:
                self._settle(heapq.heappop(self._unsettled))
            try:
                job = self._jobs.get(block=not due, timeout=pause)  # its turn comes, however many are due
            except queue.Empty:
                continue
            if job is None:
                return
            job()

    def _enter(self, netns_fd: int) -> None:
        place = os.fstat(netns_fd).st_ino
        if place == self._here:
            return
        enter(netns_fd)
        self._here = place

    def _enrol(self, netns_fd: int, enrolment: Enrolment, future: Future[tuple[str, int]]) -> None:
        try:
            result = self._on_sockets("LEG" if enrolment.leg else "ENROL", netns_fd, enrolment)
            if result[0] == OK:
                self._later(SETTLE_FIRST_S, 0, os.dup(netns_fd), enrolment, lambda: future.set_result(result))
            else:
                future.set_result(result)
        except BaseException as error:  # handed to the caller
            future.set_exception(error)

    def _later(self, pause: float, looks: int, netns: int, enrolment: Enrolment, done: Callable[[], None] | None = None) -> None:
        due = time.monotonic() + pause
        heapq.heappush(self._unsettled, _Unsettled(due, next(self._order), pause, looks, netns, enrolment, done))

    def _settle(self, waiting: _Unsettled) -> None:
        """Raises nothing: who waits for the enrolment hears of it, and the thread goes on."""
        again = False
        try:
            result, _ = self._on_sockets("SETTLE_LEG" if waiting.enrolment.leg else "SETTLE", waiting.netns, waiting.enrolment)
            if result == "not_yet":
                looks = waiting.looks + 1
                pause = min(2 * waiting.pause, SETTLE_BUSY_S if looks < SETTLE_YOUNG else SETTLE_LAST_S)
                self._later(pause, looks, waiting.netns, waiting.enrolment)
                again = True
        except Exception:  # its requests stay in user space
            self.failures += 1
        finally:
            if not again:
                with suppress(OSError):
                    os.close(waiting.netns)
            if waiting.done is not None:
                waiting.done()

    # ---- one operation

    def _on_sockets(self, kind: str, netns_fd: int, enrolment: Enrolment) -> tuple[str, int]:
        self._enter(netns_fd)
        enums = self._enums
        return self._execute(
            kind=enums[f"PL_XK_{kind}"],
            side=enums[f"PL_X_{enrolment.side.upper()}"],
            record=enrolment.record,
            key=secrets.randbits(63) | 1,
            slot=enrolment.slot,
            identity=enrolment.identity,
            family=_AF_INET6 if ":" in enrolment.local[0] else _AF_INET,
            workload=enrolment.workload,
            port=enrolment.port,
            local=address(enrolment.local[0]),
            local_port=enrolment.local[1],
            remote=address(enrolment.remote[0]),
            remote_port=enrolment.remote[1],
            caller=address(enrolment.caller[0]),
            caller_port=enrolment.caller[1],
        )

    def _execute(self, **fields: int | bytes) -> tuple[str, int]:
        """(result's name, key)."""
        packet = ctypes.create_string_buffer(self._layout.pack(**fields), self._layout.size)
        place = ctypes.cast(packet, ctypes.c_void_p)
        opts = _Opts(sz=ctypes.sizeof(_Opts), data_in=place, data_out=place, repeat=1)
        opts.data_size_in = opts.data_size_out = self._layout.size
        failure = libbpf.bpf_prog_test_run_opts(self._fd, ctypes.byref(opts))
        if failure:
            raise DatapathError(f"express operation {fields['kind']!r}: {os.strerror(-failure)}")
        name = self._names.get(opts.retval, f"code {opts.retval}")
        return name, int(self._layout.unpack(packet.raw)["key"]) if name == OK else 0
