"""Running statistics of recent calls: estimated calls per second of every expert."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError

Floats = npt.NDArray[np.float64]


class Statistics:
    """Estimated calls per second, updated at the end of every period.

    Calls and seconds are decayed alike, so that a constant rate is estimated without bias. With
    ``restart`` a move of experts discards both.
    """

    def __init__(self, shape: tuple[int, int, int], half_life_s: float, *, restart: bool) -> None:
        self._calls = np.zeros(shape)
        self._seconds = 0.0
        self._half_life_s = half_life_s
        self._restart = restart

    def add(self, calls: npt.NDArray[np.int64], elapsed_s: float) -> None:
        """Add the calls [N, L, E] of a period of ``elapsed_s`` seconds."""
        if not 0 <= elapsed_s < math.inf:
            raise ValueError(f"a period of {elapsed_s} seconds")
        if calls.shape != self._calls.shape:
            raise ValueError(f"calls of shape {calls.shape}, expected {self._calls.shape}")
        keep = 2.0 ** (-elapsed_s / self._half_life_s)
        self._calls = self._calls * keep + calls
        self._seconds = self._seconds * keep + elapsed_s

    def rates(self) -> Floats:
        """Estimated calls per second, [N, L, E]; zero while no time has passed."""
        if not self._seconds:
            return np.zeros_like(self._calls)
        return self._calls / self._seconds

    def moved(self) -> None:
        """Note that experts were moved, as decided by these statistics."""
        if self._restart:
            self._calls = np.zeros_like(self._calls)
            self._seconds = 0.0


@dataclass(frozen=True)
class Window:
    """An exponentially weighted window: a call's weight halves every ``half_life_s`` seconds.

    Raises
    ------
    InputError
        The half-life is not above 0 and finite.
    """

    half_life_s: float

    def __post_init__(self) -> None:
        if not 0 < self.half_life_s < math.inf:
            raise InputError(
                f"{self.half_life_s}", parameter="half_life_s", expected="seconds above 0"
            )

    def start(self, shape: tuple[int, int, int]) -> Statistics:
        """New statistics without any calls, for calls of shape [N, L, E]."""
        return Statistics(shape, self.half_life_s, restart=False)


@dataclass(frozen=True)
class Cumulative:
    """Average calls over all the time since the last move of experts, as in the paper.

    Old calls keep their full weight until something moves. :meth:`start` makes the statistics,
    which must be told of each move by :meth:`Statistics.moved`.
    """

    def start(self, shape: tuple[int, int, int]) -> Statistics:
        """New statistics without any calls, for calls of shape [N, L, E]."""
        return Statistics(shape, math.inf, restart=True)


#: How calls are averaged; each run starts statistics of its own.
StatisticsOptions = Window | Cumulative
