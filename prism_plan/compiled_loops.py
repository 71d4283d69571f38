"""Compiled loops over the tokens of a trace, and the smallest set of servers for a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.jit import jit


@jit
def count_selections(
    experts: npt.NDArray[np.uint16], task: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]
) -> None:  # pragma: no cover - compiled
    """``counts[task[t], l, experts[t, l, k]] += 1`` for all t, l, k."""
    tokens, layers, top_k = experts.shape
    for t in range(tokens):
        of_task = counts[task[t]]
        for layer in range(layers):
            row = of_task[layer]
            for k in range(top_k):
                row[experts[t, layer, k]] += 1


@jit
def find_invalid_selection(
    experts: npt.NDArray[np.uint16], num_experts: int
) -> tuple[int, int]:  # pragma: no cover - compiled
    """Row and layer of the first id out of range or named twice; (-1, -1) if all are valid."""
    tokens, layers, top_k = experts.shape
    for t in range(tokens):
        for layer in range(layers):
            for k in range(top_k):
                e = experts[t, layer, k]
                if e >= num_experts:
                    return t, layer
                for other in range(k):
                    if experts[t, layer, other] == e:
                        return t, layer
    return -1, -1


@jit
def smallest_cover(
    masks: npt.NDArray[np.int64], count: int, full: int, exact_up_to: int, chosen: npt.NDArray[Any]
) -> int:  # pragma: no cover - compiled
    """Find the smallest set of the first ``count`` bit masks whose union is ``full``.

    Returns its size; ``chosen`` receives the positions, ascending; of the smallest sets the
    lexicographically first. Up to ``exact_up_to`` masks by enumeration in order of size; beyond,
    greedily (largest gain, lowest position first). The union of all masks must be ``full``.
    """
    if count > exact_up_to:
        covered = 0
        size = 0
        while covered != full:
            best = -1
            best_gain = 0
            for i in range(count):
                gain = 0
                rest = masks[i] & ~covered
                while rest:
                    rest &= rest - 1
                    gain += 1
                if gain > best_gain:
                    best = i
                    best_gain = gain
            covered |= masks[best]
            chosen[size] = best
            size += 1
        chosen[:size].sort()
        return size
    for size in range(1, count + 1):
        for i in range(size):
            chosen[i] = i
        while True:
            covered = 0
            for i in range(size):
                covered |= masks[chosen[i]]
            if covered == full:
                return size
            i = size - 1  # next combination in lexicographic order
            while i >= 0 and chosen[i] == count - size + i:
                i -= 1
            if i < 0:
                break
            chosen[i] += 1
            for j in range(i + 1, size):
                chosen[j] = chosen[j - 1] + 1
    return 0


@jit
def score_steps(
    experts: npt.NDArray[np.uint16],
    task: npt.NDArray[np.int32],
    local: npt.NDArray[np.bool_],
    holder: npt.NDArray[np.int32],
    start: npt.NDArray[np.int64],
    serves: npt.NDArray[np.bool_],
    exact_up_to: int,
    sums: npt.NDArray[np.int64],
) -> None:  # pragma: no cover - compiled
    """Add the waiting steps, destinations and greedy steps of T tokens to ``sums`` [3, N, tasks].

    ``serves`` [N, tasks] says which servers serve which tasks; ``holder[start[j] : start[j + 1]]``
    are the servers that hold pair j = l·E + e, ascending. An expert that is held nowhere makes its
    step wait and adds no destination.
    """
    tokens, layers, top_k = experts.shape
    num_servers, _, num_experts = local.shape
    missing_experts = np.empty(top_k, np.int64)
    mask_of = np.zeros(num_servers, np.int64)
    candidate_servers = np.empty(num_servers, np.int64)
    masks = np.empty(num_servers, np.int64)
    chosen = np.empty(num_servers + 1, np.int64)
    for t in range(tokens):
        for n in range(num_servers):
            if not serves[n, task[t]]:
                continue
            for layer in range(layers):
                num_missing = 0
                for k in range(top_k):
                    e = experts[t, layer, k]
                    if not local[n, layer, e]:
                        missing_experts[num_missing] = e
                        num_missing += 1
                if num_missing == 0:
                    continue
                sums[0, n, task[t]] += 1
                num_candidates = 0
                full = 0
                for i in range(num_missing):
                    pair = layer * num_experts + missing_experts[i]
                    if start[pair] < start[pair + 1]:
                        full |= 1 << i
                    for at in range(start[pair], start[pair + 1]):
                        m = holder[at]
                        if mask_of[m] == 0:
                            candidate_servers[num_candidates] = m
                            num_candidates += 1
                        mask_of[m] |= 1 << i
                ordered = np.sort(candidate_servers[:num_candidates])
                for i in range(num_candidates):
                    masks[i] = mask_of[ordered[i]]
                    mask_of[ordered[i]] = 0
                size = smallest_cover(masks, num_candidates, full, exact_up_to, chosen)
                sums[1, n, task[t]] += size
                if num_candidates > exact_up_to:
                    sums[2, n, task[t]] += 1
