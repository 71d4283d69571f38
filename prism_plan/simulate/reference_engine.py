"""The simulator in plain Python: the definition of what a run is.

It is written to be read, and the compiled engine must equal it, event for event. Times are sums
and maxima of the scenario's tables, taken in one fixed order, so that both engines give the same
numbers to the last bit.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.migration_step import MigrationStep
from prism_plan.simulate import events
from prism_plan.simulate.engine import Ints, Outcome
from prism_plan.simulate.events import Event, Log
from prism_plan.simulate.network import BYTES_PER_CALL
from prism_plan.simulate.routing_policies import cover, nearest, spread
from prism_plan.simulate.scenario import Scenario


@dataclass
class _Running:
    """A request that has been admitted: where it is in its steps and layers."""

    number: int
    home: int
    at: int
    row: int
    tokens: int
    steps_left: int
    decode: bool
    layer: int = 0
    parts: int = 0
    layer_began_s: float = 0.0
    remote: int = 0


@dataclass
class _Message:
    """A call to another server, or (``hop``) the hidden states of a step on their way."""

    request: int
    layer: int
    at: int
    to: int
    out_bytes: int
    back_bytes: int = 0
    jobs: dict[int, float] = field(default_factory=dict)
    hop: bool = False
    back: bool = False

    @property
    def ends(self) -> tuple[int, int]:
        """Sender and receiver of the transfer that is next or under way."""
        return (self.to, self.at) if self.back else (self.at, self.to)


class ReferenceEngine:
    """See :class:`prism_plan.simulate.engine.Engine`."""

    def __init__(self, scenario: Scenario, *, log: bool = False) -> None:
        self.s = scenario
        servers, layers = scenario.execution.shape
        experts = scenario.model.num_experts
        gpus = len(scenario.timing.kind)
        requests = len(scenario.requests)
        self.now = 0.0
        self._heap: list[tuple[float, int, int, int, object]] = []
        self._pushed = 0
        self._taken = 0
        self._log: Log | None = [] if log else None
        # what is where
        self._held = scenario.placement.on_gpu.reshape(gpus, -1).copy()
        self._server_of_gpu = scenario.placement.server_of_gpu.tolist()
        self._gpu_start = scenario.gpu_start.tolist()
        # servers
        self._queue: list[deque[int]] = [deque() for _ in range(servers)]
        self._active = [0] * servers
        self._running: dict[int, _Running] = {}
        self._present = [0] * servers
        self._present_since = [0.0] * servers
        # work and links: when each is free next
        self._gpu_free = [0.0] * gpus
        self._load_free = [0.0] * gpus
        # the second row of each: short messages have ports of their own
        self._up_busy = [[False] * servers for _ in range(2)]
        self._down_busy = [[False] * servers for _ in range(2)]
        self._up_until = [0.0] * servers  # of long ones
        self._down_until = [0.0] * servers
        self._waiting: list[_Message] = []  # for links, in the order in which they were ready
        self._bucket = {
            port: [[scenario.network.burst_bytes, 0.0] for _ in range(servers)]
            for port in ("up", "down")
        }
        self._sent = [[0] * servers for _ in range(servers)]
        self._rank = scenario.network.link_rank().tolist()
        # migration
        self._steps: Sequence[MigrationStep] = ()
        self._lacking: list[int] = []
        self._dependents: list[list[int]] = []
        self._open_steps = 0
        self.migrated_s = 0.0
        # the slots of `offload`: (expert or -1, end of its last use, GPU) in order of the GPUs
        self._slots: list[list[list[float]]] = []
        if scenario.offload:
            self._fill_slots()
        # what is measured
        self.start_s = np.full(requests, np.nan)
        self.first_token_s = np.full(requests, np.nan)
        self.done_s = np.full(requests, np.nan)
        self.calls, self.remote_calls, self.steps, self.waiting, self.destinations = (
            [0] * servers for _ in range(5)
        )
        self.present_s, self.up_busy_s, self.down_busy_s = ([0.0] * servers for _ in range(3))
        self.bytes_out, self.bytes_in = [0] * servers, [0] * servers
        self.messages = np.zeros((servers, servers), np.int64)
        self.gpu_busy_s, self.served = [0.0] * gpus, [0] * gpus
        self.layer_steps = [0] * (scenario.model.top_k + 1)
        self.layer_s = [0.0] * (scenario.model.top_k + 1)
        self.loads = 0
        self.loaded_bytes = 0
        self._calls = np.zeros((servers, layers, experts), np.int64)
        self._arrived = 0
        self._finished = 0
        self._next_arrival()

    # ----------------------------------------------------------------------------------- the loop

    def advance(self, until_s: float = math.inf, max_events: int | None = None) -> bool:
        left = math.inf if max_events is None else max_events
        while self._heap and self._heap[0][0] <= until_s:
            if left <= 0:
                return False
            left -= 1
            self.now, _, _, kind, subject = heapq.heappop(self._heap)
            self._taken += 1
            self._take(kind, subject)
        if math.isfinite(until_s):
            self.now = max(self.now, until_s)
        return True

    def _push(self, time_s: float, kind: int, subject: object) -> None:
        heapq.heappush(self._heap, (time_s, int(events.RANK[kind]), self._pushed, kind, subject))
        self._pushed += 1

    def _take(self, kind: int, subject: object) -> None:
        if isinstance(subject, _Message):
            where = (subject.request, subject.layer, subject.at, subject.to)
        elif kind == events.ARRIVAL:
            assert isinstance(subject, int)
            home = int(self.s.requests.home[subject])
            where = (subject, -1, home, home)
        elif kind == events.LOADED:
            assert isinstance(subject, int)
            gpu = self._steps[subject].gpu
            where = (-1, -1, self._server_of_gpu[gpu], gpu)
        else:
            assert isinstance(subject, _Running)
            where = (subject.number, subject.layer, subject.at, subject.at)
        if self._log is not None:
            self._log.append(Event(self.now, kind, *where))
        if kind == events.ARRIVAL:
            self._arrive(subject)  # type: ignore[arg-type]
        elif kind == events.DENSE:
            self._route(subject)  # type: ignore[arg-type]
        elif kind == events.LOCAL:
            self._part_done(subject)  # type: ignore[arg-type]
        elif kind == events.SEND:
            self._begin_transfer(subject)  # type: ignore[arg-type]
        elif kind == events.ARRIVED:
            self._serve(subject)  # type: ignore[arg-type]
        elif kind == events.COMPUTED:
            assert isinstance(subject, _Message)
            subject.back = True
            self._begin_transfer(subject)
        elif kind == events.RETURNED:
            assert isinstance(subject, _Message)
            self._part_done(self._running[subject.request])
        elif kind == events.FREED:
            self._freed(subject)  # type: ignore[arg-type]
        else:
            self._loaded(subject)  # type: ignore[arg-type]

    # ----------------------------------------------------------------------------------- requests

    def _next_arrival(self) -> None:
        """Arrivals are in the heap one at a time."""
        number = self._arrived
        if number < len(self.s.requests):
            self._push(float(self.s.requests.arrival_s[number]), events.ARRIVAL, number)
        self._arrived += 1

    def _arrive(self, number: int) -> None:
        self._next_arrival()
        home = int(self.s.requests.home[number])
        self._count_present(home, 1)
        if self._active[home] < self.s.concurrency[home]:
            self._admit(number)
        else:
            self._queue[home].append(number)

    def _count_present(self, home: int, change: int) -> None:
        passed = self.now - self._present_since[home]
        self.present_s[home] += self._present[home] * passed
        self._present_since[home] = self.now
        self._present[home] += change

    def _admit(self, number: int) -> None:
        prompts = self.s.requests.prompts
        prompt = int(self.s.requests.prompt[number])
        home = int(self.s.requests.home[number])
        prefill = int(prompts.prefill_tokens[prompt])
        decode = int(prompts.decode_tokens[prompt])
        self._active[home] += 1
        self.start_s[number] = self.now
        request = _Running(
            number=number,
            home=home,
            at=home,
            row=int(prompts.first_row[prompt]),
            tokens=prefill or 1,
            steps_left=decode + (prefill > 0),
            decode=prefill == 0,
        )
        self._running[number] = request
        self._begin_layer(request)

    def _begin_layer(self, request: _Running) -> None:
        request.layer_began_s = self.now
        self._go_on(request)

    def _go_on(self, request: _Running) -> None:
        """Be where the layer executes; then the dense part begins, or the step is over."""
        home_again = request.layer == self.s.model.num_layers
        target = request.home if home_again else int(self.s.execution[request.home, request.layer])
        if request.at != target:
            payload = request.tokens * self.s.network.token_bytes
            hop = _Message(request.number, request.layer, request.at, target, payload, hop=True)
            self._push(self.now + self.s.network.call_overhead_s, events.SEND, hop)
        elif home_again:
            self._end_step(request)
        else:
            gpu = int(self.s.dense_gpu[request.at])
            work_s = float(self.s.timing.dense_s[self.s.timing.kind[gpu], request.tokens])
            self._push(self._work(gpu, work_s), events.DENSE, request)

    def _part_done(self, request: _Running) -> None:
        request.parts -= 1
        if request.parts:
            return
        if request.decode:
            self.layer_steps[request.remote] += 1
            self.layer_s[request.remote] += self.now - request.layer_began_s
        request.layer += 1
        self._begin_layer(request)

    def _end_step(self, request: _Running) -> None:
        number = request.number
        if math.isnan(self.first_token_s[number]):
            self.first_token_s[number] = self.now
        request.steps_left -= 1
        if request.steps_left:
            request.row += request.tokens
            request.tokens = 1
            request.decode = True
            request.layer = 0
            self._begin_layer(request)
            return
        self.done_s[number] = self.now
        self._finished += 1
        del self._running[number]
        home = request.home
        self._count_present(home, -1)
        self._active[home] -= 1
        if self._queue[home]:
            self._admit(self._queue[home].popleft())

    # ------------------------------------------------------------------------------------ routing

    def _route(self, request: _Running) -> None:
        """Split the step's tokens by destination, begin local work and send the messages."""
        at, layer = request.at, request.layer
        experts = self.s.model.num_experts
        first = layer * experts
        rows = self.s.requests.prompts.experts[request.row : request.row + request.tokens, layer]
        batches: dict[int, dict[int, int]] = {}  # server -> expert -> tokens, by first call
        tokens_to: dict[int, int] = {}
        remote = 0
        for token in rows.tolist():
            missing = []
            for e in token:
                self._calls[request.home, layer, e] += 1
                if self.s.offload or self._gpu_of(at, first + e) >= 0:
                    of = batches.setdefault(at, {})
                    of[e] = of.get(e, 0) + 1
                else:
                    missing.append(e)
            remote += len(missing)
            place = self._place(request.number, at, [first + e for e in missing])
            for e, m in zip(missing, place, strict=True):
                of = batches.setdefault(m, {})
                of[e] = of.get(e, 0) + 1
            for m in set(place):
                tokens_to[m] = tokens_to.get(m, 0) + 1
                self._sent[at][m] += 1
            self.waiting[request.home] += bool(missing)
            self.destinations[request.home] += len(set(place))
        self.calls[request.home] += rows.size
        self.remote_calls[request.home] += remote
        self.steps[request.home] += len(rows)
        request.remote = remote
        request.parts = len(batches)
        if at in batches:
            if self.s.offload:
                end_s = self._offloaded(at, layer, batches[at])
            else:
                jobs = self._jobs(at, layer, batches[at])
                end_s = max(self._work(gpu, work_s) for gpu, work_s in sorted(jobs.items()))
            self._push(end_s, events.LOCAL, request)
        for m in sorted(tokens_to):
            named = sum(batches[m].values())
            states = tokens_to[m] * self.s.network.token_bytes
            message = _Message(
                request=request.number,
                layer=layer,
                at=at,
                to=m,
                out_bytes=states + BYTES_PER_CALL * named,
                back_bytes=states,
                jobs=self._jobs(m, layer, batches[m]),
            )
            self.messages[at, m] += 1
            self._push(self.now + self.s.network.call_overhead_s, events.SEND, message)

    def _place(self, number: int, at: int, pairs: list[int]) -> list[int]:
        holders = [self._holders(pair) for pair in pairs]
        if self.s.route == "spread":
            return [spread(number, p, held) for p, held in zip(pairs, holders, strict=True)]
        if self.s.route == "nearest":
            return [nearest(self._rank[at], held) for held in holders]
        return cover(holders, self._sent[at])

    def _gpu_of(self, server: int, pair: int) -> int:
        """The first GPU of the server that holds the expert, or -1."""
        for gpu in range(self._gpu_start[server], self._gpu_start[server + 1]):
            if self._held[gpu, pair]:
                return gpu
        return -1

    def _holders(self, pair: int) -> list[int]:
        return sorted({self._server_of_gpu[g] for g in np.flatnonzero(self._held[:, pair])})

    def _jobs(self, server: int, layer: int, batch: dict[int, int]) -> dict[int, float]:
        """Seconds of work on each GPU of a server, experts in the order of their first call."""
        jobs: dict[int, float] = {}
        for e, tokens in batch.items():
            gpu = self._gpu_of(server, layer * self.s.model.num_experts + e)
            jobs[gpu] = jobs.get(gpu, 0.0) + self._expert_s(gpu, layer, tokens)
            self.served[gpu] += tokens
        return jobs

    def _expert_s(self, gpu: int, layer: int, tokens: int) -> float:
        timing = self.s.timing
        return float(timing.expert_s[timing.kind[gpu], timing.size[layer], tokens])

    def _work(self, gpu: int, work_s: float) -> float:
        """Queue work on a GPU now; returns its end."""
        end_s = max(self.now, self._gpu_free[gpu]) + work_s
        self._gpu_free[gpu] = end_s
        self.gpu_busy_s[gpu] += work_s
        return end_s

    # ----------------------------------------------------------------------------------- messages

    def _begin_transfer(self, message: _Message) -> None:
        """Hold the sender's uplink and the receiver's downlink together, or wait for both.

        Of the messages that wait, the one that was ready first begins when both are free; one that
        cannot begin yet does not hold up those behind it. Short ones and long ones wait apart.
        """
        a, b = message.ends
        payload = message.back_bytes if message.back else message.out_bytes
        short = int(payload < self.s.network.short_bytes)
        if self._up_busy[short][a] or self._down_busy[short][b]:
            self._waiting.append(message)
            return
        self._up_busy[short][a] = self._down_busy[short][b] = True
        alone = not (self._up_busy[1 - short][a] or self._down_busy[1 - short][b])
        held_s = self._held_s(a, b, payload, alone=alone)
        self.up_busy_s[a] += held_s
        self.down_busy_s[b] += held_s
        self.bytes_out[a] += payload
        self.bytes_in[b] += payload
        end_s = self.now + held_s
        there_s = end_s + float(self.s.network.half_rtt_s[a, b])
        if short:
            there_s += self._passing_s(a, b)
        else:
            self._up_until[a] = self._down_until[b] = end_s
        self._push(end_s, events.FREED, message)
        self._push(there_s, events.RETURNED if message.back else events.ARRIVED, message)

    def _passing_s(self, a: int, b: int) -> float:
        """How long a short message is delayed by the long ones that are under way beside it."""
        left_s = 0.0
        if self._up_busy[0][a]:
            left_s = self._up_until[a] - self.now
        if self._down_busy[0][b]:
            left_s = max(left_s, self._down_until[b] - self.now)
        network = self.s.network
        return min(left_s, network.short_bytes * float(network.seconds_per_byte[a, b]))

    def _held_s(self, a: int, b: int, payload: int, *, alone: bool) -> float:
        """How long a transfer that begins now holds the links, ``alone`` or beside another."""
        network = self.s.network
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

    def _freed(self, message: _Message) -> None:
        a, b = message.ends
        payload = message.back_bytes if message.back else message.out_bytes
        short = int(payload < self.s.network.short_bytes)
        self._up_busy[short][a] = self._down_busy[short][b] = False
        waiting, self._waiting = self._waiting, []
        for other in waiting:
            self._begin_transfer(other)  # or wait on

    def _serve(self, message: _Message) -> None:
        if message.hop:
            request = self._running[message.request]
            request.at = message.to
            self._go_on(request)
            return
        end_s = max(self._work(gpu, work_s) for gpu, work_s in sorted(message.jobs.items()))
        self._push(end_s, events.COMPUTED, message)

    # ------------------------------------------------------------------------------------ offload

    def _fill_slots(self) -> None:
        """Give every server its slots, GPU by GPU, with the experts of the placement in them.

        A second copy on one server would never be used: its slot begins empty.
        """
        gpu = 0
        for capacities in self.s.placement.gpu_capacity:
            slots: list[list[float]] = []
            resident: set[int] = set()
            for capacity in capacities:
                held = [p for p in np.flatnonzero(self._held[gpu]).tolist() if p not in resident]
                held = held[:capacity]
                resident.update(held)
                slots += [[pair, -1.0, gpu] for pair in held]
                slots += [[-1, -2.0, gpu] for _ in range(capacity - len(held))]  # before all others
                gpu += 1
            self._slots.append(slots)

    def _offloaded(self, at: int, layer: int, batch: dict[int, int]) -> float:
        """Compute resident experts, then load and compute the others, in the order of their calls.

        A load takes the slot whose last use ended first (empty ones first, then lowest slot) and
        begins when that use has ended and the load channel is free; its work keeps its place in
        the GPU's queue.
        """
        slots = self._slots[at]
        first = layer * self.s.model.num_experts
        where = {int(pair): i for i, (pair, _, _) in enumerate(slots) if pair >= 0}
        ends = []
        for e, tokens in batch.items():
            if first + e in where:
                slot = slots[where[first + e]]
                gpu = int(slot[2])
                slot[1] = self._work(gpu, self._expert_s(gpu, layer, tokens))
                self.served[gpu] += tokens
                ends.append(slot[1])
        for e, tokens in batch.items():
            if first + e in where:
                continue
            slot = min(slots, key=lambda s: s[1])
            gpu = int(slot[2])
            begin_s = max(self.now, self._load_free[gpu], slot[1])
            load_s = float(self.s.timing.load_s[gpu, layer])
            if self.s.load_blocks_compute[gpu]:
                begin_s = max(begin_s, self._gpu_free[gpu])
                self._gpu_free[gpu] = begin_s + load_s
                self.gpu_busy_s[gpu] += load_s
            loaded_s = begin_s + load_s
            self._load_free[gpu] = loaded_s
            work_s = self._expert_s(gpu, layer, tokens)
            end_s = max(loaded_s, self._gpu_free[gpu]) + work_s
            self._gpu_free[gpu] = end_s
            self.gpu_busy_s[gpu] += work_s
            self.served[gpu] += tokens
            slot[0], slot[1] = first + e, end_s
            ends.append(end_s)
            self.loads += 1
            self.loaded_bytes += self.s.model.expert_bytes_by_layer[layer]
        return max(ends)

    # ---------------------------------------------------------------------------------- migration

    def migrate(self, steps: Sequence[MigrationStep]) -> None:
        if self.migrating:
            raise ValueError("a migration is still under way")
        if self.s.offload:
            raise ValueError("offloading servers keep what they use; there is nothing to migrate")
        self._steps = steps
        self._lacking = [len(set(step.needs)) for step in steps]
        self._dependents = [[] for _ in steps]
        for index, step in enumerate(steps):
            for need in set(step.needs):
                self._dependents[need].append(index)
        self._open_steps = len(steps)
        self._begin(deque(i for i, lacking in enumerate(self._lacking) if lacking == 0))

    def _begin(self, ready: deque[int]) -> None:
        """Begin the steps that may begin, and those that may after a drop, first come first."""
        while ready:
            index = ready.popleft()
            step = self._steps[index]
            if step.kind == "load":
                self._begin_load(index, step)
                continue
            self._held[step.gpu, step.pair] = False
            if not self._held[:, step.pair].any():
                raise ValueError(f"step {index} drops the only copy of pair {step.pair}")
            ready.extend(self._step_over(index))

    def _begin_load(self, index: int, step: MigrationStep) -> None:
        layer = step.pair // self.s.model.num_experts
        begin_s = max(self.now, self._load_free[step.gpu])
        load_s = float(self.s.timing.load_s[step.gpu, layer])
        if self.s.load_blocks_compute[step.gpu]:
            begin_s = max(begin_s, self._gpu_free[step.gpu])
            self._gpu_free[step.gpu] = begin_s + load_s
            self.gpu_busy_s[step.gpu] += load_s
        self._load_free[step.gpu] = begin_s + load_s
        self.loads += 1
        self.loaded_bytes += self.s.model.expert_bytes_by_layer[layer]
        self._push(begin_s + load_s, events.LOADED, index)

    def _loaded(self, index: int) -> None:
        step = self._steps[index]
        self._held[step.gpu, step.pair] = True
        self._begin(deque(self._step_over(index)))

    def _step_over(self, index: int) -> list[int]:
        """Steps that lacked only this one."""
        self._open_steps -= 1
        if not self._open_steps:
            self.migrated_s = self.now
        ready = []
        for dependent in self._dependents[index]:
            self._lacking[dependent] -= 1
            if self._lacking[dependent] == 0:
                ready.append(dependent)
        return ready

    # -------------------------------------------------------------------------------- what is asked

    @property
    def arrivals_done(self) -> bool:
        return self._finished == len(self.s.requests)

    @property
    def finished(self) -> int:
        return self._finished

    @property
    def migrating(self) -> bool:
        return self._open_steps > 0

    def take_calls(self) -> Ints:
        taken = self._calls.copy()
        self._calls[:] = 0
        return taken

    def on_gpu(self) -> npt.NDArray[np.bool_]:
        return self._held.reshape(self.s.placement.on_gpu.shape).copy()

    def log(self) -> Log:
        return list(self._log or ())

    def outcome(self) -> Outcome:
        for home in range(len(self._present)):
            self._count_present(home, 0)
        whole: dict[str, Any] = {
            name: np.array(getattr(self, name), np.int64)
            for name in (
                "calls", "remote_calls", "steps", "waiting", "destinations", "bytes_out",
                "bytes_in", "messages", "served", "layer_steps",
            )
        }  # fmt: skip
        times: dict[str, Any] = {
            name: np.array(getattr(self, name), np.float64)
            for name in (
                "start_s", "first_token_s", "done_s", "present_s", "up_busy_s", "down_busy_s",
                "gpu_busy_s", "layer_s",
            )
        }  # fmt: skip
        return Outcome(
            **whole,
            **times,
            loads=self.loads,
            loaded_bytes=self.loaded_bytes,
            events=self._taken,
            now_s=self.now,
        )
