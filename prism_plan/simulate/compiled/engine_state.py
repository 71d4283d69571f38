"""The compiled engine's memory: what does not change during a run, and what does."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from prism_plan.simulate.events import RANK
from prism_plan.simulate.routing_policies import ROUTES
from prism_plan.simulate.scenario import Scenario

Array = Any

#: Positions in `State.number`.
(
    PUSHED, TAKEN, HEAP, SEEN, FINISHED, FREE, OPEN_STEPS, LOADS, LOADED_BYTES, LOGGED, ERROR,
    QUEUED,
) = range(12)  # fmt: skip
NUMBERS = 12

#: Log columns, in order: kind, request, layer, at, to.
LOG_COLUMNS = 5


class Fixed(NamedTuple):
    """What a run reads; shapes as in Scenario, Network, Timing and Prompts.

    ``server`` int32 [G]; ``link_rank`` int32 [N, N] by cost of a call; ``scalars`` float64 [3]:
    call overhead, burst, below which messages are short; ``sizes`` int64 [5]: experts E, bytes of
    a hidden state, route (position in ROUTES), offload, most GPUs of a server.
    """

    experts: Array
    first_row: Array
    prefill: Array
    decode: Array
    home: Array
    arrival_s: Array
    prompt: Array
    execution: Array
    concurrency: Array
    dense_gpu: Array
    gpu_start: Array
    server: Array
    seconds_per_byte: Array
    half_rtt_s: Array
    up_rate: Array
    down_rate: Array
    link_rank: Array
    kind: Array
    size: Array
    dense_s: Array
    expert_s: Array
    load_s: Array
    blocks: Array
    expert_bytes: Array
    rank: Array
    scalars: Array
    sizes: Array


class State(NamedTuple):
    """What a run writes.

    ``now`` [2]: the time, and when the latest migration was done. Heap: ``heap_s``, ``heap_key``
    (rank and number), ``heap_what`` (kind and subject). Requests [R]: ``at`` to
    ``next_waiting``, the last a list of those that wait at each server between ``head`` and
    ``tail`` [N]. Messages [M]: ``m_...``, ``m_work`` [M, GPUs of a server], -1 where a GPU has
    none; ``m_free`` those unused; ``m_next``, ``m_before`` [M, 2] link those that wait for an
    uplink, and for a downlink, between ``port_first`` and ``port_last`` [2, 2 N] of the port,
    of which those from N on are for short messages; ``port_until`` when a port is free.
    Holders: ``held`` [G, J], ``gpu_of`` [N, J] first GPU or -1, ``holder`` [J, N] servers
    ascending, ``copies`` [J]. Scratch of one routing: ``count`` and ``order`` [N, E],
    ``touched``, ``tokens_to``, ``goals``, ``mask`` [N], ``few`` [3, K], ``best`` [3, 2^K].
    Migration: ``step_...``. Offload: ``slot_...``, ``slot_of`` [N, J].
    The others are measurements named as in Outcome.
    """

    now: Array
    number: Array
    heap_s: Array
    heap_key: Array
    heap_what: Array
    at: Array
    row: Array
    tokens: Array
    left: Array
    decoding: Array
    layer: Array
    parts: Array
    began_s: Array
    remote: Array
    next_waiting: Array
    head: Array
    tail: Array
    active: Array
    present: Array
    present_since: Array
    present_s: Array
    gpu_free: Array
    load_free: Array
    port_busy: Array
    port_first: Array
    port_last: Array
    port_until: Array
    bucket: Array
    sent: Array
    held: Array
    gpu_of: Array
    holder: Array
    copies: Array
    m_request: Array
    m_layer: Array
    m_at: Array
    m_to: Array
    m_out: Array
    m_back: Array
    m_hop: Array
    m_returning: Array
    m_ready: Array
    m_next: Array
    m_before: Array
    m_work: Array
    m_free: Array
    count: Array
    order: Array
    touched: Array
    tokens_to: Array
    goals: Array
    mask: Array
    few: Array
    best: Array
    step_load: Array
    step_gpu: Array
    step_pair: Array
    step_lacking: Array
    step_start: Array
    step_next: Array
    step_queue: Array
    slot_first: Array
    slot_pair: Array
    slot_end: Array
    slot_gpu: Array
    slot_of: Array
    start_s: Array
    first_token_s: Array
    done_s: Array
    calls: Array
    remote_calls: Array
    steps: Array
    waiting: Array
    destinations: Array
    bytes_out: Array
    bytes_in: Array
    up_busy_s: Array
    down_busy_s: Array
    messages: Array
    gpu_busy_s: Array
    served: Array
    layer_steps: Array
    layer_s: Array
    called: Array
    log_s: Array
    log_what: Array


class Links(NamedTuple):
    """What transfers read and write: some arrays of `Fixed` and `State`, by the same names."""

    seconds_per_byte: Array
    half_rtt_s: Array
    up_rate: Array
    down_rate: Array
    scalars: Array
    rank: Array
    now: Array
    number: Array
    heap_s: Array
    heap_key: Array
    heap_what: Array
    port_busy: Array
    port_first: Array
    port_last: Array
    port_until: Array
    bucket: Array
    m_at: Array
    m_to: Array
    m_out: Array
    m_back: Array
    m_returning: Array
    m_ready: Array
    m_next: Array
    m_before: Array
    up_busy_s: Array
    down_busy_s: Array
    bytes_out: Array
    bytes_in: Array


def links(f: Fixed, s: State) -> Links:
    """The arrays of transfers."""
    return Links(*(getattr(f if name in Fixed._fields else s, name) for name in Links._fields))


def fixed(s: Scenario) -> Fixed:
    """The scenario as contiguous arrays of fixed kinds."""
    prompts = s.requests.prompts
    values = Fixed(
        experts=prompts.experts.astype(np.uint16, copy=False),
        first_row=prompts.first_row.astype(np.int64),
        prefill=prompts.prefill_tokens.astype(np.int32),
        decode=prompts.decode_tokens.astype(np.int32),
        home=s.requests.home.astype(np.int32),
        arrival_s=s.requests.arrival_s.astype(np.float64),
        prompt=s.requests.prompt.astype(np.int32),
        execution=s.execution.astype(np.int32),
        concurrency=np.array(s.concurrency, np.int64),
        dense_gpu=s.dense_gpu.astype(np.int32),
        gpu_start=s.gpu_start.astype(np.int32),
        server=s.placement.server_of_gpu.astype(np.int32),
        seconds_per_byte=s.network.seconds_per_byte,
        half_rtt_s=s.network.half_rtt_s,
        up_rate=s.network.up_bytes_per_s,
        down_rate=s.network.down_bytes_per_s,
        link_rank=s.network.link_rank(),
        kind=s.timing.kind.astype(np.int32),
        size=s.timing.size.astype(np.int32),
        dense_s=s.timing.dense_s,
        expert_s=s.timing.expert_s,
        load_s=s.timing.load_s,
        blocks=s.load_blocks_compute.astype(np.bool_),
        expert_bytes=np.array(s.model.expert_bytes_by_layer, np.int64),
        rank=RANK.astype(np.int64),
        scalars=np.array(
            [s.network.call_overhead_s, s.network.burst_bytes, s.network.short_bytes], np.float64
        ),
        sizes=np.array(
            [
                s.model.num_experts,
                s.network.token_bytes,
                ROUTES.index(s.route),
                int(s.offload),
                max(map(len, s.placement.gpu_capacity)),
            ],
            np.int64,
        ),
    )
    # one signature for all scenarios: contiguous, and read-only as the compiler sees them
    arrays = []
    for array in values:
        array = np.ascontiguousarray(array)
        if array.flags.writeable:
            array = array.view()
            array.setflags(write=False)
        arrays.append(array)
    return Fixed(*arrays)


def state(s: Scenario, *, log: bool) -> State:
    """Empty memory for a run: nothing has arrived, every queue is empty."""
    servers, layers = s.execution.shape
    experts, top_k = s.model.num_experts, s.model.top_k
    pairs = layers * experts
    gpus = len(s.timing.kind)
    requests = len(s.requests)
    room = 64 + 4 * servers
    most_gpus = max(map(len, s.placement.gpu_capacity))
    held = s.placement.on_gpu.reshape(gpus, pairs).copy()
    gpu_of, holder, copies = _holders(held, s.placement.server_of_gpu, servers)
    slots = _slots(s, held) if s.offload else _no_slots(servers)
    slot_of = np.full((servers, pairs if s.offload else 0), -1, np.int32)
    if s.offload:
        for n in range(servers):
            for i in range(int(slots[0][n]), int(slots[0][n + 1])):
                if slots[1][i] >= 0:
                    slot_of[n, slots[1][i]] = i
    bucket = np.zeros((4, servers))  # level and time, up and down
    bucket[0] = bucket[2] = s.network.burst_bytes
    i4, i8, f8 = np.int32, np.int64, np.float64
    number = np.zeros(NUMBERS, i8)
    number[FREE] = room
    return State(
        now=np.zeros(2),
        number=number,
        heap_s=np.empty(room, f8),
        heap_key=np.empty(room, i8),
        heap_what=np.empty(room, i8),
        at=np.zeros(requests, i4),
        row=np.zeros(requests, i8),
        tokens=np.zeros(requests, i4),
        left=np.zeros(requests, i4),
        decoding=np.zeros(requests, np.bool_),
        layer=np.zeros(requests, i4),
        parts=np.zeros(requests, i4),
        began_s=np.zeros(requests, f8),
        remote=np.zeros(requests, i4),
        next_waiting=np.full(requests, -1, i4),
        head=np.full(servers, -1, i4),
        tail=np.full(servers, -1, i4),
        active=np.zeros(servers, i8),
        present=np.zeros(servers, i8),
        present_since=np.zeros(servers, f8),
        present_s=np.zeros(servers, f8),
        gpu_free=np.zeros(gpus, f8),
        load_free=np.zeros(gpus, f8),
        port_busy=np.zeros((2, 2 * servers), np.bool_),
        port_first=np.full((2, 2 * servers), -1, i4),
        port_last=np.full((2, 2 * servers), -1, i4),
        port_until=np.zeros((2, 2 * servers)),
        bucket=bucket,
        sent=np.zeros((servers, servers), i8),
        held=held,
        gpu_of=gpu_of,
        holder=holder,
        copies=copies,
        m_request=np.zeros(room, i4),
        m_layer=np.zeros(room, i4),
        m_at=np.zeros(room, i4),
        m_to=np.zeros(room, i4),
        m_out=np.zeros(room, i8),
        m_back=np.zeros(room, i8),
        m_hop=np.zeros(room, np.bool_),
        m_returning=np.zeros(room, np.bool_),
        m_ready=np.zeros(room, i8),
        m_next=np.full((room, 2), -1, i4),
        m_before=np.full((room, 2), -1, i4),
        m_work=np.full((room, most_gpus), -1.0),
        m_free=np.arange(room, dtype=i4)[::-1].copy(),
        count=np.zeros((servers, experts), i4),
        order=np.zeros((servers, experts), i4),
        touched=np.zeros(servers, i4),
        tokens_to=np.zeros(servers, i4),
        goals=np.zeros(servers, i4),
        mask=np.zeros(servers, i8),
        few=np.zeros((3, max(top_k, 1)), i8),
        best=np.zeros((3, 1 << top_k if s.route == "cover" else 1), i8),
        **no_steps(),
        slot_first=slots[0],
        slot_pair=slots[1],
        slot_end=slots[2],
        slot_gpu=slots[3],
        slot_of=slot_of,
        start_s=np.full(requests, np.nan),
        first_token_s=np.full(requests, np.nan),
        done_s=np.full(requests, np.nan),
        calls=np.zeros(servers, i8),
        remote_calls=np.zeros(servers, i8),
        steps=np.zeros(servers, i8),
        waiting=np.zeros(servers, i8),
        destinations=np.zeros(servers, i8),
        bytes_out=np.zeros(servers, i8),
        bytes_in=np.zeros(servers, i8),
        up_busy_s=np.zeros(servers, f8),
        down_busy_s=np.zeros(servers, f8),
        messages=np.zeros((servers, servers), i8),
        gpu_busy_s=np.zeros(gpus, f8),
        served=np.zeros(gpus, i8),
        layer_steps=np.zeros(top_k + 1, i8),
        layer_s=np.zeros(top_k + 1, f8),
        called=np.zeros((servers, layers, experts), i8),
        log_s=np.zeros(1024 if log else 0, f8),
        log_what=np.zeros((1024 if log else 0, LOG_COLUMNS), i4),
    )


def no_steps() -> dict[str, Array]:
    """A migration of no steps."""
    return {
        "step_load": np.zeros(0, np.bool_),
        "step_gpu": np.zeros(0, np.int32),
        "step_pair": np.zeros(0, np.int64),
        "step_lacking": np.zeros(0, np.int32),
        "step_start": np.zeros(1, np.int64),
        "step_next": np.zeros(0, np.int32),
        "step_queue": np.zeros(0, np.int32),
    }


def _holders(held: Array, server: Array, servers: int) -> tuple[Array, Array, Array]:
    """First GPU of each server [N, J], holders [J, N] ascending and their number [J]."""
    gpus, pairs = held.shape
    gpu_of = np.full((servers, pairs), -1, np.int32)
    for g in range(gpus - 1, -1, -1):
        gpu_of[server[g], held[g]] = g
    local = gpu_of >= 0
    holder = np.argsort(~local.T, axis=1, kind="stable").astype(np.int32)
    return gpu_of, np.ascontiguousarray(holder), local.sum(axis=0).astype(np.int32)


def _slots(s: Scenario, held: Array) -> tuple[Array, Array, Array, Array]:
    """The slots of every server, GPU by GPU: where each server's begin, expert, last use, GPU."""
    first, pair, gpu_of = [0], [], []
    gpu = 0
    for capacities in s.placement.gpu_capacity:
        resident: set[int] = set()
        for capacity in capacities:
            experts = [p for p in np.flatnonzero(held[gpu]).tolist() if p not in resident]
            experts = experts[:capacity]
            resident.update(experts)
            pair += experts + [-1] * (capacity - len(experts))
            gpu_of += [gpu] * capacity
            gpu += 1
        first.append(len(pair))
    return (
        np.array(first, np.int64),
        np.array(pair, np.int64),
        np.where(np.array(pair) < 0, -2.0, -1.0),  # empty ones go first
        np.array(gpu_of, np.int32),
    )


def _no_slots(servers: int) -> tuple[Array, Array, Array, Array]:
    return (
        np.zeros(servers + 1, np.int64),
        np.zeros(0, np.int64),
        np.zeros(0),
        np.zeros(0, np.int32),
    )


def grown(s: State, which: str) -> State:
    """The same state with twice the room for events, messages or log lines."""
    if which == "heap":
        return s._replace(
            heap_s=_twice(s.heap_s), heap_key=_twice(s.heap_key), heap_what=_twice(s.heap_what)
        )
    if which == "log":
        return s._replace(log_s=_twice(s.log_s), log_what=_twice(s.log_what))
    old = len(s.m_request)
    names = ("m_request", "m_layer", "m_at", "m_to", "m_out", "m_back", "m_hop",
             "m_returning", "m_ready", "m_next", "m_before", "m_work")  # fmt: skip
    more = s._replace(**{name: _twice(getattr(s, name)) for name in names})
    more.m_work[old:] = -1.0
    more.m_next[old:] = more.m_before[old:] = -1
    free = np.empty(2 * old, np.int32)
    unused = int(s.number[FREE])
    free[:old] = np.arange(2 * old - 1, old - 1, -1)  # the new ones, below those on top
    free[old : old + unused] = s.m_free[:unused]
    s.number[FREE] = old + unused
    return more._replace(m_free=free)


def _twice(array: Array) -> Array:
    return np.concatenate([array, np.zeros_like(array)])
