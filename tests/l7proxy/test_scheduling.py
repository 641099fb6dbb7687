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
        assert scheduling.prompt(True)
        assert attributes() == (os.SCHED_OTHER, before[1], scheduling.SLICE_NS if SLICES else before[2])
        in_a_thread(lambda: attributes() == before or 1 / 0)
        assert scheduling.prompt(False)
        assert attributes() == before

    in_a_thread(loop)


def test_who_computes_gives_way() -> None:
    before = attributes()

    def compute() -> None:
        assert scheduling.patient()
        assert attributes()[:2] == (os.SCHED_BATCH, min(19, before[1] + scheduling.PATIENT_NICE))

    in_a_thread(compute)
