"""Measures silence: a heartbeat counter that no longer changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: The most that one observation adds: a watcher that was stopped itself has seen no silence.
MAX_GAP_S = 2.0
#: Added to the timeout for heartbeats once a second, or reported by a third process.
HEARTBEAT_MARGIN_S = 2.0


class FailureDetector:
    """Measures for how long the heartbeats of other processes have not changed.

    Only time between observations counts, at most ``max_gap_s`` each, so neither a clock that is
    set nor a pause of the observing process makes another process silent.
    """

    def __init__(
        self, now: Callable[[], float] = time.monotonic, max_gap_s: float = MAX_GAP_S
    ) -> None:
        self._now = now
        self._max_gap_s = max_gap_s
        self._observed: dict[object, tuple[Any, float, float]] = {}

    def silent_s(self, process: object, heartbeat: Any) -> float:
        """Observe a process's heartbeat; returns the seconds it has been unchanged, 0 at first.

        ``process`` is any key that tells processes apart. A call adds at most ``max_gap_s`` to
        the seconds, so observe more often than that.
        """
        now = self._now()
        silent_s = 0.0
        if process in self._observed:
            previous, previous_silent_s, observed_s = self._observed[process]
            if heartbeat == previous:
                silent_s = previous_silent_s + min(max(now - observed_s, 0.0), self._max_gap_s)
        self._observed[process] = (heartbeat, silent_s, now)
        return silent_s

    def forget(self, process: object) -> None:
        """Begin anew with a process: the next observation of it is its first."""
        self._observed.pop(process, None)
