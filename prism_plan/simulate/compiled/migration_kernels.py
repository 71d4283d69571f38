"""Experts that move in the compiled engine: holders, and the steps of a migration."""

from __future__ import annotations

from typing import Any

from prism_plan.jit import jit
from prism_plan.simulate.compiled.engine_state import (
    ERROR,
    LOADED_BYTES,
    LOADS,
    OPEN_STEPS,
    Fixed,
    State,
)
from prism_plan.simulate.compiled.heap import push
from prism_plan.simulate.events import LOADED

Array = Any


@jit
def hold(  # pragma: no cover - compiled
    g: int, pair: int, held: Array, gpu_of: Array, holder: Array, copies: Array, gpu_start: Array,
    n: int,
) -> None:  # fmt: skip
    """GPU g of server n has a pair from now on."""
    held[g, pair] = True
    if gpu_of[n, pair] < 0:
        i = copies[pair]
        while i > 0 and holder[pair, i - 1] > n:
            holder[pair, i] = holder[pair, i - 1]
            i -= 1
        holder[pair, i] = n
        copies[pair] += 1
        gpu_of[n, pair] = g
    elif g < gpu_of[n, pair]:
        gpu_of[n, pair] = g


@jit
def let_go(  # pragma: no cover - compiled
    g: int, pair: int, held: Array, gpu_of: Array, holder: Array, copies: Array, gpu_start: Array,
    n: int,
) -> None:  # fmt: skip
    """GPU g of server n has a pair no longer."""
    if not held[g, pair]:
        return
    held[g, pair] = False
    gpu_of[n, pair] = -1
    for other in range(gpu_start[n], gpu_start[n + 1]):
        if held[other, pair]:
            gpu_of[n, pair] = other
            return
    i = 0
    while holder[pair, i] != n:
        i += 1
    copies[pair] -= 1
    while i < copies[pair]:
        holder[pair, i] = holder[pair, i + 1]
        i += 1


@jit
def begin_steps(f: Fixed, s: State, waiting: int) -> bool:  # pragma: no cover - compiled
    """Begin the ``waiting`` steps in ``step_queue`` and what follows; False: a pair was lost."""
    experts = f.sizes[0]
    now = s.now[0]
    i = 0
    while i < waiting:
        index = s.step_queue[i]
        i += 1
        g = s.step_gpu[index]
        pair = s.step_pair[index]
        if s.step_load[index]:
            load_s = f.load_s[g, pair // experts]
            begin_s = max(now, s.load_free[g])
            if f.blocks[g]:
                begin_s = max(begin_s, s.gpu_free[g])
                s.gpu_free[g] = begin_s + load_s
                s.gpu_busy_s[g] += load_s
            s.load_free[g] = begin_s + load_s
            s.number[LOADS] += 1
            s.number[LOADED_BYTES] += f.expert_bytes[pair // experts]
            push(s.heap_s, s.heap_key, s.heap_what, s.number, begin_s + load_s, f.rank[LOADED],
                 LOADED, index)  # fmt: skip
            continue
        let_go(g, pair, s.held, s.gpu_of, s.holder, s.copies, f.gpu_start, f.server[g])
        if s.copies[pair] == 0:
            s.number[ERROR] = index
            return False
        waiting = step_over(s, index, waiting)
    return True


@jit
def step_over(s: State, index: int, waiting: int) -> int:  # pragma: no cover - compiled
    """Queue the steps that lacked only this one behind the ``waiting``; returns their number."""
    s.number[OPEN_STEPS] -= 1
    if s.number[OPEN_STEPS] == 0:
        s.now[1] = s.now[0]
    for i in range(s.step_start[index], s.step_start[index + 1]):
        other = s.step_next[i]
        s.step_lacking[other] -= 1
        if s.step_lacking[other] == 0:
            s.step_queue[waiting] = other
            waiting += 1
    return waiting
