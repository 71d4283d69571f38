"""What a server does with the calls it computes: timed waits, or the experts themselves."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from prism_plan.simulate.timing import Timing
from runtime_adapter.moe.emulated_gpu import GpuClock, gpu_work, wait_until
from runtime_adapter.moe.expert_map import ExpertMap
from runtime_adapter.moe.placed_experts import weighted_sum
from runtime_adapter.weights.expert_store import Change, ExpertStore

Ints = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Calls of one layer that one server computes.

    ``hidden`` [T, H] (or bytes [T, B] where nothing is computed), ``token`` [C] the row of each
    call, ascending, ``experts`` [C], ``weights`` float32 [C].
    """

    layer: int
    hidden: torch.Tensor
    token: Ints
    experts: Ints
    weights: npt.NDArray[np.float32]


class Compute(Protocol):
    """Computes partial sums of the calls of a batch, and the dense part where it is timed."""

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        """Σ over the batch's calls of weight x expert(hidden), [T, H], in :func:`sum_dtype`.

        Bytes that stand for hidden states stay what they are. The caller may write to the result.
        """

    def dense(self, tokens: int) -> None:
        """One layer's dense part for a step of so many tokens."""

    def apply(self, change: Change) -> None:
        """An expert has come to this server, or goes; its GPUs are counted from 0.

        Nothing that was begun computes with an expert that goes.
        """


class TimedCompute:
    """Work takes the time that the simulator's tables say, in the order in which it is asked for.

    ``table`` is that of the process that computes; it is set there, for each has its own.
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
        self._table: ExpertMap | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For the worker process, which has a table of its own."""
        return {**vars(self), "_table": None}

    @property
    def table(self) -> ExpertMap | None:
        """Where the experts were at the start."""
        return self._table

    @table.setter
    def table(self, table: ExpertMap) -> None:
        self._table = table
        self._held = table.held_by(self.rank)
        self._gpu_of = table.gpu_of[self.rank].copy()
        self._work_s(0, np.zeros(0, np.int64))  # the first request is not to wait for a compiler

    def apply(self, change: Change) -> None:
        self._held[change.gpu, change.pair] = change.kind == "load"
        gpus = np.flatnonzero(self._held[:, change.pair])
        self._gpu_of[change.pair] = self.first_gpu + gpus[0] if len(gpus) else -1

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        wait_until(self.clock.reserve(enumerate(self._work_s(batch.layer, batch.experts))))
        return batch.hidden

    def _work_s(self, layer: int, experts: Ints) -> list[float]:
        timing = self.timing
        # of this call alone, for threads of several lanes compute at once
        tokens, work_s = np.zeros(self.num_experts, np.int64), np.empty(len(self._held))
        gpu_work(
            experts, self._gpu_of, layer * self.num_experts, self.first_gpu, timing.kind,
            timing.expert_s[:, timing.size[layer]], tokens, work_s,
        )  # fmt: skip
        seconds: list[float] = work_s.tolist()
        return seconds

    def dense(self, tokens: int) -> None:
        kind = self.timing.kind[self.dense_gpu]
        seconds = float(self.timing.dense_s[kind, tokens])
        wait_until(self.clock.reserve([(self.dense_gpu - self.first_gpu, seconds)]))


class ExpertCompute:
    """The experts of a server's store, on the devices where they are; dense work is the model's."""

    def __init__(self, store: ExpertStore) -> None:
        self.store = store

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        hidden = batch.hidden
        if not hidden.is_cuda:  # what came over the network goes to the card once
            pair = batch.layer * self.store.shape.spec.num_experts + int(batch.experts[0])
            gpu = max(self.store.gpu_of(pair), 0)
            hidden = hidden.to(self.store.pools[gpu].device)
        token, experts, weights = (
            torch.from_numpy(part).to(hidden.device)
            for part in (batch.token, batch.experts, batch.weights)
        )
        sums = weighted_sum(self.store, batch.layer, hidden, token, experts, weights)
        return sums.to(batch.hidden.device)

    def dense(self, tokens: int) -> None:
        """The model does it."""

    def apply(self, change: Change) -> None:
        if change.kind == "drop" and self.store.pools[change.gpu].is_cuda:
            torch.cuda.synchronize(self.store.pools[change.gpu].device)
        self.store.apply(change)
