"""Turn recorded forward passes into rows of a trace.

A pass without cached tokens begins new requests, one for each sequence of the batch; later passes
continue them. Rows are made of many passes at a time, for passes are many and small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prism_plan.io.location import Location
from prism_plan.model_spec import ModelSpec
from prism_plan.trace import DECODE_PHASE, PREFILL_PHASE, TokenBatch

if TYPE_CHECKING:
    import torch


@dataclass
class ForwardPass:
    """One forward pass of B sequences of S new tokens, as the hooks saw it, still on its device.

    ``mask`` bool [B, S] or ``None``; ``fed`` int64 [B], the token fed in a decode step;
    ``experts`` and ``weights``: for each MoE layer [B·S, K]. ``tasks`` is set where the sequences
    are new.
    """

    shape: tuple[int, int]
    tasks: tuple[str, ...] | None
    mask: torch.Tensor | None
    fed: torch.Tensor | None
    experts: list[torch.Tensor]
    weights: list[torch.Tensor] | None

    @property
    def decode(self) -> bool:
        """One token for each sequence of the cache."""
        return self.tasks is None and self.shape[1] == 1

    @property
    def kind(self) -> tuple[str, tuple[int, int], bool, bool]:
        """Consecutive passes that agree in this are turned into rows together."""
        name = "new" if self.tasks is not None else "decode" if self.decode else "prefill"
        return name, self.shape, self.mask is None, self.fed is None


class RowBuilder:
    """Turns passes, in their order, into token rows: requests, positions, ends of sequences.

    ``end_tokens`` are those after which a sequence has ended; ``num_requests`` counts the requests
    begun so far, and ``tasks`` are the tasks in order of appearance.
    """

    def __init__(self, spec: ModelSpec, end_tokens: Sequence[int]) -> None:
        self.tasks: list[str] = []
        self.num_requests = 0
        self._spec = spec
        self._end_tokens = list(end_tokens)
        # of the sequences in the cache
        self._requests = np.zeros(0, np.int64)
        self._task_codes = np.zeros(0, np.int32)
        self._lengths = np.zeros(0, np.int64)
        self._alive = np.zeros(0, bool)

    def rows(self, passes: Sequence[ForwardPass]) -> Iterator[TokenBatch]:
        """The tokens of these passes; batches without tokens are left out.

        Raises
        ------
        InputError
            A pass continues more or fewer sequences than the cache has.
        """
        for kind, alike in itertools.groupby(passes, key=lambda step: step.kind):
            group = list(alike)
            if kind[0] == "new":
                parts = [[_merged(group)]]
            else:
                parts = [group] if kind[0] == "decode" else [[step] for step in group]
            for part in parts:
                batch = self._batch(part)
                if len(batch):
                    yield batch
            if kind[0] == "new":  # only the last pass has its sequences in the cache
                last = -group[-1].shape[0]
                self._requests, self._task_codes = self._requests[last:], self._task_codes[last:]
                self._lengths, self._alive = self._lengths[last:], self._alive[last:]

    def _batch(self, steps: list[ForwardPass]) -> TokenBatch:
        """The tokens of one pass, or of decode steps in a row; rows step by step."""
        first = steps[0]
        sequences, length = first.shape
        if first.tasks is not None:
            self._begin(first.tasks)
        elif not first.decode:
            self._alive[:] = True  # another turn of a conversation
        if first.tasks is None and len(self._requests) != sequences:
            raise Location("forward pass").error(
                f"{sequences} sequences continue with a cache of {len(self._requests)}",
                "the same sequences in the same order",
            )
        # real [steps, B, S]: neither padding nor fed after the sequence's end
        real = np.ones((len(steps), sequences, length), bool)
        for row, step in zip(real, steps, strict=True):
            if step.mask is not None:
                row[:] = step.mask.cpu().numpy()
        if first.decode and first.fed is not None and self._end_tokens:
            fed = _stack([step.fed for step in steps if step.fed is not None])
            ended = np.logical_or.accumulate(np.isin(fed, self._end_tokens), axis=0)
            real &= (self._alive & ~ended)[:, :, None]
            self._alive &= ~ended[-1]
        else:
            real &= self._alive[None, :, None]
        in_order = real.swapaxes(0, 1).reshape(sequences, -1)  # [B, steps · S]
        position = self._lengths[:, None] + np.cumsum(in_order, axis=1) - 1
        position = position.reshape(sequences, len(steps), length).swapaxes(0, 1)
        self._lengths += in_order.sum(axis=1)
        keep = real.ravel()
        num_tokens = int(keep.sum())
        shape = (len(steps) * sequences * length, self._spec.num_layers, self._spec.top_k)
        weights = None
        if first.weights is not None:
            found = [_stack(step.weights or [], as_float=True) for step in steps]
            weights = self._by_token(found, shape)[keep].astype(np.float16)
        experts = self._by_token([_stack(step.experts) for step in steps], shape)[keep]
        return TokenBatch(
            request=np.tile(np.repeat(self._requests, length), len(steps))[keep].astype(np.int32),
            position=position.ravel()[keep].astype(np.int32),
            phase=np.full(num_tokens, DECODE_PHASE if first.decode else PREFILL_PHASE, np.int8),
            task=np.tile(np.repeat(self._task_codes, length), len(steps))[keep],
            experts=experts.astype(np.uint16),
            weights=weights,
        )

    def _by_token(
        self, by_step: list[npt.NDArray[Any]], shape: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        """[steps][L, B·S, K] as [steps · B · S, L, K]."""
        layers = self._spec.num_layers
        stacked = np.stack([step.reshape(layers, -1, self._spec.top_k) for step in by_step])
        return stacked.swapaxes(1, 2).reshape(shape)

    def _begin(self, tasks: tuple[str, ...]) -> None:
        for task in tasks:
            if task not in self.tasks:
                self.tasks.append(task)
        self._task_codes = np.array([self.tasks.index(task) for task in tasks], np.int32)
        self._requests = self.num_requests + np.arange(len(tasks))
        self.num_requests += len(tasks)
        self._lengths = np.zeros(len(tasks), np.int64)
        self._alive = np.ones(len(tasks), bool)


def _merged(steps: list[ForwardPass]) -> ForwardPass:
    """Passes over new sequences of one length as one pass over all of them."""
    import torch

    first = steps[0]
    if len(steps) == 1:
        return first
    layers = range(len(first.experts))
    masks = [step.mask for step in steps if step.mask is not None]
    weights = None
    if first.weights is not None:
        weights = [torch.cat([(step.weights or [])[at] for step in steps]) for at in layers]
    return ForwardPass(
        shape=(sum(step.shape[0] for step in steps), first.shape[1]),
        tasks=tuple(task for step in steps for task in step.tasks or ()),
        mask=torch.cat(masks) if masks else None,
        fed=None,
        experts=[torch.cat([step.experts[at] for step in steps]) for at in layers],
        weights=weights,
    )


def _stack(tensors: list[torch.Tensor], *, as_float: bool = False) -> npt.NDArray[Any]:
    """Tensors of one shape, on whatever devices, as one array; gate weights become float32."""
    import torch

    device = tensors[0].device
    stacked = torch.stack([tensor.to(device) for tensor in tensors])
    if as_float:
        stacked = stacked.float()
    elif device.type != "cpu":
        stacked = stacked.to(torch.int32)  # half the bytes over the bus
    array: npt.NDArray[Any] = stacked.detach().cpu().numpy()
    return array
