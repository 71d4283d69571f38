"""The simulator in plain Python: the definition of what a run is.

It is written to be read; the compiled engine must equal it, event for event. Times are sums and
maxima of the scenario's tables, taken in one fixed order, so that both engines give the same
numbers to the last bit.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import TableChange
from prism_plan.migration_step import MigrationStep
from prism_plan.simulate import events
from prism_plan.simulate.engine_interface import Ints, Outcome, step_dependencies
from prism_plan.simulate.events import Event, Log
from prism_plan.simulate.network import BYTES_PER_CALL, BYTES_PER_TOKEN_ID
from prism_plan.simulate.offload_slots import Slot, initial_slots
from prism_plan.simulate.routing_policies import cover, nearest, spread
from prism_plan.simulate.scenario import Scenario


@dataclass
class ActiveRequest:
    """An admitted request: its location, and where it is in its steps and layers.

    ``table`` numbers the execution table that it was admitted with, ``executes_at`` [L] is its row
    of it. ``context`` counts the tokens before the step, ``ids_left`` those that are not yet at
    home.
    """

    number: int
    home: int
    table: int
    executes_at: list[int]
    location: int
    token_row: int
    step_tokens: int
    steps_left: int
    ids_left: int
    decoding: bool
    context: int = 0
    layer: int = 0
    pending_parts: int = 0
    layer_start_s: float = 0.0
    remote_experts: int = 0


@dataclass
class Message:
    """A call to another server, or another message between the servers that execute layers.

    Those are hidden states on their way to the next span, the ids of a prompt on their way to the
    first one, or the id of a new token. ``begins_pass``: the receiver begins a pass with it.
    ``calls`` has the experts that each token of a call needs at the receiver.
    """

    request: int
    layer: int
    at: int
    to: int
    message_bytes: int
    reply_bytes: int = 0
    gpu_work_s: dict[int, float] = field(default_factory=dict)
    calls: list[list[int]] = field(default_factory=list)
    kind: str = "call"
    begins_pass: bool = False
    returning: bool = False

    @property
    def ends(self) -> tuple[int, int]:
        """Sender and receiver of the transfer that is next or under way."""
        return (self.to, self.at) if self.returning else (self.at, self.to)

    @property
    def payload(self) -> int:
        """Bytes of that transfer."""
        return self.reply_bytes if self.returning else self.message_bytes


class ReferenceEngine:
    """See :class:`prism_plan.simulate.engine_interface.Engine`."""

    def __init__(self, scenario: Scenario, *, log: bool = False) -> None:
        self.scenario = scenario
        servers, layers = scenario.execution.shape
        experts = scenario.model.num_experts
        gpus = len(scenario.timing.kind)
        requests = len(scenario.requests)
        self.now = 0.0
        self._heap: list[tuple[float, int, int, int, Any]] = []
        self._num_pushed = 0
        self._processed = 0
        self._log: Log | None = [] if log else None
        # the placement
        self._gpu_holds = scenario.placement.on_gpu.reshape(gpus, -1).copy()
        self._server_of_gpu = scenario.placement.server_of_gpu.tolist()
        self._gpu_start = scenario.gpu_start.tolist()
        # requests at their home servers
        self._admission_queue: list[deque[int]] = [deque() for _ in range(servers)]
        self._num_active = [0] * servers
        self._admitted: dict[int, ActiveRequest] = {}
        self._num_present = [0] * servers
        self._present_since_s = [0.0] * servers
        # GPUs: when the compute queue and the load channel are free next
        self._gpu_free_s = [0.0] * gpus
        self._load_free_s = [0.0] * gpus
        # ports; in row 1 those of short messages
        self._up_busy = [[False] * servers for _ in range(2)]
        self._down_busy = [[False] * servers for _ in range(2)]
        self._up_free_s = [0.0] * servers  # when a long message releases the port
        self._down_free_s = [0.0] * servers
        self._waiting_messages: list[Message] = []  # in the order in which they were ready
        self._bucket = {
            port: [[scenario.network.burst_bytes, 0.0] for _ in range(servers)]
            for port in ("up", "down")
        }
        self._tokens_sent = [[0] * servers for _ in range(servers)]
        self._link_rank = scenario.network.link_rank().tolist()
        # execution tables by number; the last one is that of requests which are admitted now
        self._tables: list[npt.NDArray[np.int32]] = [scenario.execution]
        self._num_on_older_tables = 0
        self._change: TableChange | None = None  # one that has not begun
        self._waiting_steps: Sequence[int] = ()  # for requests on older tables
        # migration
        self._steps: Sequence[MigrationStep] = ()
        self._open_needs: list[int] = []
        self._dependents: list[list[int]] = []
        self._open_steps = 0
        self.migration_end_s = 0.0
        self._slots = initial_slots(scenario.placement) if scenario.offload else []
        # measurements
        self.start_s = np.full(requests, np.nan)
        self.first_token_s = np.full(requests, np.nan)
        self.done_s = np.full(requests, np.nan)
        self.calls, self.remote_calls, self.steps, self.waiting, self.destinations = (
            [0] * servers for _ in range(5)
        )
        self.present_s, self.up_busy_s, self.down_busy_s = ([0.0] * servers for _ in range(3))
        self.bytes_out, self.bytes_in = [0] * servers, [0] * servers
        self.messages = np.zeros((servers, servers), np.int64)
        self.hops = np.zeros((servers, servers), np.int64)
        self.gpu_busy_s, self.served = [0.0] * gpus, [0] * gpus
        self.layer_steps = [0] * (scenario.model.top_k + 1)
        self.layer_s = [0.0] * (scenario.model.top_k + 1)
        self.loads = 0
        self.loaded_bytes = 0
        self._recent_calls = np.zeros((servers, layers, experts), np.int64)
        self._num_arrived = 0
        self._num_finished = 0
        self._push_next_arrival()

    # ----------------------------------------------------------------------------------- the loop

    def advance(self, until_s: float = math.inf, max_events: int | None = None) -> bool:
        left = math.inf if max_events is None else max_events
        while self._heap and self._heap[0][0] <= until_s:
            if left <= 0:
                return False
            left -= 1
            self.now, _, _, kind, subject = heapq.heappop(self._heap)
            self._processed += 1
            self.process(kind, subject)
        if math.isfinite(until_s):
            self.now = max(self.now, until_s)
        return True

    def _push(self, time_s: float, kind: int, subject: Any) -> None:
        heapq.heappush(
            self._heap, (time_s, int(events.PRIORITY[kind]), self._num_pushed, kind, subject)
        )
        self._num_pushed += 1

    def _record(self, kind: int, subject: Any) -> None:
        """Write an event to the log, if there is one."""
        if self._log is not None:
            self._log.append(Event(self.now, kind, *self.where(kind, subject)))

    def process(self, kind: int, subject: Any) -> None:
        self._record(kind, subject)
        if kind == events.ARRIVAL:
            self._receive_request(subject)
        elif kind == events.DENSE:
            self._route(subject)
        elif kind == events.LOCAL:
            self._complete_part(subject)
        elif kind == events.SEND:
            self._start_or_enqueue(subject)
        elif kind == events.ARRIVED:
            self._receive(subject)
        elif kind == events.COMPUTED:
            subject.returning = True
            self._start_or_enqueue(subject)
        elif kind == events.RETURNED:
            self._complete_part(self._admitted[subject.request])
        elif kind == events.FREED:
            self._release_ports(subject)
        else:
            self.complete_load(subject)
        self._update_tables()

    def where(self, kind: int, subject: Any) -> tuple[int, int, int, int]:
        """Request, layer, at and to of an event for the log."""
        if kind == events.ARRIVAL:
            home = int(self.scenario.requests.home[subject])
            return subject, -1, home, home
        if kind == events.LOADED:
            gpu = self._steps[subject].gpu
            return -1, -1, self._server_of_gpu[gpu], gpu
        if kind in (events.DENSE, events.LOCAL):
            return subject.number, subject.layer, subject.location, subject.location
        return subject.request, subject.layer, subject.at, subject.to

    # ----------------------------------------------------------------------------------- requests

    def _push_next_arrival(self) -> None:
        """Push the next arrival, for arrivals are in the heap one at a time."""
        number = self._num_arrived
        if number < len(self.scenario.requests):
            self._push(float(self.scenario.requests.arrival_s[number]), events.ARRIVAL, number)
        self._num_arrived += 1

    def _receive_request(self, number: int) -> None:
        self._push_next_arrival()
        home = int(self.scenario.requests.home[number])
        self._count_present(home, 1)
        if self._num_active[home] < self.scenario.concurrency[home]:
            self._admit(number)
        else:
            self._admission_queue[home].append(number)

    def _count_present(self, home: int, change: int) -> None:
        passed = self.now - self._present_since_s[home]
        self.present_s[home] += self._num_present[home] * passed
        self._present_since_s[home] = self.now
        self._num_present[home] += change

    def _admit(self, number: int) -> None:
        prompts = self.scenario.requests.prompts
        prompt = int(self.scenario.requests.prompt[number])
        home = int(self.scenario.requests.home[number])
        prefill = int(prompts.prefill_tokens[prompt])
        decode = int(prompts.decode_tokens[prompt])
        self._num_active[home] += 1
        self.start_s[number] = self.now
        request = ActiveRequest(
            number=number,
            home=home,
            table=len(self._tables) - 1,
            executes_at=self._tables[-1][home].tolist(),
            location=home,
            token_row=int(prompts.first_row[prompt]),
            step_tokens=prefill or 1,
            steps_left=decode + (prefill > 0),
            ids_left=decode + (prefill > 0),
            decoding=prefill == 0,
        )
        self._admitted[number] = request
        first = request.executes_at[0]
        if first == home:
            self._begin_layer(request)
        else:
            payload = BYTES_PER_TOKEN_ID * request.step_tokens
            self._send_hop("start", request, -1, first, payload, begins_pass=True)

    def _begin_layer(self, request: ActiveRequest) -> None:
        request.layer_start_s = self.now
        self._enter_layer(request)

    def _enter_layer(self, request: ActiveRequest) -> None:
        """Move to where the layer executes and start its dense part."""
        scenario, layer = self.scenario, request.layer
        target = request.executes_at[layer]
        if request.location != target:
            payload = request.step_tokens * scenario.network.token_bytes
            self._send_hop("states", request, layer, target, payload)
            return
        gpu = int(scenario.dense_gpu[request.location])
        context = request.context if request.decoding else None
        work_s = scenario.timing.dense_s(gpu, layer, request.step_tokens, context)
        self._push(self._compute(gpu, work_s), events.DENSE, request)

    def _send_hop(
        self, kind: str, request: ActiveRequest, layer: int, to: int, payload: int, *,
        begins_pass: bool = False,
    ) -> None:  # fmt: skip
        """Send hidden states or token ids from where the request is (section 10, rule 5)."""
        at = request.location
        self.hops[at, to] += 1
        hop = Message(request.number, layer, at, to, payload, kind=kind, begins_pass=begins_pass)
        self._push(self.now + self.scenario.network.hop_overhead_s, events.SEND, hop)

    def _complete_part(self, request: ActiveRequest) -> None:
        request.pending_parts -= 1
        if request.pending_parts:
            return
        if request.decoding:
            self.layer_steps[request.remote_experts] += 1
            self.layer_s[request.remote_experts] += self.now - request.layer_start_s
        request.layer += 1
        if request.layer < self.scenario.model.num_layers:
            self._begin_layer(request)
        else:
            self._end_pass(request)

    def _end_pass(self, request: ActiveRequest) -> None:
        """The driver has made a token: its id begins the next pass, and goes home (rule 3)."""
        driver, home = request.location, request.home
        first = request.executes_at[0]
        id_layer = self.scenario.model.num_layers
        request.steps_left -= 1
        goes_on = request.steps_left > 0
        if goes_on:
            request.token_row += request.step_tokens
            request.context += request.step_tokens
            request.step_tokens = 1
            request.decoding = True
            request.layer = 0
            if first != driver:
                self._send_hop("id", request, id_layer, first, BYTES_PER_TOKEN_ID, begins_pass=True)
        if driver == home:
            self._deliver_id(request)
        elif not goes_on or first != home:
            self._send_hop("id", request, id_layer, home, BYTES_PER_TOKEN_ID)
        if goes_on and first == driver:
            self._begin_layer(request)

    def _deliver_id(self, request: ActiveRequest) -> None:
        """A token's id is at home; with the last one the request is answered (rule 4)."""
        number = request.number
        if math.isnan(self.first_token_s[number]):
            self.first_token_s[number] = self.now
        request.ids_left -= 1
        if request.ids_left:
            return
        self.done_s[number] = self.now
        self._num_finished += 1
        del self._admitted[number]
        home = request.home
        self._count_present(home, -1)
        self._num_active[home] -= 1
        if request.table != len(self._tables) - 1:
            self._num_on_older_tables -= 1
        if self._admission_queue[home]:
            self._admit(self._admission_queue[home].popleft())

    # ------------------------------------------------------------------------------------ routing

    def _route(self, request: ActiveRequest) -> None:
        """Send the calls of the step's tokens in the layer to where their experts are."""
        tokens = slice(request.token_row, request.token_row + request.step_tokens)
        rows = self.scenario.requests.prompts.experts[tokens, request.layer]
        self.start_calls(request, rows.tolist())

    def start_calls(
        self, request: ActiveRequest, tokens: list[list[int]], *, again: bool = False
    ) -> None:
        """Split calls by destination, start the local experts and send the messages.

        ``tokens`` has the experts that each token calls. Calls that are sent ``again`` count as
        messages alone: their step has been counted.
        """
        at, layer, home = request.location, request.layer, request.home
        first = layer * self.scenario.model.num_experts
        batches: dict[int, dict[int, int]] = {}  # server -> expert -> tokens, by first call
        sent: dict[int, list[list[int]]] = {}  # server -> the experts there of each token
        remote, waiting, destinations = 0, 0, 0
        for token in tokens:
            missing = []
            for e in token:
                if self.scenario.offload or self._first_gpu(at, first + e) >= 0:
                    batch = batches.setdefault(at, {})
                    batch[e] = batch.get(e, 0) + 1
                else:
                    missing.append(e)
            remote += len(missing)
            place = self._choose_holders(request.number, at, [first + e for e in missing])
            named: dict[int, list[int]] = {}
            for e, m in zip(missing, place, strict=True):
                batch = batches.setdefault(m, {})
                batch[e] = batch.get(e, 0) + 1
                named.setdefault(m, []).append(e)
            for m, experts in named.items():
                sent.setdefault(m, []).append(experts)
                self._tokens_sent[at][m] += 1
            waiting += bool(missing)
            destinations += len(named)
        if not again:
            for token in tokens:
                for e in token:
                    self._recent_calls[home, layer, e] += 1
            self.calls[home] += sum(map(len, tokens))
            self.remote_calls[home] += remote
            self.steps[home] += len(tokens)
            self.waiting[home] += waiting
            self.destinations[home] += destinations
            request.remote_experts = remote
        request.pending_parts += len(batches)
        if at in batches:
            if self.scenario.offload:
                end_s = self._compute_with_offload(at, layer, batches[at])
            else:
                end_s = self._compute_all(self._gpu_work_s(at, layer, batches[at]))
            self._push(end_s, events.LOCAL, request)
        for m in sorted(sent):
            states = len(sent[m]) * self.scenario.network.token_bytes
            message = Message(
                request=request.number,
                layer=layer,
                at=at,
                to=m,
                message_bytes=states + BYTES_PER_CALL * sum(map(len, sent[m])),
                reply_bytes=states,
                gpu_work_s=self._gpu_work_s(m, layer, batches[m]),
                calls=sent[m],
            )
            self.messages[at, m] += 1
            self._push(self.now + self.scenario.network.call_overhead_s, events.SEND, message)

    def _choose_holders(self, number: int, at: int, pairs: list[int]) -> list[int]:
        holders = [self._holders(pair) for pair in pairs]
        if self.scenario.route == "spread":
            return [spread(number, p, held) for p, held in zip(pairs, holders, strict=True)]
        if self.scenario.route == "nearest":
            return [nearest(self._link_rank[at], held) for held in holders]
        return cover(holders, self._tokens_sent[at])

    def _first_gpu(self, server: int, pair: int) -> int:
        """The first GPU of the server that holds the expert, or -1."""
        for gpu in range(self._gpu_start[server], self._gpu_start[server + 1]):
            if self._gpu_holds[gpu, pair]:
                return gpu
        return -1

    def _holders(self, pair: int) -> list[int]:
        return sorted({self._server_of_gpu[g] for g in np.flatnonzero(self._gpu_holds[:, pair])})

    def _gpu_work_s(self, server: int, layer: int, batch: dict[int, int]) -> dict[int, float]:
        """Seconds of work on each GPU of a server, added in the order of first calls."""
        work_s: dict[int, float] = {}
        for e, tokens in batch.items():
            gpu = self._first_gpu(server, layer * self.scenario.model.num_experts + e)
            work_s[gpu] = work_s.get(gpu, 0.0) + self._expert_s(gpu, layer, tokens)
            self.served[gpu] += tokens
        return work_s

    def _expert_s(self, gpu: int, layer: int, tokens: int) -> float:
        timing = self.scenario.timing
        return float(timing.expert_s[timing.kind[gpu], timing.size[layer], tokens])

    def _compute(self, gpu: int, work_s: float, earliest_s: float | None = None) -> float:
        """Queue work on a GPU, to start now or at ``earliest_s``; returns its end."""
        end_s = max(self.now if earliest_s is None else earliest_s, self._gpu_free_s[gpu]) + work_s
        self._gpu_free_s[gpu] = end_s
        self.gpu_busy_s[gpu] += work_s
        return end_s

    def _compute_all(self, gpu_work_s: dict[int, float]) -> float:
        """Queue work on the GPUs of a server; returns the end of the last."""
        return max(self._compute(gpu, work_s) for gpu, work_s in sorted(gpu_work_s.items()))

    def _load(self, gpu: int, layer: int, earliest_s: float) -> float:
        """Queue a load of an expert on the load channel of a GPU; returns its end."""
        load_s = float(self.scenario.timing.load_s[gpu, layer])
        start_s = max(earliest_s, self._load_free_s[gpu])
        if self.scenario.load_blocks_compute[gpu]:
            start_s = max(start_s, self._gpu_free_s[gpu])
            self._gpu_free_s[gpu] = start_s + load_s
            self.gpu_busy_s[gpu] += load_s
        self._load_free_s[gpu] = start_s + load_s
        self.loads += 1
        self.loaded_bytes += self.scenario.model.expert_bytes_by_layer[layer]
        return start_s + load_s

    # ----------------------------------------------------------------------------------- messages

    def _start_or_enqueue(self, message: Message) -> None:
        """Acquire the sender's uplink and the receiver's downlink together, or wait for both.

        Of the waiting messages, the one that was ready first starts when both are free; one that
        cannot start yet does not block those behind it. Short and long messages wait apart.
        """
        a, b = message.ends
        payload = message.payload
        short = int(payload < self.scenario.network.short_bytes)
        if self._up_busy[short][a] or self._down_busy[short][b]:
            self._waiting_messages.append(message)
            return
        self._up_busy[short][a] = self._down_busy[short][b] = True
        alone = not (self._up_busy[1 - short][a] or self._down_busy[1 - short][b])
        held_s = self._hold_time_s(a, b, payload, alone=alone)
        self.up_busy_s[a] += held_s
        self.down_busy_s[b] += held_s
        self.bytes_out[a] += payload
        self.bytes_in[b] += payload
        end_s = self.now + held_s
        arrival_s = end_s + float(self.scenario.network.half_rtt_s[a, b])
        if short:
            arrival_s += self._long_message_delay_s(a, b)
        else:
            self._up_free_s[a] = self._down_free_s[b] = end_s
        self._push(end_s, events.FREED, message)
        self._push(arrival_s, events.RETURNED if message.returning else events.ARRIVED, message)

    def _long_message_delay_s(self, a: int, b: int) -> float:
        """Seconds by which the long messages under way on the same lines delay a short one."""
        left_s = 0.0
        if self._up_busy[0][a]:
            left_s = self._up_free_s[a] - self.now
        if self._down_busy[0][b]:
            left_s = max(left_s, self._down_free_s[b] - self.now)
        network = self.scenario.network
        return min(left_s, network.short_bytes * float(network.seconds_per_byte[a, b]))

    def _hold_time_s(self, a: int, b: int, payload: int, *, alone: bool) -> float:
        """Seconds for which a transfer that starts now holds its ports.

        Only one that is ``alone`` on both lines may use what is in the token buckets.
        """
        network = self.scenario.network
        per_byte = float(network.seconds_per_byte[a, b])
        if network.burst_bytes == 0 or not alone:
            return payload * per_byte
        ports = (
            (self._bucket["up"][a], float(network.up_bytes_per_s[a])),
            (self._bucket["down"][b], float(network.down_bytes_per_s[b])),
        )
        for bucket, rate in ports:
            level, since_s = bucket
            bucket[0] = min(network.burst_bytes, level + (self.now - since_s) * rate)
        unshaped = min(ports[0][0][0], ports[1][0][0], float(payload))
        held_s = (payload - unshaped) * per_byte
        for bucket, rate in ports:
            level = bucket[0] + held_s * rate - payload
            bucket[0] = min(network.burst_bytes, max(0.0, level))
            bucket[1] = self.now + held_s
        return held_s

    def _release_ports(self, message: Message) -> None:
        a, b = message.ends
        short = int(message.payload < self.scenario.network.short_bytes)
        self._up_busy[short][a] = self._down_busy[short][b] = False
        waiting, self._waiting_messages = self._waiting_messages, []
        for other in waiting:
            self._start_or_enqueue(other)

    def _receive(self, message: Message) -> None:
        if message.kind == "call":
            self._push(self._compute_all(message.gpu_work_s), events.COMPUTED, message)
            return
        request = self._admitted[message.request]
        if message.kind == "id" and message.to == request.home:
            self._deliver_id(request)
        if message.begins_pass:
            request.location = message.to
            self._begin_layer(request)
        elif message.kind == "states":
            request.location = message.to
            self._enter_layer(request)

    # ------------------------------------------------------------------------------------ offload

    def _compute_with_offload(self, at: int, layer: int, batch: dict[int, int]) -> float:
        """Compute resident experts, then load and compute the others, in the order of their calls.

        A load takes the slot whose last use ended first (empty ones first, then lowest slot) and
        starts when that use has ended and the load channel is free; its work keeps its place in
        the GPU's queue.
        """
        slots = self._slots[at]
        first = layer * self.scenario.model.num_experts
        resident = {slot.pair: i for i, slot in enumerate(slots) if slot.pair >= 0}
        ends = []
        loads_last = sorted(batch, key=lambda e: first + e not in resident)
        for e in loads_last:
            if first + e in resident:
                i, earliest_s = resident[first + e], self.now
            else:
                i = min(range(len(slots)), key=lambda i: slots[i].used_s)
                earliest_s = max(self.now, slots[i].used_s)
                earliest_s = self._load(slots[i].gpu, layer, earliest_s)
            gpu = slots[i].gpu
            work_s = self._expert_s(gpu, layer, batch[e])
            slots[i] = Slot(first + e, self._compute(gpu, work_s, earliest_s), gpu)
            self.served[gpu] += batch[e]
            ends.append(slots[i].used_s)
        return max(ends)

    # ---------------------------------------------------------------------------------- migration

    def migrate(self, steps: Sequence[MigrationStep], change: TableChange | None = None) -> None:
        if self.migrating:
            raise ValueError("a migration is still under way")
        if self.scenario.offload:
            raise ValueError("offloading servers keep what they use; there is nothing to migrate")
        self._begin_migration(steps, change)
        self._update_tables()

    def _begin_migration(self, steps: Sequence[MigrationStep], change: TableChange | None) -> None:
        self._steps = steps
        self._open_needs, self._dependents = self.dependencies(steps, change)
        self._open_steps = len(steps)
        if not steps:
            self.migration_end_s = self.now
        if change is not None:
            self._change = change
            self._waiting_steps = range(change.waits_from, len(steps))
        self._start_steps(deque(i for i, needs in enumerate(self._open_needs) if needs == 0))

    def dependencies(
        self, steps: Sequence[MigrationStep], change: TableChange | None
    ) -> tuple[list[int], list[list[int]]]:
        return step_dependencies(steps, change)

    def _update_tables(self) -> None:
        """Begin the next execution table if its steps are complete, and start steps that waited."""
        change = self._change
        if change is not None and len(self._steps) - self._open_steps >= change.begins_after:
            self._change = None
            if not np.array_equal(change.execution, self._tables[-1]):
                self._tables.append(change.execution.astype(np.int32))
                self._num_on_older_tables = len(self._admitted)
        if self._change is None and self._num_on_older_tables == 0:
            waiting, self._waiting_steps = self._waiting_steps, ()
            self._start_steps(deque(self._meet_need(waiting)))

    def _start_steps(self, ready: deque[int]) -> None:
        """Start the ready steps and those that their drops make ready, first come first served."""
        while ready:
            index = ready.popleft()
            step = self._steps[index]
            if step.kind == "load":
                layer = step.pair // self.scenario.model.num_experts
                self._push(self._load(step.gpu, layer, self.now), events.LOADED, index)
                continue
            self._gpu_holds[step.gpu, step.pair] = False
            if not self._gpu_holds[:, step.pair].any():
                raise ValueError(f"step {index} drops the only copy of pair {step.pair}")
            ready.extend(self._complete_step(index))

    def complete_load(self, index: int) -> None:
        step = self._steps[index]
        self._gpu_holds[step.gpu, step.pair] = True
        self._start_steps(deque(self._complete_step(index)))

    def _complete_step(self, index: int) -> list[int]:
        """Mark a step complete; returns the steps whose last open need it was."""
        self._open_steps -= 1
        if not self._open_steps:
            self.migration_end_s = self.now
        return self._meet_need(self._dependents[index])

    def _meet_need(self, steps: Sequence[int]) -> list[int]:
        """Count one open need of each of these steps as met; returns those that had no other."""
        ready = []
        for index in steps:
            self._open_needs[index] -= 1
            if self._open_needs[index] == 0:
                ready.append(index)
        return ready

    # --------------------------------------------------------------------------------- the protocol

    @property
    def all_finished(self) -> bool:
        return self._num_finished == len(self.scenario.requests)

    @property
    def num_finished(self) -> int:
        return self._num_finished

    @property
    def migrating(self) -> bool:
        return self._open_steps > 0

    def tables_in_use(self) -> npt.NDArray[np.int32]:
        numbers = {request.table for request in self._admitted.values()} | {len(self._tables) - 1}
        return np.stack([self._tables[number] for number in sorted(numbers, reverse=True)])

    def take_calls(self) -> Ints:
        taken = self._recent_calls.copy()
        self._recent_calls[:] = 0
        return taken

    def on_gpu(self) -> npt.NDArray[np.bool_]:
        return self._gpu_holds.reshape(self.scenario.placement.on_gpu.shape).copy()

    def log(self) -> Log:
        return list(self._log or ())

    def outcome(self) -> Outcome:
        for home in range(len(self._num_present)):
            self._count_present(home, 0)
        scalars = ("loads", "loaded_bytes", "events", "now_s")
        measured = [f.name for f in dataclasses.fields(Outcome) if f.name not in scalars]
        return Outcome(
            **{name: np.array(getattr(self, name)) for name in measured},
            loads=self.loads,
            loaded_bytes=self.loaded_bytes,
            events=self._processed,
            now_s=self.now,
        )
