"""Frees the slots of experts that a migration drops, once no call depends on them any more.

A server announces its drops in the log; every driver that is up acknowledges them once none of its
calls depends on the expert (:mod:`~runtime_adapter.control.log_follower`). Then the slot is free
for the next load. Until then the expert is there, and the drop can be cancelled.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from runtime_adapter.control.log_entries import DriverSynced, DropsAcknowledged, ExpertChange
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.loader_interface import Loader

#: After drops that silent drivers have not acknowledged: their calls are answered as missing.
DRAIN_S = 0.05


@dataclass(eq=False)
class _PendingDrop:
    """An announced drop, the number of the entry, and the drivers that have not acknowledged it."""

    gpu: int
    pair: int
    announced_s: float
    unacknowledged: set[int]
    number: int | None = None


class SlotReleaser:
    """The pending drops of one server, and the slots that they free.

    A driver that does not acknowledge a drop within ``timeout_s`` hangs or is cut off, and is no
    longer waited for; nor is one whose server is down. This server's own driver (``rank``) always
    is, for it computes with the slot. ``first_gpu`` is the first of the server's GPUs in the order
    of all servers.
    """

    def __init__(
        self, rank: int, first_gpu: int, loader: Loader, expert_map: ExpertMap, timeout_s: float
    ) -> None:
        self.rank = rank
        self.first_gpu = first_gpu
        self.loader = loader
        self.expert_map = expert_map
        self.timeout_s = timeout_s
        self._pending: dict[tuple[int, int], _PendingDrop] = {}  # by plan and step
        self._silent: set[int] = set()  # drivers that are no longer waited for

    def __bool__(self) -> bool:
        """Whether drops are pending."""
        return bool(self._pending)

    def add(self, plan: int, drops: Iterable[ExpertChange], drivers: Iterable[int]) -> None:
        """Wait for the acknowledgement of these drops by these drivers and the own one."""
        for step, gpu, pair, _ in drops:
            waiting_for = {*drivers, self.rank}
            self._pending[plan, step] = _PendingDrop(gpu, pair, time.monotonic(), waiting_for)

    def announced(self, plan: int, drops: Iterable[ExpertChange], number: int) -> None:
        """The drops are announced in the entry of this number."""
        for step, *_ in drops:
            drop = self._pending.get((plan, step))
            if drop is not None:
                drop.number = number

    def acknowledge(self, entry: DropsAcknowledged) -> None:
        """Note that a driver has acknowledged drops."""
        self._silent.discard(entry.server)
        for step in entry.steps:
            drop = self._pending.get((entry.plan, step))
            if drop is not None:
                drop.unacknowledged.discard(entry.server)

    def synchronise(self, entry: DriverSynced) -> None:
        """Note that a driver depends on nothing that was dropped before an entry."""
        self._silent.discard(entry.server)
        for drop in self._pending.values():
            if drop.number is not None and drop.number < entry.read:
                drop.unacknowledged.discard(entry.server)

    def driver_joined(self, server: int, number: int) -> None:
        """A server came up before drops were announced, of which this one did not know then."""
        self._silent.discard(server)
        for drop in self._pending.values():
            if drop.number is not None and drop.number > number:
                drop.unacknowledged.add(server)

    def driver_lost(self, server: int) -> None:
        """A server is down: its driver is not waited for, except the own one."""
        if server == self.rank:
            return
        for drop in self._pending.values():
            drop.unacknowledged.discard(server)

    def cancel(self) -> list[tuple[int, int, int, int]]:
        """Keep the experts of all pending drops; returns (plan, step, GPU, pair) of each."""
        pending, self._pending = self._pending, {}
        return [(plan, step, drop.gpu, drop.pair) for (plan, step), drop in pending.items()]

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
            if self._silent or drop.unacknowledged:
                time.sleep(DRAIN_S)
            del self._pending[key]
            self.expert_map.change(drop.gpu, drop.pair, False)
            self.loader.drop(drop.pair, drop.gpu - self.first_gpu)
            plan, step = key
            freed.setdefault(plan, []).append(step)
        return freed
