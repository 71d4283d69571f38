"""Loads of a replay: they take the time that the cluster file gives, without loading anything."""

from __future__ import annotations

import time

from runtime_adapter.moe.emulated_gpu import wait_until
from runtime_adapter.moe.expert_map import ExpertMap
from runtime_adapter.moe.timed_compute import TimedCompute
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.expert_store import Change


class TimedLoader:
    """A :class:`~runtime_adapter.weights.loader.Loader` that waits instead of loading.

    ``load_s`` are the seconds of an expert by GPU and layer position; ``blocks_compute`` by GPU,
    whether a load occupies the GPU as well.
    """

    def __init__(
        self, compute: TimedCompute, load_s: list[list[float]], blocks_compute: list[bool]
    ) -> None:
        self.compute = compute
        self.load_s = load_s
        self.blocks_compute = blocks_compute
        self._free_s = [0.0] * len(load_s)  # when each GPU's load channel is free

    def connect(self, rendezvous: Rendezvous, expert_map: ExpertMap) -> None:
        """It needs no other server."""

    def load(self, pair: int, gpu: int) -> Change:
        seconds = self.load_s[gpu][pair // self.compute.num_experts]
        # a load that waited for the one before begins at its scheduled end, for sleeps end late
        now = time.monotonic()
        begin_s = self._free_s[gpu] if now - self._free_s[gpu] < 1e-3 else now
        self._free_s[gpu] = begin_s + seconds
        if self.blocks_compute[gpu]:
            self._free_s[gpu] = self.compute.clock.reserve([(gpu, seconds)])
        wait_until(self._free_s[gpu])
        change = Change("load", pair, gpu, 0)
        self.compute.apply(change)
        return change

    def drop(self, pair: int, gpu: int) -> None:
        self.compute.apply(Change("drop", pair, gpu, 0))
