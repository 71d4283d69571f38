"""The baseline `offload` in the compiled engine: an expert replaces the least recently used one."""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import jit
from prism_plan.simulate.compiled.engine_state import EngineState, ScenarioArrays
from prism_plan.simulate.compiled.migration_kernels import start_load

Array = Any


@jit
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
                slot = np.int32(state.slot_start[at])
                for other in range(state.slot_start[at] + 1, state.slot_start[at + 1]):
                    if state.slot_used_s[other] < state.slot_used_s[slot]:
                        slot = np.int32(other)
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
            end_s = max(end_s, done_s)
    return end_s
