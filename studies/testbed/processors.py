"""How busy the machine's processors are while an experiment runs."""

from __future__ import annotations

import math
import threading
import time

#: A sample of the processors is saturated from this share of busy time on.
SATURATED = 0.97


class ProcessorMonitor:
    """Samples the load of the machine's processors in a thread; a context manager."""

    def __init__(self, interval_s: float = 0.5) -> None:
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._samples: list[tuple[float, float]] = []
        self._window = (0.0, math.inf)

    def __enter__(self) -> ProcessorMonitor:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        before = _ticks()
        while not self._stopped.wait(self._interval_s):
            now = _ticks()
            busy, total = now[0] - before[0], now[1] - before[1]
            if total:
                self._samples.append((time.time(), busy / total))
            before = now

    def restrict(self, begin_s: float, end_s: float) -> None:
        """Consider only samples between these times of ``time.time``, when requests were served."""
        self._window = (begin_s, end_s)

    @property
    def samples(self) -> list[float]:
        """Share of busy time in each sampled interval."""
        begin_s, end_s = self._window
        return [share for at, share in self._samples if begin_s + self._interval_s <= at <= end_s]

    @property
    def busy(self) -> float:
        """Mean share of busy time."""
        return sum(self.samples) / max(len(self.samples), 1)

    @property
    def saturated(self) -> float:
        """Share of samples in which all processors were busy throughout."""
        return sum(s >= SATURATED for s in self.samples) / max(len(self.samples), 1)


def _ticks() -> tuple[int, int]:
    """Busy ticks and all ticks of the processors since the machine was started."""
    with open("/proc/stat", encoding="ascii") as stream:
        values = [int(word) for word in stream.readline().split()[1:9]]
    return sum(values) - values[3] - values[4], sum(values)
