"""Frees the slots of experts that a migration drops, once no call depends on them any more.

A server announces its drops in the log; every driver acknowledges them once none of its calls
depends on the expert (:mod:`~runtime_adapter.control.log_follower`). Then the slot is free for the
next load.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from runtime_adapter.control.log_entries import DropsAcknowledged, ExpertChange
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.loader_interface import Loader

#: After drops that silent drivers have not acknowledged: their calls are answered as missing.
DRAIN_S = 0.05


@dataclass(eq=False)
class _PendingDrop:
    """An announced drop, and the drivers that have not acknowledged it."""

    gpu: int
    pair: int
    announced_s: float
    unacknowledged: set[int]


class SlotReleaser:
    """The pending drops of one server, and the slots that they free.

    A driver that does not acknowledge a drop within ``timeout_s`` is lost or hangs, and is no
    longer waited for; this server's own driver (``rank``) always is, for it computes with the slot.
    ``first_gpu`` is the first of the server's GPUs in the order of all servers.
    """

    def __init__(
        self, rank: int, num_servers: int, first_gpu: int, loader: Loader, expert_map: ExpertMap,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.num_servers = num_servers
        self.first_gpu = first_gpu
        self.loader = loader
        self.expert_map = expert_map
        self.timeout_s = timeout_s
        self._pending: dict[tuple[int, int], _PendingDrop] = {}  # by plan and step
        self._silent: set[int] = set()  # drivers that are no longer waited for

    def __bool__(self) -> bool:
        """Whether drops are pending."""
        return bool(self._pending)

    def add(self, plan: int, drops: Iterable[ExpertChange]) -> None:
        """Wait for all drivers' acknowledgement of these drops, from now on."""
        for step, gpu, pair, _ in drops:
            drivers = set(range(self.num_servers))
            self._pending[plan, step] = _PendingDrop(gpu, pair, time.monotonic(), drivers)

    def acknowledge(self, entry: DropsAcknowledged) -> None:
        """Note that a driver has acknowledged drops."""
        self._silent.discard(entry.server)
        for step in entry.steps:
            drop = self._pending.get((entry.plan, step))
            if drop is not None:
                drop.unacknowledged.discard(entry.server)

    def release(self) -> dict[int, list[int]]:
        """Drop all experts that nobody depends on and free their slots; returns steps by plan."""
        now = time.monotonic()
        freed: dict[int, list[int]] = {}
        for key, drop in list(self._pending.items()):
            waiting_for = drop.unacknowledged - self._silent
            if waiting_for and now - drop.announced_s > self.timeout_s:
                self._silent |= waiting_for - {self.rank}
                waiting_for &= {self.rank}
            if waiting_for:
                continue
            if self._silent:
                time.sleep(DRAIN_S)
            del self._pending[key]
            self.expert_map.change(drop.gpu, drop.pair, False)
            self.loader.drop(drop.pair, drop.gpu - self.first_gpu)
            plan, step = key
            freed.setdefault(plan, []).append(step)
        return freed
