"""What a server does with the calls it computes: timed waits, or the experts themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from prism_plan.simulate.timing import Timing
from runtime_adapter.clock import GpuClock, gpu_work, wait_until
from runtime_adapter.table import HolderTable

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """Calls of one layer that one server computes.

    ``hidden`` [T, H] (or bytes [T, B] where nothing is computed), ``token`` [C] the row of each
    call, ascending, ``experts`` [C], ``weights`` float32 [C].
    """

    layer: int
    hidden: torch.Tensor
    token: Ints
    experts: Ints
    weights: npt.NDArray[np.float32]

    def by_expert(self) -> tuple[Ints, Ints]:
        """Experts in the order of their first call, and their tokens' number."""
        found, first, number = np.unique(self.experts, return_index=True, return_counts=True)
        order = np.argsort(first, kind="stable")
        return found[order], number[order]


class Compute(Protocol):
    """Computes partial sums of the calls of a batch, and the dense part where it is timed."""

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        """Σ over the batch's calls of weight x expert(hidden), [T, H]."""

    def dense(self, tokens: int) -> None:
        """One layer's dense part for a step of so many tokens."""


class TimedCompute:
    """Work takes the time that the simulator's tables say, in the order in which it is asked for.

    ``table`` is that of the process that computes; it is set there, for each has its own.
    """

    def __init__(
        self, timing: Timing, clock: GpuClock, num_experts: int, first_gpu: int, dense_gpu: int,
        me: int,
    ) -> None:  # fmt: skip
        self.timing = timing
        self.clock = clock
        self.num_experts = num_experts
        self.first_gpu = first_gpu
        self.dense_gpu = dense_gpu
        self.me = me
        self.table: HolderTable | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For the worker process, which has a table of its own."""
        return {**vars(self), "table": None}

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        assert self.table is not None
        experts, tokens = batch.by_expert()
        work_s = gpu_work(
            self.table.gpu_of[self.me], batch.layer, self.first_gpu, experts, tokens, self.timing,
            batch.layer * self.num_experts,
        )  # fmt: skip
        wait_until(self.clock.reserve(work_s))
        return torch.zeros_like(batch.hidden)

    def dense(self, tokens: int) -> None:
        kind = self.timing.kind[self.dense_gpu]
        seconds = float(self.timing.dense_s[kind, tokens])
        wait_until(self.clock.reserve({self.dense_gpu - self.first_gpu: seconds}))


class ExpertCompute:
    """The experts of a server's store, on the devices where they are; dense work is the model's."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        sums = torch.zeros_like(batch.hidden)
        for e in np.unique(batch.experts).tolist():
            calls = np.flatnonzero(batch.experts == e)
            rows = torch.from_numpy(batch.token[calls])
            weights = torch.from_numpy(batch.weights[calls]).to(sums.device)
            found = self.store.compute(batch.layer, e, batch.hidden[rows])
            sums.index_add_(0, rows, (found * weights[:, None]).to(sums.dtype))
        return sums

    def dense(self, tokens: int) -> None:
        """The model does it."""
