"""Work and loads of a replay: timed waits by the simulator's tables, without computing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prism_plan.jit import kernel
from prism_plan.simulate.timing import Timing
from runtime_adapter.moe.compute import Batch
from runtime_adapter.moe.emulated_gpu import GpuClock, wait_until
from runtime_adapter.transport.peer import Peer
from runtime_adapter.transport.rendezvous import Rendezvous
from runtime_adapter.weights.expert_map import ExpertMap
from runtime_adapter.weights.expert_store import Change


class TimedCompute:
    """A :class:`~runtime_adapter.moe.compute.Compute` whose work is timed waits, in FIFO order.

    ``first_gpu`` of this server and ``dense_gpu`` are counted over all servers.
    """

    def __init__(
        self, timing: Timing, clock: GpuClock, num_experts: int, first_gpu: int, dense_gpu: int,
        rank: int,
    ) -> None:  # fmt: skip
        self.timing = timing
        self.clock = clock
        self.num_experts = num_experts
        self.first_gpu = first_gpu
        self.dense_gpu = dense_gpu
        self.rank = rank

    def use(self, expert_map: ExpertMap) -> None:
        self._held = expert_map.held_by(self.rank)
        self._gpu_of = expert_map.gpu_of[self.rank].copy()
        self._work_s(0, np.zeros(0, np.int64))  # compile: the first request must not wait for it

    def apply(self, change: Change) -> None:
        self._held[change.gpu, change.pair] = change.kind == "load"
        gpus = np.flatnonzero(self._held[:, change.pair])
        self._gpu_of[change.pair] = self.first_gpu + gpus[0] if len(gpus) else -1

    def held(self) -> list[tuple[int, int, int]]:
        found = np.argwhere(self._held).tolist()
        return [(gpu, pair, 0) for gpu, pair in found]  # nothing is in a slot

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        wait_until(self.clock.reserve(enumerate(self._work_s(batch.layer, batch.experts))))
        return batch.hidden

    def _work_s(self, layer: int, experts: npt.NDArray[np.int64]) -> list[float]:
        """Seconds of work on each GPU of this server."""
        timing = self.timing
        # scratch of this call alone, for several lanes compute at once
        tokens, work_s = np.zeros(self.num_experts, np.int64), np.empty(len(self._held))
        _gpu_work(
            experts, self._gpu_of, layer * self.num_experts, self.first_gpu, timing.kind,
            timing.expert_s[:, timing.size[layer]], tokens, work_s,
        )  # fmt: skip
        seconds: list[float] = work_s.tolist()
        return seconds

    def dense(self, layer: int, tokens: int, context: int | None = None) -> None:
        seconds = self.timing.dense_s(self.dense_gpu, layer, tokens, context)
        wait_until(self.clock.reserve([(self.dense_gpu - self.first_gpu, seconds)]))


class TimedLoader:
    """A :class:`~runtime_adapter.weights.loader_interface.Loader` that waits instead of loading.

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

    def connect(
        self, rendezvous: Rendezvous, expert_map: ExpertMap, peers: Mapping[int, Peer]
    ) -> None:
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

    def held(self) -> list[tuple[int, int, int]]:
        return self.compute.held()


@kernel
def _gpu_work(  # pragma: no cover - compiled
    experts: Any, gpu_of: Any, first_pair: int, first_gpu: int, kind: Any, expert_s: Any,
    tokens: Any, work_s: Any,
) -> None:  # fmt: skip
    """Fill ``work_s`` [G] with a batch's seconds on each GPU of a server, from simulator's tables.

    ``experts`` [C] are those of the batch's calls; ``gpu_of`` int [J] the server's GPU of each
    pair and ``kind`` [all G], in the order of all servers; ``expert_s`` [kinds, T + 1] is of the
    layer; ``tokens`` [E], all 0, is used and left as it was.
    """
    work_s[:] = 0.0
    for expert in experts:
        tokens[expert] += 1
    for expert in experts:
        if tokens[expert]:
            gpu = gpu_of[first_pair + expert]
            work_s[gpu - first_gpu] += expert_s[kind[gpu], tokens[expert]]
            tokens[expert] = 0
