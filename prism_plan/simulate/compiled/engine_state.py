"""The arrays of the compiled engine: the scenario, which a run reads, and the state that it writes.

Dimensions in the annotations of fields: N servers, G GPUs, L layers, E experts, J = L * E pairs,
K top-k, R requests, P prompts, T tokens of a step, M messages.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np

from prism_plan.placement import first_gpus
from prism_plan.simulate.compiled import records
from prism_plan.simulate.compiled.heap import Heap
from prism_plan.simulate.offload_slots import initial_slots
from prism_plan.simulate.routing_policies import ROUTES, holder_lists
from prism_plan.simulate.scenario import Scenario

Array = Any

i4, i8, f8 = np.int32, np.int64, np.float64


class ScenarioArrays(NamedTuple):
    """What a run reads; see Scenario, Requests, Prompts, Network and Timing."""

    experts: Annotated[Array, np.uint16, "rows, L, K"]
    prompts: Annotated[Array, records.PROMPT, "P"]
    requests: Annotated[Array, records.REQUEST, "R, in order of arrival"]
    servers: Annotated[Array, records.SERVER, "N"]
    gpus: Annotated[Array, records.GPU, "G"]
    layers: Annotated[Array, records.LAYER, "L"]
    # A row for each home of each execution table so far
    execution: Annotated[Array, i4, "tables x N, L"]

    # Network; link_rank orders the servers of a row by cost of a call
    links: Annotated[Array, records.LINK, "N, N"]
    link_rank: Annotated[Array, i4, "N, N"]
    call_overhead_s: float
    hop_overhead_s: float
    burst_bytes: float
    short_bytes: float
    token_bytes: int

    # Timing: C is the longest context; see Timing
    prefill_s: Annotated[Array, f8, "kinds, classes, T + 1"]
    decode_s: Annotated[Array, f8, "kinds, classes, C + 1"]
    expert_s: Annotated[Array, f8, "kinds, sizes, T + 1"]
    load_s: Annotated[Array, f8, "G, L"]

    # Model and rules; route is a position in ROUTES
    num_experts: int
    route: int
    offload: bool


class EngineState(NamedTuple):
    """What a run writes; measurements are named as in Outcome."""

    heap: Heap
    run: Annotated[Array, records.RUN, 1]
    requests: Annotated[Array, records.REQUEST_STATE, "R"]
    servers: Annotated[Array, records.SERVER_STATE, "N"]
    gpus: Annotated[Array, records.GPU_STATE, "G"]

    # Ports: uplinks in row 0, downlinks in row 1; those from N on are for short messages
    ports: Annotated[Array, records.PORT, 2, "2N"]

    # Messages: queue_links of the uplink (column 0) and the downlink (1); message_work_s is of each
    # GPU of the receiver, -1 where it has none; free_messages are the unused ones
    messages: Annotated[Array, records.MESSAGE, "M"]
    queue_links: Annotated[Array, records.QUEUE_LINK, "M", 2]
    message_work_s: Annotated[Array, f8, "M", "gpus"]
    free_messages: Annotated[Array, i4, "M"]

    # From row to column: tokens sent so far, by which `cover` breaks ties; calls; other messages
    tokens_sent: Annotated[Array, i8, "N", "N"]
    messages_sent: Annotated[Array, i8, "N", "N"]
    hops_sent: Annotated[Array, i8, "N", "N"]

    # Placement: gpu_holds as the placement has it; first_gpu of the server that holds the pair, or
    # -1; holders of the pair, ascending, the first num_replicas of the row
    gpu_holds: Annotated[Array, np.bool_, "G", "J"]
    first_gpu: Annotated[Array, i4, "N", "J"]
    holders: Annotated[Array, i4, "J", "N"]
    num_replicas: Annotated[Array, i4, "J"]

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

    # The migration under way; ready_steps is the queue of the steps that can start
    steps: Annotated[Array, records.STEP, 0]
    step_dependents: Annotated[Array, i4, 0]
    ready_steps: Annotated[Array, i4, 0]

    # The baseline `offload`: slots of all servers; the slot of a pair at a server or -1
    slots: Annotated[Array, records.SLOT, "slots"]
    slot_of: Annotated[Array, i4, "N", "J where offloading"]

    # Layers of decode steps by number of remote experts, and their times; calls by home server
    # since they were last taken
    layer_steps: Annotated[Array, i8, "K + 1"]
    layer_s: Annotated[Array, f8, "K + 1"]
    recent_calls: Annotated[Array, i8, "N", "L", "E"]

    log: Annotated[Array, records.LOG_LINE, "lines"]


class LossArrays(NamedTuple):
    """What a run writes besides where its servers may be lost.

    Calls are told by a bit for each of a token's experts, in the order of the trace.
    """

    flags: Annotated[Array, records.LOSS_FLAGS, 1]
    # Of each message the calls of each token of the step; in the routing of a step those to each
    # server, zero before and after
    calls: Annotated[Array, i8, "M", "T"]
    step_calls: Annotated[Array, i8, "N", "T"]


class TransferArrays(NamedTuple):
    """What transfers read and write: of ScenarioArrays and of EngineState."""

    links: Array
    lines: Array
    burst_bytes: float
    short_bytes: float
    heap: Heap
    run: Array
    servers: Array
    ports: Array
    messages: Array
    queue_links: Array


def transfer_arrays(scenario: ScenarioArrays, state: EngineState) -> TransferArrays:
    """The arrays of transfers."""
    return TransferArrays(
        links=scenario.links,
        lines=scenario.servers,
        burst_bytes=scenario.burst_bytes,
        short_bytes=scenario.short_bytes,
        heap=state.heap,
        run=state.run,
        servers=state.servers,
        ports=state.ports,
        messages=state.messages,
        queue_links=state.queue_links,
    )


def scenario_arrays(s: Scenario) -> ScenarioArrays:
    """The scenario as contiguous, read-only arrays, so that all have one compiled signature."""
    prompts, network, timing = s.requests.prompts, s.network, s.timing
    servers = {
        "up_bytes_per_s": network.up_bytes_per_s,
        "down_bytes_per_s": network.down_bytes_per_s,
        "concurrency": s.concurrency,
        "first_gpu": s.gpu_start[:-1],
        "end_gpu": s.gpu_start[1:],
        "dense_gpu": s.dense_gpu,
    }
    gpus = {
        "server": s.placement.server_of_gpu,
        "kind": timing.kind,
        "load_blocks_compute": s.load_blocks_compute,
    }
    layers = {
        "expert_bytes": s.model.expert_bytes_by_layer,
        "size_class": timing.size,
        "dense_class": timing.dense_class,
    }
    values: dict[str, Any] = {
        "experts": prompts.experts,
        "prompts": _records(records.PROMPT, prompts),
        "requests": _records(records.REQUEST, s.requests),
        "servers": _records(records.SERVER, servers),
        "gpus": _records(records.GPU, gpus),
        "layers": _records(records.LAYER, layers),
        "execution": s.execution,
        "links": _records(records.LINK, network),
        "link_rank": network.link_rank(),
        "prefill_s": timing.prefill_s,
        "decode_s": timing.decode_s,
        "expert_s": timing.expert_s,
        "load_s": timing.load_s,
    }
    hints = get_type_hints(ScenarioArrays, include_extras=True)
    for name, value in values.items():
        values[name] = _read_only(value, hints[name].__metadata__[0])
    for name in ("call_overhead_s", "hop_overhead_s", "burst_bytes", "short_bytes"):
        values[name] = float(getattr(network, name))
    return ScenarioArrays(
        **values,
        token_bytes=int(network.token_bytes),
        num_experts=int(s.model.num_experts),
        route=ROUTES.index(s.route),
        offload=bool(s.offload),
    )


def with_table(arrays: ScenarioArrays, execution: Array) -> ScenarioArrays:
    """The arrays with one more execution table [N, L], unless it is the latest one."""
    rows = arrays.execution
    if np.array_equal(rows[-len(execution) :], execution):
        return arrays
    return arrays._replace(execution=_read_only(np.concatenate([rows, execution]), i4))


def _read_only(values: Any, kind: Any) -> Array:
    array = np.ascontiguousarray(values, kind).view()
    array.setflags(write=False)
    return array


def _records(kind: np.dtype[Any], source: Any) -> Array:
    """An array of records from a mapping or an object with an array for each field."""
    names = kind.names or ()
    columns = {
        name: source[name] if isinstance(source, dict) else getattr(source, name) for name in names
    }
    made = np.zeros(np.shape(columns[names[0]]), kind)
    for name, column in columns.items():
        made[name] = column
    return made


def initial_state(s: Scenario, *, log: bool) -> EngineState:
    """The state before the first event: nothing has arrived, every queue is empty."""
    servers, layers = s.execution.shape
    experts, top_k = s.model.num_experts, s.model.top_k
    pairs, requests, gpus = layers * experts, len(s.requests), len(s.timing.kind)
    room = 64 + 4 * servers
    slots = initial_slots(s.placement) if s.offload else [[] for _ in range(servers)]
    all_slots = [slot for own in slots for slot in own]
    sizes = {
        "N": servers, "2N": 2 * servers, "G": gpus, "L": layers, "E": experts, "J": pairs,
        "K": max(top_k, 1), "K + 1": top_k + 1, "2^K": 1 << top_k if s.route == "cover" else 1,
        "R": requests, "M": room, "gpus": max(map(len, s.placement.gpu_capacity)),
        "slots": len(all_slots), "J where offloading": pairs if s.offload else 0,
        "lines": 1024 if log else 0,
    }  # fmt: skip
    hints = get_type_hints(EngineState, include_extras=True)
    arrays: dict[str, Any] = {"heap": Heap.empty(room)}
    for name in EngineState._fields[1:]:
        kind, *shape = hints[name].__metadata__
        arrays[name] = np.zeros([sizes.get(size, size) for size in shape], kind)
    state = EngineState(**arrays)
    state.message_work_s[:] = -1.0
    state.slot_of[:] = -1
    for array, names in (
        (state.requests, ["next_queued"]),
        (state.servers, ["queue_head", "queue_tail"]),
        (state.gpus, ["lru_first", "lru_last"]),
        (state.ports, ["queue_head", "queue_tail"]),
        (state.queue_links, ["next", "previous"]),
        (state.slots, ["lru_next", "lru_previous"]),
    ):
        for name in names:
            array[name] = -1
    for name in ("start_s", "first_token_s", "done_s"):
        state.requests[name] = np.nan
    for name in ("up_bucket_bytes", "down_bucket_bytes"):
        state.servers[name] = s.network.burst_bytes
    state.run["free_messages"] = room
    state.free_messages[:] = np.arange(room)[::-1]
    state.run["begins_after"] = -1
    _place_experts(state, s)
    for i, slot in enumerate(all_slots):
        for name in slot._fields:
            state.slots[name][i] = getattr(slot, name)
        if slot.pair >= 0:
            state.slot_of[s.placement.server_of_gpu[slot.gpu], slot.pair] = i
    _link_slots(state)
    return state


def _place_experts(state: EngineState, s: Scenario) -> None:
    """Fill in what the placement says: GPUs, first GPUs, holders and their numbers."""
    held = s.placement.on_gpu.reshape(len(state.gpu_holds), -1)
    state.gpu_holds[:] = held
    first_gpu = first_gpus(held, s.placement.server_of_gpu, s.placement.num_servers)
    state.first_gpu[:] = first_gpu
    state.holders[:], state.num_replicas[:] = holder_lists(first_gpu)


def _link_slots(state: EngineState) -> None:
    """Link each GPU's slots in the order of the end of their last use."""
    gpus, slots = state.gpus, state.slots
    for slot in np.lexsort((slots["used_s"], slots["gpu"])).tolist():
        g = slots["gpu"][slot]
        last = gpus["lru_last"][g]
        slots["lru_previous"][slot] = last
        if last < 0:
            gpus["lru_first"][g] = slot
        else:
            slots["lru_next"][last] = slot
        gpus["lru_last"][g] = slot


def grow(s: EngineState, which: str) -> EngineState:
    """The same state with twice the room for events, messages or log lines."""
    if which == "heap":
        return s._replace(heap=s.heap._replace(entries=_twice(s.heap.entries)))
    if which == "log":
        return s._replace(log=_twice(s.log))
    old = len(s.messages)
    names = ("messages", "queue_links", "message_work_s")
    more = s._replace(**{name: _twice(getattr(s, name)) for name in names})
    more.message_work_s[old:] = -1.0
    for name in ("next", "previous"):
        more.queue_links[name][old:] = -1
    free = np.empty(2 * old, np.int32)
    unused = int(s.run["free_messages"][0])
    free[:old] = np.arange(2 * old - 1, old - 1, -1)  # the new ones, below those on top
    free[old : old + unused] = s.free_messages[:unused]
    s.run["free_messages"] = old + unused
    return more._replace(free_messages=free)


def _twice(array: Array) -> Array:
    longer = np.zeros((2 * len(array), *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer
