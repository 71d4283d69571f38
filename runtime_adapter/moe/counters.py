"""What a server has counted of its own traffic, in the simulator's words."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np


class Counters:
    """Calls, steps and bytes of the requests of one server.

    ``calls``, ``remote_calls`` expert calls; ``steps`` (token, layer) and ``waiting`` of them with
    a remote expert; ``destinations`` servers that tokens were sent to; ``messages`` calls to other
    servers; ``out_bytes``, ``back_bytes`` their payload; ``called`` int64 [L, E]. Microseconds
    ``compute_us`` of experts at home, and ``waiting_us`` for the others' answers after that.
    """

    NAMES = (
        "calls", "remote_calls", "steps", "waiting", "destinations", "messages", "out_bytes",
        "back_bytes", "retries", "compute_us", "waiting_us",
    )  # fmt: skip

    def __init__(self, layers: int, experts: int) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(self.NAMES, 0)
        self._called = np.zeros((layers, experts), np.int64)

    def count(self, **more: int) -> None:
        """Add to the named figures."""
        with self._lock:
            for name, value in more.items():
                self._values[name] += int(value)

    def count_calls(self, layer: int, experts: Any) -> None:
        """Count which experts of a layer position were called."""
        with self._lock:
            np.add.at(self._called[layer], experts.ravel(), 1)

    def take_called(self) -> Any:
        """Calls since this was last asked, int64 [L, E]."""
        with self._lock:
            taken = self._called.copy()
            self._called[:] = 0
            return taken

    def to_json(self) -> dict[str, int]:
        """All figures by name."""
        with self._lock:
            return dict(self._values)
