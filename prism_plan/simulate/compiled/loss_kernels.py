"""Kernels that Python calls between events where servers are lost: single messages and requests."""

from __future__ import annotations

from typing import Any

from prism_plan.jit import kernel
from prism_plan.kernel_types import int64
from prism_plan.simulate.compiled.engine_state import EngineState, ScenarioArrays, TransferArrays
from prism_plan.simulate.compiled.heap import NUMBER_BITS, push_event
from prism_plan.simulate.compiled.records import IDS
from prism_plan.simulate.compiled.transfer_kernels import dequeue, send_hop, start_transfer
from prism_plan.simulate.events import DENSE
from prism_plan.simulate.network import BYTES_PER_TOKEN_ID


@kernel
def leave_queues(  # pragma: no cover - compiled
    links: TransferArrays, message: int, sender: int, receiver: int
) -> None:
    """Remove a waiting message from the queues of its two ports."""
    dequeue(links, message, sender, receiver)


@kernel
def start_waiting(  # pragma: no cover - compiled
    links: TransferArrays, message: int, sender: int, receiver: int
) -> None:
    """Start the transfer of a waiting message, whose ports are free."""
    dequeue(links, message, sender, receiver)
    start_transfer(links, message, sender, receiver)


@kernel
def begin_passes(  # pragma: no cover - compiled
    scenario: ScenarioArrays, state: EngineState, r: int
) -> None:
    """Begin the first pass of a request that stands at its home, wherever its first layer is."""
    request = state.requests[r]
    now = state.run[0].now_s
    at = request.location
    to = scenario.execution[request.table_row, 0]
    if at != to:
        payload = int64(BYTES_PER_TOKEN_ID * request.step_tokens)
        send_hop(
            state, r, int64(-1), int64(at), int64(to), payload, int64(IDS), True,
            now + scenario.hop_overhead_s,
        )  # fmt: skip
        return
    request.layer_start_s = now
    g = scenario.servers[at].dense_gpu
    gpu = state.gpus[g]
    kind = scenario.gpus[g].kind
    dense_class = scenario.layers[0].dense_class
    if request.decoding:
        work_s = scenario.decode_s[kind, dense_class, request.context]
    else:
        work_s = scenario.prefill_s[kind, dense_class, request.step_tokens]
    gpu.free_s = max(now, gpu.free_s) + work_s
    gpu.gpu_busy_s += work_s
    push_event(gpu.free_s, int64(DENSE), r, state.heap)


@kernel
def push(at_s: float, kind: int, subject: int, state: EngineState) -> Any:  # pragma: no cover
    """Add an event to the heap; returns its key."""
    push_event(at_s, kind, subject, state.heap)
    return (state.heap.priority[kind] << NUMBER_BITS) | (state.heap.counts[1] - 1)
