"""Compiled loops over the tokens of a trace, and the smallest set of servers for a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.jit import inline_kernel, kernel
from prism_plan.kernel_types import int64

#: Steps are numbered anew beyond this, so that their numbers fit into int32.
MAX_STEP = 2**31 - 1
#: So many servers are the bits of a number of 64 bits and a sign.
MAX_MASK_SERVERS = 63


def as_constant(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same numbers, contiguous and read-only: kernels are compiled for each layout they get."""
    view = np.ascontiguousarray(array).view()
    view.setflags(write=False)
    return view


@kernel
def count_selections(
    experts: npt.NDArray[np.uint16],
    task: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
    last_step: npt.NDArray[np.int32],
) -> tuple[int, int]:  # pragma: no cover - compiled
    """``counts[task[t], l, experts[t, l, k]] += 1`` for all t, l, k, up to an invalid selection.

    Returns the token and layer of the first id out of range or named twice, (-1, -1) if all are
    valid. ``last_step`` [E] is scratch space: the last step (t, l), counted from 1, that named an
    expert, so that one look finds an expert that is named twice.
    """
    tokens, layers, top_k = experts.shape
    num_experts = counts.shape[2]
    last_step[:] = 0
    step = 0
    for t in range(tokens):
        of_task = counts[task[t]]
        if step > MAX_STEP - layers:
            last_step[:] = 0
            step = 0
        for layer in range(layers):
            step += 1
            row = of_task[layer]
            for k in range(top_k):
                e = experts[t, layer, k]
                if e >= num_experts or last_step[e] == step:
                    return t, layer
                last_step[e] = step
                row[e] += 1
    return -1, -1


@kernel
def find_invalid_selection(
    experts: npt.NDArray[np.uint16], last_step: npt.NDArray[np.int32]
) -> tuple[int, int]:  # pragma: no cover - compiled
    """As :func:`count_selections` of len(``last_step``) experts, without counting."""
    tokens, layers, top_k = experts.shape
    num_experts = len(last_step)
    last_step[:] = 0
    step = 0
    for t in range(tokens):
        if step > MAX_STEP - layers:
            last_step[:] = 0
            step = 0
        for layer in range(layers):
            step += 1
            for k in range(top_k):
                e = experts[t, layer, k]
                if e >= num_experts or last_step[e] == step:
                    return t, layer
                last_step[e] = step
    return -1, -1


@inline_kernel
def _sort(numbers: npt.NDArray[np.int64], count: int) -> None:  # pragma: no cover - compiled
    """Sort the first ``count`` numbers by insertion: there are few, and nothing is allocated."""
    for i in range(1, count):
        number = numbers[i]
        at = i
        while at > 0 and numbers[at - 1] > number:
            numbers[at] = numbers[at - 1]
            at -= 1
        numbers[at] = number


@inline_kernel
def _count_bits(number: int) -> int:  # pragma: no cover - compiled
    """How many bits of a number of at least 0 are 1."""
    count = 0
    while number != 0:
        number &= number - 1
        count += 1
    return count


@kernel
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
        taken = int64(0)
        while covered != full:
            best = -1
            best_gain = 0
            for i in range(count):
                gain = _count_bits(masks[i] & ~covered)
                if gain > best_gain:
                    best = i
                    best_gain = gain
            covered |= masks[best]
            chosen[taken] = best
            taken += 1
        _sort(chosen, taken)
        return int(taken)
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


@kernel
def score_steps(
    experts: npt.NDArray[np.uint16],
    task: npt.NDArray[np.int32],
    local: npt.NDArray[np.bool_],
    holder: npt.NDArray[np.int32],
    start: npt.NDArray[np.int64],
    holders: npt.NDArray[np.int64],
    serves: npt.NDArray[np.bool_],
    exact_up_to: int,
    scratch: npt.NDArray[np.int64],
    sums: npt.NDArray[np.int64],
) -> None:  # pragma: no cover - compiled
    """Add the waiting steps, destinations and greedy steps of T tokens to ``sums`` [3, N, tasks].

    ``serves`` [N, tasks] says which servers serve which tasks; ``holder[start[j] : start[j + 1]]``
    are the servers that hold pair j = l·E + e, ascending. Up to :data:`MAX_MASK_SERVERS` servers
    they are also the bits of ``holders`` [L, E], by which most steps are scored at once. An expert
    that is held nowhere makes its step wait and adds no destination. ``scratch`` [4, max(N, K) + 1]
    is overwritten; its first row must be 0, and is again afterwards.
    """
    tokens, layers, top_k = experts.shape
    num_servers, _, num_experts = local.shape
    mask_of = scratch[0]
    candidate_servers = scratch[1]
    masks = scratch[2]
    missing_experts = chosen = scratch[3]  # one is not needed any more when the other is
    for t in range(tokens):
        for n in range(num_servers):
            if not serves[n, task[t]]:
                continue
            for layer in range(layers):
                num_missing = int64(0)
                held_by_all = int64(-1)
                held_by_any = int64(0)
                for k in range(top_k):
                    e = experts[t, layer, k]
                    if not local[n, layer, e]:
                        missing_experts[num_missing] = e
                        num_missing += 1
                        held_by = holders[layer, e]
                        held_by_any |= held_by
                        if held_by != 0:
                            held_by_all &= held_by
                if num_missing == 0:
                    continue
                sums[0, n, task[t]] += 1
                if num_servers <= MAX_MASK_SERVERS:
                    if held_by_any == 0:
                        continue
                    but_one = held_by_any & (held_by_any - 1)
                    if held_by_all != 0 or but_one & (but_one - 1) == 0:
                        # one server has all, or two have them together
                        sums[1, n, task[t]] += 1 if held_by_all != 0 else 2
                        if num_servers > exact_up_to:
                            sums[2, n, task[t]] += _count_bits(held_by_any) > exact_up_to
                        continue
                num_candidates = int64(0)
                full = int64(0)
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
                if num_candidates * num_candidates < 4 * num_servers:
                    _sort(candidate_servers, num_candidates)
                else:
                    num_candidates = int64(0)
                    for m in range(num_servers):
                        if mask_of[m] != 0:
                            candidate_servers[num_candidates] = m
                            num_candidates += 1
                for i in range(num_candidates):
                    masks[i] = mask_of[candidate_servers[i]]
                    mask_of[candidate_servers[i]] = 0
                size = smallest_cover(masks, num_candidates, full, exact_up_to, chosen)
                sums[1, n, task[t]] += size
                if num_candidates > exact_up_to:
                    sums[2, n, task[t]] += 1
