"""The baseline `offload` in the compiled engine: an expert replaces the least recently used one."""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import inline_kernel
from prism_plan.simulate.compiled.engine_state import EngineState, ScenarioArrays
from prism_plan.simulate.compiled.migration_kernels import start_load

Array = Any


@inline_kernel
def _least_recently_used(  # pragma: no cover - compiled
    first_gpu: int, last_gpu: int, lru_first: Array, used_s: Array
) -> Any:
    """The slot of a server whose last use ended first; of equal ones the lowest.

    ``lru_first`` [G] begins the list of each GPU's slots in this order; those of the server are
    ``first_gpu`` to ``last_gpu``.
    """
    found = np.int32(-1)
    for g in range(first_gpu, last_gpu + 1):
        slot = lru_first[g]
        if slot >= 0 and (
            found < 0
            or used_s[slot] < used_s[found]
            or (used_s[slot] == used_s[found] and slot < found)
        ):
            found = slot
    return found


@inline_kernel
def _append_used(  # pragma: no cover - compiled
    slot: int, g: int, lru_first: Array, lru_last: Array, lru_next: Array, lru_previous: Array,
    used_s: Array,
) -> None:  # fmt: skip
    """Move a slot to the end of its GPU's list: uses of a GPU end in the order they began."""
    before, after = lru_previous[slot], lru_next[slot]
    if before < 0:
        lru_first[g] = after
    else:
        lru_next[before] = after
    if after < 0:
        lru_last[g] = before
    else:
        lru_previous[after] = before
    before, after = lru_last[g], np.int32(-1)
    # uses that take no time end together: the lowest slot is first
    while before >= 0 and used_s[before] == used_s[slot] and before > slot:
        before, after = lru_previous[before], before
    lru_previous[slot], lru_next[slot] = before, after
    if before < 0:
        lru_first[g] = slot
    else:
        lru_next[before] = slot
    if after < 0:
        lru_last[g] = slot
    else:
        lru_previous[after] = slot


@inline_kernel
def compute_with_offload(  # pragma: no cover - compiled
    scenario: ScenarioArrays, state: EngineState, at: int, layer: int
) -> float:
    """Compute resident experts, then load and compute the others; see the reference engine."""
    now = state.clock_s[0]
    first = layer * scenario.num_experts
    end_s = 0.0
    for loads in range(2):
        for i in range(state.distinct_experts[at]):
            e = state.expert_order[at, i]
            tokens = state.token_count[at, e]
            if tokens == 0:  # it is resident, and computed
                continue
            slot = state.slot_of[at, first + e]
            if loads == 0:
                if slot < 0:
                    continue
                state.token_count[at, e] = 0
                g = state.slot_gpu[slot]
                work_s = scenario.expert_s[scenario.gpu_kind[g], scenario.size_class[layer], tokens]
                done_s = max(now, state.gpu_free_s[g]) + work_s
            else:
                slot = _least_recently_used(
                    scenario.gpu_start[at], scenario.gpu_start[at + 1] - 1, state.lru_first,
                    state.slot_used_s,
                )  # fmt: skip
                g = state.slot_gpu[slot]
                earliest_s = max(now, state.slot_used_s[slot])
                loaded_s = start_load(scenario, state, g, layer, earliest_s)
                work_s = scenario.expert_s[scenario.gpu_kind[g], scenario.size_class[layer], tokens]
                done_s = max(loaded_s, state.gpu_free_s[g]) + work_s
                if state.slot_pair[slot] >= 0:
                    state.slot_of[at, state.slot_pair[slot]] = -1
                state.slot_pair[slot] = first + e
                state.slot_of[at, first + e] = slot
            state.gpu_free_s[g] = done_s
            state.gpu_busy_s[g] += work_s
            state.served[g] += tokens
            state.slot_used_s[slot] = done_s
            _append_used(
                slot, g, state.lru_first, state.lru_last, state.lru_next, state.lru_previous,
                state.slot_used_s,
            )  # fmt: skip
            end_s = max(end_s, done_s)
    return end_s
