"""Distribute a server's experts over its GPUs so that those called together are on different ones.

GPUs of a server work on a step at the same time, so that it is as fast as its slowest GPU: experts
of a layer are dealt out evenly, then exchanged while that shortens the steps of the trace.
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


def deal_experts(
    capacity: Sequence[int], held: Bools, size: npt.NDArray[np.int64],
    load: npt.NDArray[np.float64], tokens: npt.NDArray[np.uint16],
) -> Bools:  # fmt: skip
    """What each GPU of a server holds of the experts that it holds, bool [GPUs, L, E].

    ``capacity`` of each GPU is in the unit of ``size`` [L], that of an expert of each layer;
    ``held`` bool [L, E]; ``load`` [L, E] are calls. ``tokens`` uint16 [tokens, L, K] are experts
    that are called together. Experts of a layer go by falling load to the GPU with the fewest of
    that layer, then least filled; ties: lowest GPU. Experts of a layer then change places where a
    token's experts are spread more evenly by that, :data:`MAX_SWEEPS` times at most.

    Raises
    ------
    ValueError
        The experts do not fit.
    """
    layers, experts = held.shape
    owner = np.full((layers, experts), -1, np.int64)
    used = [0] * len(capacity)
    for layer in range(layers):
        of_layer = [0] * len(capacity)
        chosen = np.flatnonzero(held[layer])
        for expert in chosen[np.argsort(-load[layer, chosen], kind="stable")].tolist():
            room = [g for g, most in enumerate(capacity) if used[g] + size[layer] <= most]
            if not room:
                raise ValueError(f"experts do not fit GPUs of {list(capacity)}")
            gpu = min(room, key=lambda g: (of_layer[g], used[g] / capacity[g]))
            owner[layer, expert] = gpu
            used[gpu] += int(size[layer])
            of_layer[gpu] += 1
    if len(capacity) > 1 and len(tokens):
        number, top_k = len(tokens), tokens.shape[2]
        _exchange(
            as_constant(tokens), owner, np.zeros((number, len(capacity)), np.int64),
            np.zeros(experts + 1, np.int64), np.zeros(number * top_k, np.int64),
        )  # fmt: skip
    packed = np.zeros((len(capacity), layers, experts), bool)
    layer, expert = np.nonzero(owner >= 0)
    packed[owner[layer, expert], layer, expert] = True
    return packed


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
    tokens: Array, owner: Array, counts: Array, first: Array, callers: Array
) -> None:
    """Exchange experts of a layer between GPUs while tokens get shorter; changes ``owner`` [L, E].

    ``counts`` [tokens, GPUs], ``first`` [E + 1] and ``callers`` [tokens K] are working memory.
    """
    number, layers, top_k = tokens.shape
    experts = owner.shape[1]
    for layer in range(layers):
        counts[:] = 0
        first[:] = 0
        for t in range(number):
            for k in range(top_k):
                e = int64(tokens[t, layer, k])
                if owner[layer, e] >= 0:
                    first[e] += 1
                    counts[t, owner[layer, e]] += 1
        for e in range(1, experts + 1):
            first[e] += first[e - 1]
        for t in range(number):  # from the ends of experts' calls back to where they begin
            for k in range(top_k):
                e = int64(tokens[t, layer, k])
                if owner[layer, e] >= 0:
                    first[e] -= 1
                    callers[first[e]] = t
        for _ in range(MAX_SWEEPS):
            improved = False
            for a in range(experts):
                for b in range(a + 1, experts):
                    at_a, at_b = owner[layer, a], owner[layer, b]
                    if at_a < 0 or at_b < 0 or at_a == at_b:
                        continue
                    begin_a, end_a = first[a], first[a + 1]
                    begin_b, end_b = first[b], first[b + 1]
                    change = _moved(counts, callers, begin_a, end_a, at_a, at_b)
                    change += _moved(counts, callers, begin_b, end_b, at_b, at_a)
                    if change < 0:
                        owner[layer, a], owner[layer, b] = at_b, at_a
                        improved = True
                    else:
                        _moved(counts, callers, begin_a, end_a, at_b, at_a)
                        _moved(counts, callers, begin_b, end_b, at_a, at_b)
            if not improved:
                break
