"""Poisson arrivals, one by one or in bursts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError

#: More requests of one server than this are a mistyped number: they would not fit in memory.
MAX_REQUESTS = 10_000_000

#: Mean seconds between requests, [n], for requests of the numbers [n].
Intervals = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]


def arrivals_by_number(
    rng: np.random.Generator, interval_s: Intervals, number: int, burst: int = 1
) -> npt.NDArray[np.float64]:
    """Draw the arrival times of the first ``number`` requests, float64 [number], not falling.

    ``burst`` requests arrive at once and bursts are ``burst`` times as far apart, so the mean rate
    is the same. A gap has the interval of the first request after it.
    """
    bursts = -(-number // burst)
    return np.repeat(_times(rng, interval_s, bursts, burst), burst)[:number]


def arrivals_before(
    rng: np.random.Generator, interval_s: Intervals, duration_s: float, burst: int = 1
) -> npt.NDArray[np.float64]:
    """Draw the arrival times before ``duration_s``, which begin like :func:`arrivals_by_number`.

    Raises
    ------
    InputError
        More than :data:`MAX_REQUESTS` would arrive.
    """
    start = rng.bit_generator.state
    bursts = 64
    while True:
        rng.bit_generator.state = start  # anew, so that the times are those of any longer run
        times = _times(rng, interval_s, bursts, burst)
        before = int(np.searchsorted(times, duration_s))
        if before * burst > MAX_REQUESTS:
            raise InputError(
                f"more than {MAX_REQUESTS:,} requests of one server in {duration_s:g} s",
                parameter="duration_s",
                remedy="simulate a shorter time, or give a larger arrival_interval_s",
            )
        if before < bursts:
            return np.repeat(times[:before], burst)
        bursts *= 4


def _times(
    rng: np.random.Generator, interval_s: Intervals, bursts: int, burst: int
) -> npt.NDArray[np.float64]:
    """When bursts arrive, [bursts]; a longer run begins with the times of a shorter one."""
    first = np.arange(bursts, dtype=np.int64) * burst
    gaps = rng.standard_exponential(bursts) * interval_s(first) * burst
    return np.cumsum(gaps)
