"""Emulated GPUs, which take their time without computing: timed waits, first come first served."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Iterable
from typing import Any

_PR_SET_TIMERSLACK = 29


def set_sharp_timers() -> None:
    """Let this thread's sleeps end within a microsecond of their time (Linux)."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    except (AttributeError, OSError):
        return


def wait_until(at_s: float) -> None:
    """Sleep until a time of ``time.monotonic``."""
    left_s = at_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)


class GpuClock:
    """When each GPU of a server is free next; shared by the server's processes.

    Work begins when it is requested or when the GPU has done all earlier work, as in the simulator.
    """

    def __init__(self, num_gpus: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._lock = context.Lock()
        self._free_s: Any = context.Array(ctypes.c_double, num_gpus, lock=False)
        self._busy_s: Any = context.Array(ctypes.c_double, num_gpus, lock=False)

    def reserve(self, work_s: Iterable[tuple[int, float]]) -> float:
        """Queue work, given as (GPU of the server, seconds), without waiting for it.

        Returns the time of ``time.monotonic`` at which the last of this work will be done.
        """
        now = time.monotonic()
        end_s = now
        with self._lock:
            for gpu, seconds in work_s:
                if not seconds:
                    continue
                done_s = max(now, self._free_s[gpu]) + seconds
                self._free_s[gpu] = done_s
                self._busy_s[gpu] += seconds
                end_s = max(end_s, done_s)
        return end_s

    def busy_s(self) -> list[float]:
        """Seconds of work so far, of each GPU."""
        return list(self._busy_s)
