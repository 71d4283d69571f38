"""The baseline `offload` in the compiled engine: an expert replaces the least recently used one."""

from __future__ import annotations

from typing import Any

from prism_plan.jit import inline_kernel
from prism_plan.simulate.compiled.engine_state import EngineState, ScenarioArrays
from prism_plan.simulate.compiled.migration_kernels import start_load

Array = Any


@inline_kernel
def _least_recently_used(  # pragma: no cover - compiled
    heap: Array, known_s: Array, used_s: Array
) -> Any:
    """The slot of a server whose last use ended first; of equal ones the lowest.

    ``heap`` is a binary heap of its slots by ``known_s``, ends of uses that may have become later
    since: ``used_s``. Times only grow, so the first slot whose time is still right is the one.
    """
    while True:
        slot = heap[0]
        time_s = used_s[slot]
        if known_s[slot] == time_s:
            return slot
        known_s[slot] = time_s
        i = 0
        while True:
            child = 2 * i + 1
            if child >= len(heap):
                break
            least = heap[child]
            if child + 1 < len(heap):
                other = heap[child + 1]
                if known_s[other] < known_s[least] or (
                    known_s[other] == known_s[least] and other < least
                ):
                    child, least = child + 1, other
            if time_s < known_s[least] or (time_s == known_s[least] and slot < least):
                break
            heap[i] = least
            i = child
        heap[i] = slot


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
                    state.slot_heap[state.slot_start[at] : state.slot_start[at + 1]],
                    state.slot_heap_s, state.slot_used_s,
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
            end_s = max(end_s, done_s)
    return end_s
