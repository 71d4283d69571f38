"""Migration in the compiled engine: replicas that come and go, the steps that move them, tables."""

from __future__ import annotations

from typing import Any

from prism_plan.jit import inline_kernel
from prism_plan.kernel_types import int64
from prism_plan.simulate.compiled.engine_state import EngineState, ScenarioArrays
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
    n: int, end_gpu: int,
) -> None:  # fmt: skip
    """Record that GPU g of server n, whose GPUs end before ``end_gpu``, no longer holds a pair."""
    if not gpu_holds[g, pair]:
        return
    gpu_holds[g, pair] = False
    if first_gpu[n, pair] != g:
        return
    first_gpu[n, pair] = -1
    for other in range(g + 1, end_gpu):
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
    gpu = state.gpus[g]
    start_s = max(earliest_s, gpu.load_free_s)
    if scenario.gpus[g].load_blocks_compute:
        start_s = max(start_s, gpu.free_s)
        gpu.free_s = start_s + load_s
        gpu.gpu_busy_s += load_s
    gpu.load_free_s = start_s + load_s
    run = state.run[0]
    run.loads += 1
    run.loaded_bytes += scenario.layers[layer].expert_bytes
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
        step = state.steps[index]
        pair = step.pair
        if step.is_load:
            layer = pair // scenario.num_experts
            end_s = start_load(scenario, state, int64(step.gpu), layer, state.run[0].now_s)
            push_event(end_s, int64(LOADED), int64(index), state.heap)
            continue
        n = scenario.gpus[step.gpu].server
        release_replica(
            step.gpu, pair, state.gpu_holds, state.first_gpu, state.holders, state.num_replicas,
            n, scenario.servers[n].end_gpu,
        )  # fmt: skip
        if state.num_replicas[pair] == 0:
            state.run[0].failed_step = index
            return False
        num_ready = complete_step(state, int64(index), num_ready)
    return True


@inline_kernel
def complete_step(  # pragma: no cover - compiled
    state: EngineState, index: int, num_ready: int
) -> int:
    """Append to ``ready_steps`` those that needed only this step; return how many there are."""
    run = state.run[0]
    run.open_steps -= 1
    if run.open_steps == 0:
        run.migration_end_s = run.now_s
    for i in range(state.steps[index].first_dependent, state.steps[index].end_dependent):
        other = state.step_dependents[i]
        state.steps[other].open_needs -= 1
        if state.steps[other].open_needs == 0:
            state.ready_steps[num_ready] = other
            num_ready += 1
    return num_ready


@inline_kernel
def update_tables(state: EngineState) -> int:  # pragma: no cover - compiled
    """Begin the next execution table if its steps are complete, and release steps that waited.

    The steps that have no other need are the first ones of ``ready_steps``; returns how many.
    """
    run = state.run[0]
    steps = len(state.steps)
    if run.begins_after >= 0 and steps - run.open_steps >= run.begins_after:
        run.begins_after = -1
        if run.next_table_row != run.table_row:
            run.table_row = run.next_table_row
            run.num_on_older_tables = 0
            for n in range(len(state.servers)):
                run.num_on_older_tables += state.servers[n].num_active
    num_ready = 0
    if run.begins_after < 0 and run.num_on_older_tables == 0:
        for index in range(run.waits_from, steps):
            state.steps[index].open_needs -= 1
            if state.steps[index].open_needs == 0:
                state.ready_steps[num_ready] = index
                num_ready += 1
        run.waits_from = steps
    return num_ready
