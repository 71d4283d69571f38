"""Counts the calls, bytes and times of one server's requests, under the simulator's names."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt


class Counters:
    """Counts of one server, safe for several threads.

    ``calls`` of experts, ``remote_calls`` of them to other servers; ``steps`` (token, layer),
    ``waiting`` of them with a remote expert; ``destinations`` (token, server that it was sent to);
    ``messages`` to other servers, ``out_bytes`` and ``back_bytes`` their payload, ``retries`` of
    calls whose expert had moved. ``hops``, messages between spans and home, and ``hop_bytes``,
    their payload. Microseconds ``compute_us`` of this server's own experts, and ``waiting_us`` for
    the other servers' answers after that.
    """

    NAMES = (
        "calls", "remote_calls", "steps", "waiting", "destinations", "messages", "out_bytes",
        "back_bytes", "retries", "hops", "hop_bytes", "compute_us", "waiting_us",
    )  # fmt: skip

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(self.NAMES, 0)
        self._counted = False
        self._called = np.zeros((num_layers, num_experts), np.int64)

    def count(self, **more: int) -> None:
        """Add to the named counts."""
        with self._lock:
            self._counted = True
            for name, value in more.items():
                self._values[name] += int(value)

    def count_calls(self, layer: int, experts: Any) -> None:
        """Count the experts of a layer position that were called, one entry a call."""
        with self._lock:
            np.add.at(self._called[layer], experts.ravel(), 1)

    def take_called(self) -> Any:
        """Calls of each expert since the last time, int64 [L, E]."""
        with self._lock:
            taken = self._called.copy()
            self._called[:] = 0
            return taken

    def take(self) -> npt.NDArray[np.int64]:
        """All counts in the order of ``NAMES``, which begin again at 0; int64 [names]."""
        with self._lock:
            if not self._counted:
                return np.zeros(len(self.NAMES), np.int64)
            self._counted = False
            values = np.array(list(self._values.values()), np.int64)
            self._values = dict.fromkeys(self.NAMES, 0)
        return values

    def add(self, values: npt.NDArray[np.int64]) -> None:
        """Add what :meth:`take` gave elsewhere."""
        self.count(**dict(zip(self.NAMES, values.tolist(), strict=True)))

    def to_json(self) -> dict[str, int]:
        """All counts by name."""
        with self._lock:
            return dict(self._values)
