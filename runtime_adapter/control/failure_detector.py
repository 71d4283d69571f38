"""Detects processes that hang: a heartbeat counter that no longer changes.

Workers, drivers and the scheduler count up a heartbeat each, in the store (the keys below) and,
where the store may be lost, in messages and in shared memory. Watchers: the driver of each server
(:mod:`runtime_adapter.watchdog`), the scheduler, and the command `move`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: Keys of the store with the heartbeats of the scheduler, and of a server's worker and driver.
SCHEDULER_HEARTBEAT = "heartbeat/scheduler"
WORKER_HEARTBEAT, DRIVER_HEARTBEAT = "heartbeat/worker/{}", "heartbeat/driver/{}"
#: The most that one observation adds: a watcher that was stopped itself has seen no silence.
MAX_GAP_S = 2.0
#: Added to the timeout for heartbeats once a second, or reported by a third process.
HEARTBEAT_MARGIN_S = 2.0


class FailureDetector:
    """Measures for how long the heartbeats of other processes have not changed.

    Only time between observations counts, at most ``MAX_GAP_S`` each, so neither a clock that is
    set nor a pause of the observing process makes another process silent.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._observed: dict[object, tuple[Any, float, float]] = {}

    def silent_s(self, process: object, heartbeat: Any) -> float:
        """Observe a process's heartbeat; returns the seconds it has been unchanged, 0 at first.

        ``process`` is any key that tells processes apart. A call adds at most ``MAX_GAP_S`` to
        the seconds, so observe more often than that.
        """
        now = self._now()
        silent_s = 0.0
        if process in self._observed:
            previous, previous_silent_s, observed_s = self._observed[process]
            if heartbeat == previous:
                silent_s = previous_silent_s + min(max(now - observed_s, 0.0), MAX_GAP_S)
        self._observed[process] = (heartbeat, silent_s, now)
        return silent_s
