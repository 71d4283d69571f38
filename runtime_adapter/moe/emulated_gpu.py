"""GPUs that take their time without computing: work as timed waits, first come first served."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Iterable
from typing import Any

from prism_plan.jit import jit

_PR_SET_TIMERSLACK = 29


def sharp_timers() -> None:
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

    A piece of work begins when it is asked for or when the GPU has done what was asked before,
    as in the simulator.
    """

    def __init__(self, gpus: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._lock = context.Lock()
        self._free_s: Any = context.Array(ctypes.c_double, gpus, lock=False)
        self._busy_s: Any = context.Array(ctypes.c_double, gpus, lock=False)

    def reserve(self, work_s: Iterable[tuple[int, float]]) -> float:
        """Queue seconds of work on GPUs of the server; returns when the last of it is done."""
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


@jit
def gpu_work(  # pragma: no cover - compiled
    experts: Any, gpu_of: Any, first_pair: int, first_gpu: int, kind: Any, expert_s: Any,
    tokens: Any, work_s: Any,
) -> None:  # fmt: skip
    """Fill ``work_s`` [G] with a batch's seconds on each GPU of a server, from simulator's tables.

    ``experts`` [C] are those of the batch's calls; ``gpu_of`` int [J] the server's GPU of each
    pair and ``kind`` [all G], in the order of all servers; ``expert_s`` [kinds, T + 1] is of the
    layer; ``tokens`` [E], all 0, is used and left as it was.
    """
    work_s[:] = 0.0
    for expert in experts:
        tokens[expert] += 1
    for expert in experts:
        if tokens[expert]:
            gpu = gpu_of[first_pair + expert]
            work_s[gpu - first_gpu] += expert_s[kind[gpu], tokens[expert]]
            tokens[expert] = 0
