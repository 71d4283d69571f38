"""Computes the calls that a server answers, its own and those of others, with its experts."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from runtime_adapter.moe.placed_experts import weighted_sum
from runtime_adapter.weights.expert_map import ExpertMap
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

    def use(self, expert_map: ExpertMap) -> None:
        """Called once in each process, with the map by which it routes or answers calls."""

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        """Σ over the batch's calls of weight x expert(hidden), [T, H], in :func:`sum_dtype`.

        Bytes that stand for hidden states are returned as they are. The caller may write to the
        result.
        """

    def dense(self, layer: int, tokens: int, context: int | None = None) -> None:
        """One layer's dense part: of a prompt of so many tokens, or a step after ``context``."""

    def apply(self, change: Change) -> None:
        """An expert has been loaded to this server, or is dropped; its GPUs are counted from 0.

        No computation that has begun uses an expert that is dropped.
        """

    def held(self) -> list[tuple[int, int, int]]:
        """(GPU, pair, slot) of every expert that this process would compute with now."""


class ExpertCompute:
    """Computes with a server's expert store, on the devices where its experts are.

    The dense part is left to the model.
    """

    def __init__(self, store: ExpertStore) -> None:
        self.store = store

    def use(self, expert_map: ExpertMap) -> None:
        """The store has a table of its own."""

    def partial_sums(self, batch: Batch) -> torch.Tensor:
        hidden = batch.hidden
        if not hidden.is_cuda:  # copy states that came over the network to the card only once
            pair = batch.layer * self.store.shape.spec.num_experts + int(batch.experts[0])
            gpu = max(self.store.gpu_of(pair), 0)
            hidden = hidden.to(self.store.pools[gpu].device)
        token, experts, weights = (
            torch.from_numpy(part).to(hidden.device)
            for part in (batch.token, batch.experts, batch.weights)
        )
        sums = weighted_sum(self.store, batch.layer, hidden, token, experts, weights)
        return sums.to(batch.hidden.device)

    def dense(self, layer: int, tokens: int, context: int | None = None) -> None:
        """The model computes it."""

    def apply(self, change: Change) -> None:
        if change.kind == "drop" and self.store.pools[change.gpu].is_cuda:
            torch.cuda.synchronize(self.store.pools[change.gpu].device)
        self.store.apply(change)

    def held(self) -> list[tuple[int, int, int]]:
        return self.store.held()
