"""Signs of life: for how long something that changes while its process lives has not changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: The most that one look adds: a process that was stopped itself has not seen others silent.
MAX_GAP_S = 2.0
#: Beyond the timeout, for a process that beats once a second or is told of another by a third one.
BEAT_GRACE_S = 2.0


class SignsOfLife:
    """Counters of other processes, by any key, and for how long each has stood still.

    Only time between looks counts, at most ``MAX_GAP_S`` each, so neither a clock that is set nor a
    pause of the process that looks makes another process silent.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._seen: dict[object, tuple[Any, float, float]] = {}

    def silent_s(self, key: object, sign: Any) -> float:
        """Seconds for which ``sign`` has been what it is now; 0 at the first look."""
        now = self._now()
        silent_s = 0.0
        if key in self._seen:
            before, since_s, looked_s = self._seen[key]
            if sign == before:
                silent_s = since_s + min(max(now - looked_s, 0.0), MAX_GAP_S)
        self._seen[key] = (sign, silent_s, now)
        return silent_s
