"""Distribute a server's experts over its GPUs so that those called together are on different ones.

GPUs of a server work on a step at the same time, so that it is as fast as its slowest GPU: experts
of a layer are distributed evenly, then exchanged while that shortens the steps of the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.compiled_loops import as_constant
from prism_plan.jit import kernel
from prism_plan.kernel_types import int64

Array = Any
Bools = npt.NDArray[np.bool_]

#: Exchanges are tried until none helps, at most so often for each pair.
MAX_SWEEPS = 20


class GpuPacking:
    """Distributes experts by the tokens of one trace; what it found for a layer it finds again.

    ``tokens`` uint16 [tokens, L, K] are experts that are called together; none: experts are
    distributed by their load alone. ``size`` int64 [L] is that of an expert of each layer.
    """

    def __init__(self, tokens: npt.NDArray[np.uint16], size: npt.NDArray[np.int64]) -> None:
        self._tokens, self._size = as_constant(tokens), size
        self._known: dict[tuple[int, bytes, tuple[int, ...]], npt.NDArray[np.int64]] = {}

    def pack(self, capacity: Sequence[int], held: Bools, load: npt.NDArray[np.float64]) -> Bools:
        """What each GPU of a server holds of the experts that it holds, bool [GPUs, L, E].

        ``capacity`` of each GPU is in the unit of the sizes; ``held`` bool [L, E]; ``load`` [L, E]
        are calls. Experts of a layer go by falling load to the GPU with the fewest of that layer,
        then least filled; ties: lowest GPU. A GPU that is too small for an even share of all layers
        gets as much less of each. Experts of a layer then change places while that spreads the
        experts of tokens more evenly.

        Raises
        ------
        ValueError
            The experts do not fit.
        """
        layers, experts = held.shape
        packed = np.zeros((len(capacity), layers, experts), bool)
        if len(capacity) == 1:
            if int((held.sum(axis=1) * self._size).sum()) > capacity[0]:
                raise ValueError(f"experts do not fit a GPU of {capacity[0]}")
            packed[0] = held
            return packed
        used = [0] * len(capacity)
        left = int((held.sum(axis=1) * self._size).sum())
        for layer in np.flatnonzero(held.any(axis=1)).tolist():
            owner = np.full(experts, -1, np.int64)
            of_layer = [0] * len(capacity)
            chosen = np.flatnonzero(held[layer])
            size = int(self._size[layer])
            # what a GPU still has room for, evenly over the layers that are left
            share = [-(-(most - used[g]) * len(chosen) // left) for g, most in enumerate(capacity)]
            left -= size * len(chosen)
            for expert in chosen[np.argsort(-load[layer, chosen], kind="stable")].tolist():
                room = [g for g, most in enumerate(capacity) if used[g] + size <= most]
                if not room:
                    raise ValueError(f"experts do not fit GPUs of {list(capacity)}")
                fair = [g for g in room if of_layer[g] < share[g]] or room
                gpu = min(fair, key=lambda g: (of_layer[g], used[g] / capacity[g]))
                owner[expert] = gpu
                used[gpu] += size
                of_layer[gpu] += 1
            key = layer, held[layer].tobytes(), tuple(of_layer)
            if len(self._tokens) and key not in self._known:
                self._known[key] = self._exchanged(layer, owner, len(capacity))
            owner = self._known.get(key, owner)
            packed[owner[chosen], layer, chosen] = True
        return packed

    def _exchanged(
        self, layer: int, owner: npt.NDArray[np.int64], gpus: int
    ) -> npt.NDArray[np.int64]:
        number, _, top_k = self._tokens.shape
        _exchange(
            self._tokens, layer, owner, np.zeros((number, gpus), np.int64),
            np.zeros(len(owner) + 1, np.int64), np.zeros(number * top_k, np.int64),
        )  # fmt: skip
        return owner


@kernel
def _most(counts: Array) -> Any:  # pragma: no cover - compiled
    """The largest of some counts."""
    found = counts[0]
    for i in range(1, len(counts)):
        found = max(found, counts[i])
    return found


@kernel
def _moved(  # pragma: no cover - compiled
    counts: Array, callers: Array, begin: int, end: int, from_gpu: int, to_gpu: int
) -> Any:
    """Move an expert's calls from a GPU to another; how much longer its tokens take, in experts."""
    change = int64(0)
    for i in range(begin, end):
        of_token = counts[callers[i]]
        change -= _most(of_token)
        of_token[from_gpu] -= 1
        of_token[to_gpu] += 1
        change += _most(of_token)
    return change


@kernel
def _exchange(  # pragma: no cover - compiled
    tokens: Array, layer: int, owner: Array, counts: Array, first: Array, callers: Array
) -> None:
    """Exchange experts of a layer between GPUs while tokens get shorter; changes ``owner`` [E].

    ``counts`` [tokens, GPUs], ``first`` [E + 1] and ``callers`` [tokens K] are working memory.
    """
    number, _, top_k = tokens.shape
    experts = len(owner)
    counts[:] = 0
    first[:] = 0
    for t in range(number):
        for k in range(top_k):
            e = int64(tokens[t, layer, k])
            if owner[e] >= 0:
                first[e] += 1
                counts[t, owner[e]] += 1
    for e in range(1, experts + 1):
        first[e] += first[e - 1]
    for t in range(number):  # from the ends of experts' calls back to where they begin
        for k in range(top_k):
            e = int64(tokens[t, layer, k])
            if owner[e] >= 0:
                first[e] -= 1
                callers[first[e]] = t
    for _ in range(MAX_SWEEPS):
        improved = False
        for a in range(experts):
            for b in range(a + 1, experts):
                at_a, at_b = owner[a], owner[b]
                if at_a < 0 or at_b < 0 or at_a == at_b:
                    continue
                begin_a, end_a = first[a], first[a + 1]
                begin_b, end_b = first[b], first[b + 1]
                change = _moved(counts, callers, begin_a, end_a, at_a, at_b)
                change += _moved(counts, callers, begin_b, end_b, at_b, at_a)
                if change < 0:
                    owner[a], owner[b] = at_b, at_a
                    improved = True
                else:
                    _moved(counts, callers, begin_a, end_a, at_b, at_a)
                    _moved(counts, callers, begin_b, end_b, at_a, at_b)
        if not improved:
            break
