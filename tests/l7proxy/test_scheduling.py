"""What the scheduler is told, as the kernel repeats it; that the confined proxy may say so: test_confine.py."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
from collections.abc import Callable

from l7proxy import scheduling

SCHED_GETATTR = 315
SLICES = tuple(int(part) for part in platform.release().split(".")[:2]) >= (6, 12)


def attributes() -> tuple[int, int, int]:
    """Of this thread: policy, nice, slice in ns."""
    buffer = ctypes.create_string_buffer(56)
    assert ctypes.CDLL(None).syscall(SCHED_GETATTR, 0, buffer, 56, 0) == 0
    _, policy, _, nice, _, slice_ns, _, _ = struct.unpack_from("=IIQiIQQQ", buffer.raw)
    return policy, nice, slice_ns


def in_a_thread(work: Callable[[], object]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed, failed


def test_a_loop_is_prompt_while_it_must_be_and_its_threads_are_not() -> None:
    before = attributes()

    def loop() -> None:
        thread = scheduling.LoopThread()
        assert thread.crowd(True)
        assert attributes() == (os.SCHED_OTHER, before[1], scheduling.SLICE_NS if SLICES else before[2])
        in_a_thread(lambda: attributes() == before or 1 / 0)
        assert thread.crowd(False)
        assert attributes() == before

    in_a_thread(loop)


class Seconds:
    """A loop's thread, and what it lived through: shares of each second that it ran and that it waited."""

    def __init__(self) -> None:
        self.now, self.ran, self.waited = 100.0, 0.0, 0.0
        self.thread = scheduling.LoopThread(lambda: (self.ran, self.waited))
        self.thread.look(self.now)

    def live(self, ran: float, waited: float) -> int:
        """Its policy after one more."""
        self.now, self.ran, self.waited = self.now + 1, self.ran + ran, self.waited + waited
        self.thread.look(self.now)
        return attributes()[0]


def test_a_busy_loop_interrupts_nobody() -> None:
    def loop() -> None:
        life = Seconds()
        assert [life.live(0.1, 0.01), life.live(0.39, 0.1)] == [os.SCHED_OTHER] * 2
        assert [life.live(0.5, 0.3), life.live(0.32, 0.1)] == [os.SCHED_BATCH] * 2
        assert life.live(0.2, 0.1) == os.SCHED_OTHER, "it is busy no longer"
        assert life.live(0.5, 0.3) == os.SCHED_BATCH, "and that was no failure"

    in_a_thread(loop)


def test_where_programs_compute_it_does_not_wait_for_them() -> None:
    def loop() -> None:
        life = Seconds()
        assert life.live(0.45, 0.4) == os.SCHED_OTHER
        assert life.live(0.5, 0.3) == os.SCHED_BATCH
        assert life.live(0.35, 0.6) == os.SCHED_OTHER
        tried = [life.live(0.5, 0.3) for _ in range(int(scheduling.TRIED_AGAIN_S))]
        assert tried == [os.SCHED_OTHER] * (len(tried) - 1) + [os.SCHED_BATCH]

    in_a_thread(loop)


def test_several_identities_are_more_than_throughput() -> None:
    def loop() -> None:
        life = Seconds()
        assert life.live(0.5, 0.3) == os.SCHED_BATCH
        assert life.thread.crowd(True)
        assert [attributes()[0], life.live(0.9, 0.0)] == [os.SCHED_OTHER] * 2
        assert life.thread.crowd(False)
        assert life.live(0.9, 0.0) == os.SCHED_BATCH

    in_a_thread(loop)


def test_what_it_ran_is_the_kernels_word() -> None:
    before = scheduling.ran_and_waited()[0]
    while scheduling.ran_and_waited()[0] <= before:
        sum(range(1000))


def test_who_computes_gives_way() -> None:
    before = attributes()

    def compute() -> None:
        assert scheduling.patient()
        assert attributes()[:2] == (os.SCHED_BATCH, min(19, before[1] + scheduling.PATIENT_NICE))

    in_a_thread(compute)
