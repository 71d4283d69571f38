"""Migration in the compiled engine: replicas that come and go, and the steps that move them."""

from __future__ import annotations

from typing import Any

from prism_plan.jit import inline_kernel
from prism_plan.simulate.compiled.engine_state import (
    FAILED_STEP,
    LOADED_BYTES,
    LOADS,
    OPEN_STEPS,
    EngineState,
    ScenarioArrays,
)
from prism_plan.simulate.compiled.heap import push_event
from prism_plan.simulate.events import LOADED

Array = Any


@inline_kernel
def add_replica(  # pragma: no cover - compiled
    g: int, pair: int, gpu_holds: Array, first_gpu: Array, holders: Array, num_replicas: Array,
    n: int,
) -> None:  # fmt: skip
    """Record that GPU g of server n holds a pair from now on."""
    gpu_holds[g, pair] = True
    if first_gpu[n, pair] < 0:
        i = num_replicas[pair]
        while i > 0 and holders[pair, i - 1] > n:
            holders[pair, i] = holders[pair, i - 1]
            i -= 1
        holders[pair, i] = n
        num_replicas[pair] += 1
        first_gpu[n, pair] = g
    elif g < first_gpu[n, pair]:
        first_gpu[n, pair] = g


@inline_kernel
def release_replica(  # pragma: no cover - compiled
    g: int, pair: int, gpu_holds: Array, first_gpu: Array, holders: Array, num_replicas: Array,
    gpu_start: Array, n: int,
) -> None:  # fmt: skip
    """Record that GPU g of server n no longer holds a pair."""
    if not gpu_holds[g, pair]:
        return
    gpu_holds[g, pair] = False
    first_gpu[n, pair] = -1
    for other in range(gpu_start[n], gpu_start[n + 1]):
        if gpu_holds[other, pair]:
            first_gpu[n, pair] = other
            return
    i = 0
    while holders[pair, i] != n:
        i += 1
    num_replicas[pair] -= 1
    while i < num_replicas[pair]:
        holders[pair, i] = holders[pair, i + 1]
        i += 1


@inline_kernel
def start_load(  # pragma: no cover - compiled
    scenario: ScenarioArrays, state: EngineState, g: int, layer: int, earliest_s: float
) -> float:
    """Load an expert of a layer onto GPU g when its load channel is free; return the end."""
    load_s = scenario.load_s[g, layer]
    start_s = max(earliest_s, state.load_free_s[g])
    if scenario.load_blocks_compute[g]:
        start_s = max(start_s, state.gpu_free_s[g])
        state.gpu_free_s[g] = start_s + load_s
        state.gpu_busy_s[g] += load_s
    state.load_free_s[g] = start_s + load_s
    state.counter[LOADS] += 1
    state.counter[LOADED_BYTES] += scenario.expert_bytes[layer]
    return start_s + load_s  # type: ignore[no-any-return]


@inline_kernel
def start_steps(  # pragma: no cover - compiled
    scenario: ScenarioArrays, state: EngineState, num_ready: int
) -> bool:
    """Start the first ``num_ready`` of ``ready_steps``, and those that their drops make ready.

    Returns False where a step drops the last replica of a pair.
    """
    i = 0
    while i < num_ready:
        index = state.ready_steps[i]
        i += 1
        g = state.step_gpu[index]
        pair = state.step_pair[index]
        if state.step_is_load[index]:
            end_s = start_load(scenario, state, g, pair // scenario.num_experts, state.clock_s[0])
            heap = state.heap
            push_event(
                end_s, LOADED, index, heap.time_s, heap.key, heap.event, heap.counts, heap.priority
            )
            continue
        release_replica(
            g, pair, state.gpu_holds, state.first_gpu, state.holders, state.num_replicas,
            scenario.gpu_start, scenario.server_of_gpu[g],
        )  # fmt: skip
        if state.num_replicas[pair] == 0:
            state.counter[FAILED_STEP] = index
            return False
        num_ready = complete_step(state, index, num_ready)
    return True


@inline_kernel
def complete_step(  # pragma: no cover - compiled
    state: EngineState, index: int, num_ready: int
) -> int:
    """Append to ``ready_steps`` those that needed only this step; return how many there are."""
    state.counter[OPEN_STEPS] -= 1
    if state.counter[OPEN_STEPS] == 0:
        state.clock_s[1] = state.clock_s[0]
    for i in range(state.step_dependents_start[index], state.step_dependents_start[index + 1]):
        other = state.step_dependents[i]
        state.step_open_needs[other] -= 1
        if state.step_open_needs[other] == 0:
            state.ready_steps[num_ready] = other
            num_ready += 1
    return num_ready
