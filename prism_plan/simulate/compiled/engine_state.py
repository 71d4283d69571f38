"""The arrays of the compiled engine: the scenario, which a run reads, and the state that it writes.

Dimensions in the annotations of fields: N servers, G GPUs, L layers, E experts, J = L * E pairs,
K top-k, R requests, P prompts, T tokens of a step, M messages.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np

from prism_plan.simulate.compiled.heap import Heap
from prism_plan.simulate.offload_slots import initial_slots
from prism_plan.simulate.routing_policies import ROUTES
from prism_plan.simulate.scenario import Scenario

Array = Any

#: Positions in `EngineState.counter`: events processed, the latest request that arrived, requests
#: that are finished, unused messages, steps of a migration not yet complete, experts loaded and
#: their bytes, lines of the log, the step that dropped a last replica, messages that ever waited,
#: steps of a new migration that can start.
(
    PROCESSED, LATEST_ARRIVAL, FINISHED, FREE_MESSAGES, OPEN_STEPS, LOADS, LOADED_BYTES, LOG_LINES,
    FAILED_STEP, ENQUEUED, NEW_STEPS,
) = range(11)  # fmt: skip

i4, i8, f8 = np.int32, np.int64, np.float64


class ScenarioArrays(NamedTuple):
    """What a run reads; see Scenario, Requests, Prompts, Network and Timing."""

    # Prompts
    experts: Annotated[Array, np.uint16, "rows, L, K"]
    first_row: Annotated[Array, i8, "P"]
    prefill_tokens: Annotated[Array, i4, "P"]
    decode_tokens: Annotated[Array, i4, "P"]

    # Requests, in order of arrival
    home: Annotated[Array, i4, "R"]
    arrival_s: Annotated[Array, f8, "R"]
    prompt: Annotated[Array, i4, "R"]

    # Servers and GPUs
    execution: Annotated[Array, i4, "N, L"]
    concurrency: Annotated[Array, i8, "N"]
    dense_gpu: Annotated[Array, i4, "N"]
    gpu_start: Annotated[Array, i4, "N + 1"]
    server_of_gpu: Annotated[Array, i4, "G"]

    # Network; link_rank orders the servers of a row by cost of a call
    seconds_per_byte: Annotated[Array, f8, "N, N"]
    half_rtt_s: Annotated[Array, f8, "N, N"]
    up_bytes_per_s: Annotated[Array, f8, "N"]
    down_bytes_per_s: Annotated[Array, f8, "N"]
    link_rank: Annotated[Array, i4, "N, N"]
    call_overhead_s: float
    burst_bytes: float
    short_bytes: float
    token_bytes: int

    # Timing: each GPU's row and each layer's column of expert_s
    gpu_kind: Annotated[Array, i4, "G"]
    size_class: Annotated[Array, i4, "L"]
    dense_s: Annotated[Array, f8, "kinds, T + 1"]
    expert_s: Annotated[Array, f8, "kinds, sizes, T + 1"]
    load_s: Annotated[Array, f8, "G, L"]
    load_blocks_compute: Annotated[Array, np.bool_, "G"]
    expert_bytes: Annotated[Array, i8, "L"]

    # Model and rules; route is a position in ROUTES
    num_experts: int
    route: int
    offload: bool


class EngineState(NamedTuple):
    """What a run writes; measurements are named as in Outcome."""

    heap: Heap
    # The current time, and the time at which the latest migration was complete
    clock_s: Annotated[Array, f8, 2]
    counter: Annotated[Array, i8, 11]

    # Requests: where each is in its steps and layers; pending_parts are batches of the layer that
    # are not yet computed, next_queued links the requests that wait for admission at a server
    location: Annotated[Array, i4, "R"]
    token_row: Annotated[Array, i8, "R"]
    step_tokens: Annotated[Array, i4, "R"]
    steps_left: Annotated[Array, i4, "R"]
    decoding: Annotated[Array, np.bool_, "R"]
    layer: Annotated[Array, i4, "R"]
    pending_parts: Annotated[Array, i4, "R"]
    layer_start_s: Annotated[Array, f8, "R"]
    remote_experts: Annotated[Array, i4, "R"]
    next_queued: Annotated[Array, i4, "R"]

    # Servers: the admission queue, and the requests that are admitted, and present
    queue_head: Annotated[Array, i4, "N"]
    queue_tail: Annotated[Array, i4, "N"]
    num_active: Annotated[Array, i8, "N"]
    num_present: Annotated[Array, i8, "N"]
    present_since_s: Annotated[Array, f8, "N"]
    present_s: Annotated[Array, f8, "N"]

    # GPUs: when the compute queue and the load channel are free next
    gpu_free_s: Annotated[Array, f8, "G"]
    load_free_s: Annotated[Array, f8, "G"]

    # Ports: uplinks in row 0, downlinks in row 1; those from N on are for short messages. A queue
    # lists messages in the order in which they were ready
    port_busy: Annotated[Array, np.bool_, 2, "2N"]
    port_queue_head: Annotated[Array, i4, 2, "2N"]
    port_queue_tail: Annotated[Array, i4, 2, "2N"]
    port_free_s: Annotated[Array, f8, 2, "2N"]
    # Token buckets: level and time of it, of the uplink, then of the downlink
    bucket: Annotated[Array, f8, 4, "N"]
    # Tokens sent from row to column so far, by which `cover` breaks ties
    tokens_sent: Annotated[Array, i8, "N", "N"]

    # Placement: gpu_holds as the placement has it; first_gpu of the server that holds the pair, or
    # -1; holders of the pair, ascending, the first num_replicas of the row
    gpu_holds: Annotated[Array, np.bool_, "G", "J"]
    first_gpu: Annotated[Array, i4, "N", "J"]
    holders: Annotated[Array, i4, "J", "N"]
    num_replicas: Annotated[Array, i4, "J"]

    # Messages: calls, and hidden states on their way to the next layer's server (message_hop);
    # message_ready numbers them in the order in which they began to wait; next and previous link
    # the queues of an uplink (column 0) and a downlink (1); message_work_s is of each GPU of the
    # receiver, -1 where it has none; free_messages are the unused ones
    message_request: Annotated[Array, i4, "M"]
    message_layer: Annotated[Array, i4, "M"]
    message_from: Annotated[Array, i4, "M"]
    message_to: Annotated[Array, i4, "M"]
    message_bytes: Annotated[Array, i8, "M"]
    reply_bytes: Annotated[Array, i8, "M"]
    message_hop: Annotated[Array, np.bool_, "M"]
    message_returning: Annotated[Array, np.bool_, "M"]
    message_ready: Annotated[Array, i8, "M"]
    message_next: Annotated[Array, i4, "M", 2]
    message_previous: Annotated[Array, i4, "M", 2]
    message_work_s: Annotated[Array, f8, "M", "gpus"]
    free_messages: Annotated[Array, i4, "M"]

    # Working memory of the routing of a step: tokens of each expert by destination, the experts in
    # the order of their first call, how many there are, tokens that go to a server; the other
    # four are those of routing_policies.choose_holders
    token_count: Annotated[Array, i4, "N", "E"]
    expert_order: Annotated[Array, i4, "N", "E"]
    distinct_experts: Annotated[Array, i4, "N"]
    tokens_to: Annotated[Array, i4, "N"]
    missing_experts: Annotated[Array, i8, 2, "K"]
    held_mask: Annotated[Array, i8, "N"]
    candidate_servers: Annotated[Array, i4, "N"]
    cover_table: Annotated[Array, i8, 3, "2^K"]

    # Steps of the migration under way: a load or a drop of a pair on a GPU; needs that are not
    # complete; the steps that need it are step_dependents[start[i]:start[i + 1]]; ready_steps is
    # the queue of those that can start
    step_is_load: Annotated[Array, np.bool_, 0]
    step_gpu: Annotated[Array, i4, 0]
    step_pair: Annotated[Array, i8, 0]
    step_open_needs: Annotated[Array, i4, 0]
    step_dependents_start: Annotated[Array, i8, 1]
    step_dependents: Annotated[Array, i4, 0]
    ready_steps: Annotated[Array, i4, 0]

    # Slots of the baseline `offload`: those of a server are slot_start[n]:slot_start[n + 1]; a
    # slot's pair or -1, the end of its last use, its GPU; and the slot of a pair at a server or -1.
    # Each GPU has a list of its slots by the end of their last use, then by number
    slot_start: Annotated[Array, i8, "N + 1"]
    slot_pair: Annotated[Array, i8, "slots"]
    slot_used_s: Annotated[Array, f8, "slots"]
    slot_gpu: Annotated[Array, i4, "slots"]
    lru_first: Annotated[Array, i4, "G"]
    lru_last: Annotated[Array, i4, "G"]
    lru_next: Annotated[Array, i4, "slots"]
    lru_previous: Annotated[Array, i4, "slots"]
    slot_of: Annotated[Array, i4, "N", "J where offloading"]

    # Measurements of requests, of home servers, of places, of layers
    start_s: Annotated[Array, f8, "R"]
    first_token_s: Annotated[Array, f8, "R"]
    done_s: Annotated[Array, f8, "R"]
    calls: Annotated[Array, i8, "N"]
    remote_calls: Annotated[Array, i8, "N"]
    steps: Annotated[Array, i8, "N"]
    waiting: Annotated[Array, i8, "N"]
    destinations: Annotated[Array, i8, "N"]
    bytes_out: Annotated[Array, i8, "N"]
    bytes_in: Annotated[Array, i8, "N"]
    up_busy_s: Annotated[Array, f8, "N"]
    down_busy_s: Annotated[Array, f8, "N"]
    messages: Annotated[Array, i8, "N", "N"]
    gpu_busy_s: Annotated[Array, f8, "G"]
    served: Annotated[Array, i8, "G"]
    layer_steps: Annotated[Array, i8, "K + 1"]
    layer_s: Annotated[Array, f8, "K + 1"]
    # Calls by home server since they were last taken
    recent_calls: Annotated[Array, i8, "N", "L", "E"]

    # Log: time; kind, request, layer, from, to of an event
    log_s: Annotated[Array, f8, "lines"]
    log_event: Annotated[Array, i4, "lines", 5]


#: What transfers read and write: these fields of ScenarioArrays and EngineState.
TransferArrays = namedtuple(
    "TransferArrays",
    "seconds_per_byte half_rtt_s up_bytes_per_s down_bytes_per_s burst_bytes short_bytes "
    "clock_s counter heap port_busy port_queue_head "
    "port_queue_tail port_free_s bucket message_from message_to message_bytes reply_bytes "
    "message_returning message_ready message_next message_previous up_busy_s down_busy_s "
    "bytes_out bytes_in",
)


def transfer_arrays(scenario: ScenarioArrays, state: EngineState) -> TransferArrays:
    """The arrays of transfers."""
    own = scenario._asdict() | state._asdict()
    return TransferArrays(*(own[name] for name in TransferArrays._fields))


def scenario_arrays(s: Scenario) -> ScenarioArrays:
    """The scenario as contiguous, read-only arrays, so that all have one compiled signature."""
    prompts, requests, network, timing = s.requests.prompts, s.requests, s.network, s.timing
    sources: tuple[tuple[Any, str], ...] = (
        (prompts, "experts first_row prefill_tokens decode_tokens"),
        (requests, "home arrival_s prompt"),
        (s, "execution concurrency dense_gpu gpu_start load_blocks_compute"),
        (network, "seconds_per_byte half_rtt_s up_bytes_per_s down_bytes_per_s"),
        (timing, "dense_s expert_s load_s"),
    )
    values: dict[str, Any] = {
        **{name: getattr(source, name) for source, names in sources for name in names.split()},
        "server_of_gpu": s.placement.server_of_gpu,
        "link_rank": network.link_rank(),
        "gpu_kind": timing.kind,
        "size_class": timing.size,
        "expert_bytes": s.model.expert_bytes_by_layer,
    }
    hints = get_type_hints(ScenarioArrays, include_extras=True)
    for name, value in values.items():
        array = np.ascontiguousarray(value, hints[name].__metadata__[0]).view()
        array.setflags(write=False)
        values[name] = array
    for name in ("call_overhead_s", "burst_bytes", "short_bytes"):
        values[name] = float(getattr(network, name))
    return ScenarioArrays(
        **values,
        token_bytes=int(network.token_bytes),
        num_experts=int(s.model.num_experts),
        route=ROUTES.index(s.route),
        offload=bool(s.offload),
    )


def initial_state(s: Scenario, *, log: bool) -> EngineState:
    """The state before the first event: nothing has arrived, every queue is empty."""
    servers, layers = s.execution.shape
    experts, top_k = s.model.num_experts, s.model.top_k
    pairs, requests, gpus = layers * experts, len(s.requests), len(s.timing.kind)
    room = 64 + 4 * servers
    slots = initial_slots(s.placement) if s.offload else [[] for _ in range(servers)]
    all_slots = [slot for own in slots for slot in own]
    sizes = {
        "N": servers, "2N": 2 * servers, "N + 1": servers + 1, "G": gpus, "L": layers,
        "E": experts, "J": pairs, "K": max(top_k, 1), "K + 1": top_k + 1,
        "2^K": 1 << top_k if s.route == "cover" else 1, "R": requests, "M": room,
        "gpus": max(map(len, s.placement.gpu_capacity)), "slots": len(all_slots),
        "J where offloading": pairs if s.offload else 0, "lines": 1024 if log else 0,
    }  # fmt: skip
    hints = get_type_hints(EngineState, include_extras=True)
    arrays: dict[str, Any] = {"heap": Heap.empty(room)}
    for name in EngineState._fields[1:]:
        kind, *shape = hints[name].__metadata__
        arrays[name] = np.zeros([sizes.get(size, size) for size in shape], kind)
    for name in (
        "next_queued", "queue_head", "queue_tail", "port_queue_head", "port_queue_tail",
        "message_next", "message_previous", "message_work_s", "slot_of", "lru_first", "lru_last",
        "lru_next", "lru_previous",
    ):  # fmt: skip
        arrays[name][:] = -1
    for name in ("start_s", "first_token_s", "done_s"):
        arrays[name][:] = np.nan
    arrays["counter"][FREE_MESSAGES] = room
    arrays["free_messages"][:] = np.arange(room)[::-1]
    arrays["bucket"][[0, 2]] = s.network.burst_bytes
    held = s.placement.on_gpu.reshape(gpus, pairs)
    arrays["gpu_holds"][:] = held
    first_gpu = arrays["first_gpu"]
    first_gpu[:] = -1
    for g in range(gpus - 1, -1, -1):
        first_gpu[s.placement.server_of_gpu[g], held[g]] = g
    arrays["holders"][:] = np.argsort(first_gpu.T < 0, axis=1, kind="stable")
    arrays["num_replicas"][:] = (first_gpu >= 0).sum(axis=0)
    arrays["slot_start"][1:] = np.cumsum([len(own) for own in slots])
    for i, slot in enumerate(all_slots):
        arrays["slot_pair"][i], arrays["slot_used_s"][i], arrays["slot_gpu"][i] = slot
        if slot.pair >= 0:
            arrays["slot_of"][s.placement.server_of_gpu[slot.gpu], slot.pair] = i
    order = np.lexsort((arrays["slot_used_s"], arrays["slot_gpu"])).tolist()
    for slot in order:
        g = arrays["slot_gpu"][slot]
        last = arrays["lru_last"][g]
        arrays["lru_previous"][slot] = last
        if last < 0:
            arrays["lru_first"][g] = slot
        else:
            arrays["lru_next"][last] = slot
        arrays["lru_last"][g] = slot
    return EngineState(**arrays)


def grow(s: EngineState, which: str) -> EngineState:
    """The same state with twice the room for events, messages or log lines."""
    if which == "heap":
        time_s, key, event = map(_twice, s.heap[:3])
        return s._replace(heap=s.heap._replace(time_s=time_s, key=key, event=event))
    prefixes = ("log_",) if which == "log" else ("message_", "reply_bytes")
    names = [name for name in s._fields if name.startswith(prefixes)]
    more = s._replace(**{name: _twice(getattr(s, name)) for name in names})
    if which == "log":
        return more
    old = len(s.message_request)
    more.message_work_s[old:] = -1.0
    more.message_next[old:] = more.message_previous[old:] = -1
    free = np.empty(2 * old, np.int32)
    unused = int(s.counter[FREE_MESSAGES])
    free[:old] = np.arange(2 * old - 1, old - 1, -1)  # the new ones, below those on top
    free[old : old + unused] = s.free_messages[:unused]
    s.counter[FREE_MESSAGES] = old + unused
    return more._replace(free_messages=free)


def _twice(array: Array) -> Array:
    return np.concatenate([array, np.zeros_like(array)])
