"""Synthetic prompts of a counts-only trace: tokens whose experts are drawn by their counts.

A counts-only trace has how often each expert was called, not which were called together. Each
token draws its experts of a layer by systematic sampling (Madow, 1949): lay the experts, in random
order, end to end on a line, each as long as its inclusion probability, and take those that a comb
of K teeth, one apart, falls on. As no expert is longer than the gap between teeth, all K differ,
and each is taken with exactly its probability. Lengths are whole numbers of :data:`UNIT`, so that
rounding cannot break this. Which experts a token calls *together* is chance, not the model's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.seeds import RandomSource, random_stream
from prism_plan.simulate.requests import Prompts
from prism_plan.trace import Trace

#: Parts of the gap between teeth: the error of a probability is below 1e-9.
UNIT = 2**30
#: Prompts of each task that requests are sampled from.
POOL = 64
#: Experts of so many (token, layer, expert) are drawn at a time, to bound memory.
BLOCK = 2**21


def inclusion_units(
    counts: npt.NDArray[np.int64], top_k: int, unit: int = UNIT
) -> npt.NDArray[np.int64]:
    """The probability that a token calls each expert of a layer, in whole parts of ``unit``, [E].

    It is K · counts / sum; what is beyond one (``unit``) is spread over the other experts in
    proportion to their counts. The probabilities sum to K · ``unit`` exactly.

    Raises
    ------
    ValueError
        Fewer than K experts have calls.
    """
    calls = [int(count) for count in counts]
    if sum(count > 0 for count in calls) < top_k:
        raise ValueError(f"fewer than {top_k} experts are called")
    units = [0] * len(calls)
    free = [e for e, count in enumerate(calls) if count > 0]
    teeth = top_k
    while True:  # capping some raises the rest: repeat until none is beyond one
        total = sum(calls[e] for e in free)
        capped = [e for e in free if calls[e] * teeth >= total]
        for e in capped:
            units[e] = unit
        free = [e for e in free if units[e] == 0]
        teeth -= len(capped)
        if not capped or not free:
            break
    if teeth:
        for e in free:
            units[e] = calls[e] * teeth * unit // total
        # whole numbers fall short of the sum: the largest remainders get one more
        by_remainder = sorted(free, key=lambda e: (-(calls[e] * teeth * unit % total), e))
        for e in by_remainder[: top_k * unit - sum(units)]:
            units[e] += 1
    return np.array(units, np.int64)


def systematic_sample(
    units: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    start: npt.NDArray[np.int64],
    top_k: int,
    unit: int = UNIT,
) -> npt.NDArray[np.int64]:
    """Draw K experts a row by systematic sampling with a comb that begins at ``start``, [R, K].

    Shapes: ``units`` [R, E], each row summing to K · ``unit``; ``order`` [R, E], a permutation of
    the experts a row; ``start`` [R], 0 to ``unit`` - 1.
    """
    rows, num_experts = order.shape
    ends = np.cumsum(np.take_along_axis(units, order, axis=1), axis=1)
    teeth = start[:, None] + unit * np.arange(top_k)
    shift = (np.arange(rows) * (top_k * unit))[:, None]  # one sorted line for all rows
    at = np.searchsorted((ends + shift).ravel(), (teeth + shift).ravel(), side="right")
    at = at.reshape(rows, top_k) - num_experts * np.arange(rows)[:, None]
    return np.take_along_axis(order, at, axis=1)


def draw_tokens(
    rng: np.random.Generator,
    units: npt.NDArray[np.int64],
    top_k: int,
    tokens: int,
) -> npt.NDArray[np.uint16]:
    """Draw the experts of T tokens, [T, L, K], by the inclusion ``units`` [L, E] of each layer.

    Every token and layer has a random order and a random start of its own.
    """
    layers, num_experts = units.shape
    drawn = np.empty((tokens, layers, top_k), np.uint16)
    step = max(BLOCK // units.size, 1)
    for first in range(0, tokens, step):
        block = drawn[first : first + step]
        rows = len(block) * layers
        order = rng.permuted(np.tile(np.arange(num_experts), (rows, 1)), axis=1)
        start = rng.integers(0, UNIT, rows)
        lengths = np.tile(units, (len(block), 1))
        block[:] = systematic_sample(lengths, order, start, top_k).reshape(block.shape)
    return drawn


def draw_prompts(
    trace: Trace,
    task: npt.NDArray[np.int32],
    number: npt.NDArray[np.int32],
    *,
    prefill_tokens: int,
    decode_tokens: int,
    seed: int,
) -> Prompts:
    """Draw P prompts, each with its ``task`` [P] and its ``number`` [P] among those of the task.

    A prompt depends on the seed, its task and its number alone.

    Raises
    ------
    InputError
        In some layer fewer than K experts of a task have calls.
    """
    model = trace.model
    length = prefill_tokens + decode_tokens
    experts = np.empty((len(task) * length, model.num_layers, model.top_k), np.uint16)
    units = {code: task_units(trace, code) for code in np.unique(task).tolist()}
    for index, (code, at) in enumerate(zip(task.tolist(), number.tolist(), strict=True)):
        rng = random_stream(seed, RandomSource.DRAWING, code, at)
        rows = slice(index * length, (index + 1) * length)
        experts[rows] = draw_tokens(rng, units[code], model.top_k, length)
    return Prompts(
        tasks=trace.tasks,
        task=task,
        trace_request=number,
        first_row=np.arange(len(task), dtype=np.int64) * length,
        prefill_tokens=np.full(len(task), prefill_tokens, np.int32),
        decode_tokens=np.full(len(task), decode_tokens, np.int32),
        experts=experts,
        co_activation=False,
    )


def task_units(trace: Trace, task: int) -> npt.NDArray[np.int64]:
    """The :func:`inclusion_units` of every layer of a task, [L, E].

    Raises
    ------
    InputError
        In some layer fewer than K experts have calls.
    """
    model, units = trace.model, []
    for layer, counts in enumerate(trace.counts[task]):
        called = int((counts > 0).sum())
        if called < model.top_k:
            raise InputError(
                f"calls of {called} experts",
                source=trace.name or "trace",
                place=f"task {trace.tasks[task]!r} layer {model.moe_layers[layer]}",
                expected=f"at least {model.top_k}, "
                f"for a token calls {model.top_k} different experts",
                remedy="profile more tokens of the task",
            )
        units.append(inclusion_units(counts, model.top_k))
    return np.array(units)
