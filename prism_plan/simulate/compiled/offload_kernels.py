"""The baseline `offload` in the compiled engine: an expert replaces the least recently used one."""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import inline_kernel
from prism_plan.kernel_types import int64
from prism_plan.simulate.compiled.engine_state import EngineState, ScenarioArrays
from prism_plan.simulate.compiled.migration_kernels import start_load

Array = Any


@inline_kernel
def _least_recently_used(  # pragma: no cover - compiled
    gpus: Array, slots: Array, first_gpu: int, end_gpu: int
) -> Any:
    """The slot of a server whose last use ended first; of equal ones the lowest.

    The server's GPUs are those from ``first_gpu`` up to, not with, ``end_gpu``.
    """
    found = np.int32(-1)
    found_s = 0.0
    for g in range(first_gpu, end_gpu):
        slot = gpus[g].lru_first
        if slot >= 0:
            used_s = slots[slot].used_s
            if found < 0 or used_s < found_s or (used_s == found_s and slot < found):
                found = slot
                found_s = used_s
    return found


@inline_kernel
def _append_used(gpus: Array, slots: Array, slot: int) -> None:  # pragma: no cover - compiled
    """Move a slot to the end of its GPU's list: uses of a GPU end in the order they began."""
    own = slots[slot]
    gpu = gpus[own.gpu]
    before, after = own.lru_previous, own.lru_next
    if before < 0:
        gpu.lru_first = after
    else:
        slots[before].lru_next = after
    if after < 0:
        gpu.lru_last = before
    else:
        slots[after].lru_previous = before
    before, after = gpu.lru_last, np.int32(-1)
    # uses that take no time end together: the lowest slot is first
    while before >= 0 and slots[before].used_s == own.used_s and before > slot:
        before, after = slots[before].lru_previous, before
    own.lru_previous = before
    own.lru_next = after
    if before < 0:
        gpu.lru_first = slot
    else:
        slots[before].lru_next = slot
    if after < 0:
        gpu.lru_last = slot
    else:
        slots[after].lru_previous = slot


@inline_kernel
def compute_with_offload(  # pragma: no cover - compiled
    scenario: ScenarioArrays, state: EngineState, at: int, layer: int
) -> float:
    """Compute resident experts, then load and compute the others; see the reference engine."""
    now = state.run[0].now_s
    first = layer * scenario.num_experts
    size_class = scenario.layers[layer].size_class
    end_s = 0.0
    for loads in range(2):
        for i in range(state.distinct_experts[at]):
            e = state.expert_order[at, i]
            tokens = state.token_count[at, e]
            if tokens == 0:  # it is resident, and computed
                continue
            index = state.slot_of[at, first + e]
            if loads == 0:
                if index < 0:
                    continue
                state.token_count[at, e] = 0
            else:
                server = scenario.servers[at]
                index = _least_recently_used(
                    state.gpus, state.slots, server.first_gpu, server.end_gpu
                )
            slot = state.slots[index]
            g = slot.gpu
            gpu = state.gpus[g]
            work_s = scenario.expert_s[scenario.gpus[g].kind, size_class, tokens]
            if loads == 0:
                done_s = max(now, gpu.free_s) + work_s
            else:
                earliest_s = max(now, slot.used_s)
                loaded_s = start_load(scenario, state, int64(g), int64(layer), earliest_s)
                done_s = max(loaded_s, gpu.free_s) + work_s
                if slot.pair >= 0:
                    state.slot_of[at, slot.pair] = -1
                slot.pair = first + e
                state.slot_of[at, first + e] = index
            gpu.free_s = done_s
            gpu.gpu_busy_s += work_s
            gpu.served += tokens
            slot.used_s = done_s
            _append_used(state.gpus, state.slots, index)
            end_s = max(end_s, done_s)
    return end_s
