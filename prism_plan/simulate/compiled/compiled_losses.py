"""The compiled engine with servers that are lost and come back.

Losses, notices and returns happen between events, in Python on the arrays of the engine; so does
what an event finds that needs an expert which nobody holds. All other events are the event loop's.
Each method does what that of the same name does in
:mod:`prism_plan.simulate.reference_losses`, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.execution_table import TableChange
from prism_plan.migration_step import MigrationStep
from prism_plan.placement import first_gpus
from prism_plan.simulate.compiled import engine_state, event_loop
from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.compiled.heap import KIND_SHIFT
from prism_plan.simulate.compiled.loss_kernels import (
    begin_passes,
    leave_queues,
    push,
    start_waiting,
)
from prism_plan.simulate.compiled.records import CALL, LOSS_FLAGS
from prism_plan.simulate.events import (
    ARRIVED,
    COMPUTED,
    DENSE,
    FREED,
    GIVEN_UP,
    LOADED,
    LOCAL,
    RETURNED,
    SEND,
)
from prism_plan.simulate.losses import HELD_NOWHERE, LOST, WAITED_TOO_LONG, LossOutcome
from prism_plan.simulate.network import BYTES_PER_CALL
from prism_plan.simulate.routing_policies import choose_holders, holder_lists
from prism_plan.simulate.scenario import Scenario

#: An execution table int32 [N, L].
Table = npt.NDArray[np.int32]
#: A bit for each call of a token's experts, int64 [T] by token of the step.
Calls = npt.NDArray[np.int64]

#: Events of messages.
_OF_MESSAGES = (SEND, ARRIVED, COMPUTED, RETURNED, FREED)
#: Calls are told by the bits of a signed number.
MAX_TOP_K = 62


@dataclass(frozen=True, eq=False)
class _Unanswered:
    """A call that was lost with a server, before anybody knew."""

    request: int
    sender: int
    receiver: int
    calls: Calls


@dataclass(frozen=True, eq=False)
class _WaitingCalls:
    """Calls of a step that wait for an expert; ``key`` is that of the end of the wait."""

    request: int
    calls: Calls
    again: bool
    key: int


class CompiledEngineWithLosses(CompiledEngine):
    """See :class:`prism_plan.simulate.engine_interface.EngineWithLosses`.

    Raises
    ------
    InputError
        More than :data:`MAX_TOP_K` experts a token; see also :class:`CompiledEngine`.
    """

    def __init__(
        self, scenario: Scenario, *, request_timeout_s: float = 60.0, log: bool = False
    ) -> None:
        if scenario.offload:
            raise ValueError("offloading servers do not help each other when one is lost")
        if scenario.model.top_k > MAX_TOP_K:
            raise InputError(
                f"top_k {scenario.model.top_k}",
                parameter="lose",
                expected=f"at most {MAX_TOP_K} for the compiled engine",
                remedy="use the reference ``engine``",
            )
        servers, requests = len(scenario.concurrency), len(scenario.requests)
        self._request_timeout_s = request_timeout_s
        self._lost = np.zeros(servers, bool)
        self._unanswered: list[_Unanswered] = []
        self._waiting_calls: list[_WaitingCalls] = []
        self._num_left = 0
        self._left_s = np.full(requests, np.nan)
        self._why = np.zeros(requests, np.int8)
        self._restarts = np.zeros(requests, np.int64)
        self._repeated_calls = 0
        tokens = scenario.timing.prefill_s.shape[-1]
        self._own_arrays = engine_state.LossArrays(
            flags=np.zeros(1, LOSS_FLAGS),
            calls=np.zeros((0, tokens), np.int64),
            step_calls=np.zeros((servers, tokens), np.int64),
        )
        super().__init__(scenario, log=log)
        self._count_held_nowhere()

    def set_state(self, state: engine_state.EngineState) -> None:
        super().set_state(state)
        more = len(state.messages) - len(self._own_arrays.calls)
        if more:
            calls = np.pad(self._own_arrays.calls, ((0, more), (0, 0)))
            self._own_arrays = self._own_arrays._replace(calls=calls)
        self._losses = self._own_arrays

    # ------------------------------------------------------------------------------- the protocol

    @property
    def all_finished(self) -> bool:
        return self.num_finished + self._num_left == len(self.scenario.requests)

    def tables_in_use(self) -> npt.NDArray[np.int32]:
        servers = len(self._lost)
        rows = self._state.requests["table_row"][self._admitted()] // servers * servers
        first_rows = sorted({self._total("table_row"), *rows.tolist()}, reverse=True)
        return np.stack([self._arrays.execution[row : row + servers] for row in first_rows])

    def losses(self) -> LossOutcome:
        """What losses did to the requests so far."""
        return LossOutcome(
            self._left_s.copy(), self._why.copy(), self._restarts.copy(), self._repeated_calls
        )

    def lose(self, server: int) -> None:
        """A server stops."""
        self._lost[server] = True
        admitted = self._admitted()
        own = np.flatnonzero(admitted & (self.scenario.requests.home == server)).tolist()
        for number in own:
            self._remove_request(number, LOST)
        while (queued := self._next_queued(server)) is not None:
            self._leave(queued, server, LOST)
        self._drop_work(own)
        self._stop_work(server)
        self._cut_transfers(server)
        self._hold_steps(server)

    def notice(
        self, server: int, steps: Sequence[MigrationStep], table: Table, later: Table | None = None
    ) -> None:
        """All others know of a loss."""
        own = self._arrays.servers[server]
        self._state.gpu_holds[own["first_gpu"] : own["end_gpu"]] = False
        self._replace_migration(steps, table, later)
        rows = self._state.requests["table_row"]
        names_it = (self._arrays.execution == server).any(axis=1)
        again = set(np.flatnonzero(self._admitted() & names_it[rows]).tolist())
        self._drop_work(again)
        unanswered = self._take_unanswered(server)
        for number in sorted({*again, *unanswered}):
            if number in again:
                self._restart(number)
            for calls in unanswered.get(number, ()):
                self._repeat(number, calls)
        self._check_waiting_calls()
        self._start_steps()

    def rejoin(
        self, server: int, steps: Sequence[MigrationStep], table: Table, later: Table | None = None
    ) -> None:
        """A lost server is back, without experts."""
        state, own = self._state, self._arrays.servers[server]
        self._lost[server] = False
        state.ports["busy"][:, [server, server + len(self._lost)]] = False
        gpus = state.gpus[own["first_gpu"] : own["end_gpu"]]
        gpus["free_s"] = gpus["load_free_s"] = self._now
        for port in ("up", "down"):
            state.servers[f"{port}_bucket_bytes"][server] = self._arrays.burst_bytes
            state.servers[f"{port}_bucket_s"][server] = self._now
        state.tokens_sent[server] = 0
        self._replace_migration(steps, table, later)
        self._check_waiting_calls()
        self._start_steps()

    def _react(self, reason: int) -> None:
        number = int(self._own_arrays.flags["request"][0])
        if reason == event_loop.EXPERT_MISSING:
            tokens = int(self._state.requests["step_tokens"][number])
            self._call(number, np.full(tokens, (1 << self.scenario.model.top_k) - 1, np.int64))
        elif reason == event_loop.EXPERT_LOADED:
            self._resume_waiting_calls()
        else:
            self._fail(number, WAITED_TOO_LONG)

    # ------------------------------------------------------------------------ what there is to read

    @property
    def _now(self) -> float:
        return float(self._state.run["now_s"][0])

    def _admitted(self) -> npt.NDArray[np.bool_]:
        """Which requests are admitted and not gone, bool [R]."""
        requests = self._state.requests
        begun = np.isfinite(requests["start_s"]) & np.isnan(requests["done_s"])
        admitted: npt.NDArray[np.bool_] = begun & np.isnan(self._left_s)
        return admitted

    def _home(self, number: int) -> int:
        return int(self.scenario.requests.home[number])

    def _ends(self, message: int) -> tuple[int, int]:
        """Sender and receiver of the transfer of a message that is next or under way."""
        of = self._state.messages[message]
        ends = int(of["sender"]), int(of["receiver"])
        return (ends[1], ends[0]) if of["returning"] else ends

    def _waiting_messages(self) -> list[int]:
        """Messages that wait for ports, in the order in which they were ready."""
        found = []
        for head in self._state.ports["queue_head"][0].tolist():
            message = head
            while message >= 0:
                found.append(message)
                message = int(self._state.queue_links["next"][message, 0])
        return sorted(found, key=lambda m: self._state.messages["ready"][m])

    def _events(self) -> list[tuple[float, int, int, int]]:
        """Time, key, kind and subject of the events of the heap, in order."""
        heap = self._state.heap
        entries = np.sort(heap.entries[: heap.counts[0]], order=("time_s", "key"))
        return [
            (time_s, key, event >> KIND_SHIFT, event & 0xFFFFFFFF)
            for time_s, key, event in entries.tolist()
        ]

    def _keep_events(self, goes_on: Callable[[int, int, int], bool]) -> None:
        """Remove the events of the heap for which ``goes_on`` of kind, subject and key is false."""
        heap = self._state.heap
        kept = [
            (time_s, key, kind << KIND_SHIFT | subject)
            for time_s, key, kind, subject in self._events()
            if goes_on(kind, subject, key)
        ]
        if kept:
            heap.entries[: len(kept)] = kept  # in order, which is a heap too
        heap.counts[0] = len(kept)

    # ------------------------------------------------------------------------- messages by number

    def _free_message(self, message: int) -> None:
        """A message is no more; nothing refers to it."""
        state = self._state
        state.message_work_s[message] = -1.0
        state.free_messages[state.run["free_messages"][0]] = message
        state.run["free_messages"] += 1

    def _lose_message(self, message: int, server: int) -> None:
        """A message is lost with a server; if it is a call to it, its answer will be missed."""
        of = self._state.messages[message]
        if of["kind"] == CALL and of["receiver"] == server:
            self._unanswered.append(self._unanswered_call(message))
        self._free_message(message)

    def _unanswered_call(self, message: int) -> _Unanswered:
        of = self._state.messages[message]
        number = int(of["request"])
        tokens = int(self._state.requests["step_tokens"][number])
        calls = self._own_arrays.calls[message, :tokens].copy()
        return _Unanswered(number, int(of["sender"]), int(of["receiver"]), calls)

    def _make_room(self, events: int, messages: int = 0) -> None:
        """Have room for more events and messages, and for those that the event loop expects."""
        servers = len(self._lost)
        while True:
            state = self._state
            free = len(state.heap.entries) - int(state.heap.counts[0])
            if free < servers + 8 + events + self._total("open_steps"):
                self.set_state(engine_state.grow(state, "heap"))
            elif self._total("free_messages") < servers + 1 + messages:
                self.set_state(engine_state.grow(state, "messages"))
            else:
                return

    def _push(self, at_s: float, kind: int, subject: int) -> int:
        self._make_room(1)
        return int(push(at_s, kind, subject, self._state))

    # -------------------------------------------------------------------------------------- a loss

    def _next_queued(self, server: int) -> int | None:
        """Take the first request from the admission queue of a server."""
        queue = self._state.servers[server : server + 1]
        number = int(queue["queue_head"][0])
        if number < 0:
            return None
        queue["queue_head"] = self._state.requests["next_queued"][number]
        return number

    def _remove_request(self, number: int, why: int) -> None:
        home, run = self._home(number), self._state.run
        if self._state.requests["table_row"][number] != run["table_row"][0] + home:
            run["num_on_older_tables"] -= 1
        self._state.servers["num_active"][home] -= 1
        self._leave(number, home, why)

    def _leave(self, number: int, home: int, why: int) -> None:
        self._left_s[number] = self._now
        self._why[number] = why
        self._num_left += 1
        of = self._state.servers[home : home + 1]
        of["present_s"] += of["num_present"] * (self._now - of["present_since_s"])
        of["present_since_s"] = self._now
        of["num_present"] -= 1

    def _drop_work(self, numbers: Collection[int]) -> None:
        if not numbers:
            return
        gone = set(numbers)
        request = self._state.messages["request"]
        under_way = {subject for _, _, kind, subject in self._events() if kind == FREED}
        dropped = []

        def goes_on(kind: int, subject: int, key: int) -> bool:
            if kind in (DENSE, LOCAL, GIVEN_UP):
                return subject not in gone
            if kind not in _OF_MESSAGES or kind == FREED or int(request[subject]) not in gone:
                return True
            if subject not in under_way:  # else its ports need it to the end; then it is not used
                dropped.append(subject)
            return False

        self._keep_events(goes_on)
        for message in self._waiting_messages():
            if int(request[message]) in gone:
                leave_queues(self._links, message, *self._ends(message))
                dropped.append(message)
        for message in dropped:
            self._free_message(message)
        self._unanswered = [call for call in self._unanswered if call.request not in gone]
        self._keep_waiting_calls(lambda calls: calls.request not in gone)

    def _keep_waiting_calls(self, goes_on: Callable[[_WaitingCalls], bool]) -> None:
        self._waiting_calls = [calls for calls in self._waiting_calls if goes_on(calls)]
        self._own_arrays.flags["waiting"] = len(self._waiting_calls)

    def _stop_work(self, server: int) -> None:
        state = self._state
        location, receiver = state.requests["location"], state.messages["receiver"]
        lost = []

        def goes_on(kind: int, subject: int, key: int) -> bool:
            if kind in (DENSE, LOCAL, GIVEN_UP):
                return bool(location[subject] != server)
            if kind == LOADED:
                gpu = state.steps["gpu"][subject]
                return bool(self._arrays.gpus["server"][gpu] != server)
            if kind == COMPUTED and receiver[subject] == server:
                lost.append(subject)
                return False
            return True

        self._keep_events(goes_on)
        for message in lost:
            self._lose_message(message, server)
        self._keep_waiting_calls(lambda calls: bool(location[calls.request] != server))
        own = self._arrays.servers[server]
        for gpu in range(int(own["first_gpu"]), int(own["end_gpu"])):
            rest_s = max(float(state.gpus["free_s"][gpu]) - self._now, 0.0)
            busy_s = float(state.gpus["gpu_busy_s"][gpu])
            state.gpus["gpu_busy_s"][gpu] = max(busy_s - rest_s, 0.0)
            state.gpus["free_s"][gpu] = self._now

    def _cut_transfers(self, server: int) -> None:
        state, servers = self._state, len(self._lost)
        cut = {
            subject: end_s
            for end_s, _, kind, subject in self._events()
            if kind == FREED and server in self._ends(subject)
        }
        lost, freed = [], list(cut)

        def goes_on(kind: int, subject: int, key: int) -> bool:
            if kind not in _OF_MESSAGES:
                return True
            sender, receiver = self._ends(subject)
            if kind in (ARRIVED, RETURNED):
                arrives = receiver != server and subject not in cut
                if not arrives:
                    lost.append(subject)
                return arrives
            if kind == SEND:
                if sender == server:
                    freed.append(subject)
                return sender != server
            return subject not in cut

        self._keep_events(goes_on)
        for message, end_s in cut.items():
            sender, receiver = self._ends(message)
            first = servers if self._payload(message) < self._arrays.short_bytes else 0
            state.ports["busy"][0, first + sender] = False
            state.ports["busy"][1, first + receiver] = False
            state.servers["up_busy_s"][sender] -= end_s - self._now
            state.servers["down_busy_s"][receiver] -= end_s - self._now
        for message in lost:
            self._lose_message(message, server)
        for message in set(freed) - set(lost):
            self._free_message(message)
        state.ports["busy"][:, [server, server + servers]] = True
        for message in self._waiting_messages():
            sender, receiver = self._ends(message)
            if sender == server:
                leave_queues(self._links, message, sender, receiver)
                self._lose_message(message, server)
                continue
            first = servers if self._payload(message) < self._arrays.short_bytes else 0
            busy = self._state.ports["busy"]
            if not (busy[0, first + sender] or busy[1, first + receiver]):
                self._make_room(2)
                start_waiting(self._links, message, sender, receiver)

    def _payload(self, message: int) -> int:
        of = self._state.messages[message]
        return int(of["reply_bytes"] if of["returning"] else of["payload_bytes"])

    def _hold_steps(self, server: int) -> None:
        steps = self._state.steps
        steps["open_needs"] += self._arrays.gpus["server"][steps["gpu"]] == server

    # ------------------------------------------------------------------------------------ a notice

    def _replace_migration(
        self, steps: Sequence[MigrationStep], table: Table, later: Table | None
    ) -> None:
        state, run = self._state, self._state.run
        self._keep_events(lambda kind, subject, key: kind != LOADED)
        np.minimum(state.gpus["load_free_s"], self._now, out=state.gpus["load_free_s"])
        self._place_experts()
        run["open_steps"] = 0
        run["begins_after"] = -1
        begun = self._total("table_row") + len(self._lost)  # a table that has not is given up
        self._arrays = self._arrays._replace(execution=self._arrays.execution[:begun])
        end = len(steps)
        ended_s = self.migration_end_s
        self.migrate((), TableChange(table, 0, 0))
        run["migration_end_s"] = ended_s
        self.migrate(steps, None if later is None else TableChange(later, end, end))
        self._count_held_nowhere()

    def dependencies(
        self, steps: Sequence[MigrationStep], change: TableChange | None
    ) -> tuple[list[int], list[list[int]]]:
        needs, dependents = super().dependencies(steps, change)
        for index, step in enumerate(steps):
            needs[index] += bool(self._lost[self._arrays.gpus["server"][step.gpu]])
        return needs, dependents

    def _place_experts(self) -> None:
        """Holders of each pair, by what the GPUs hold now."""
        state = self._state
        owner = self._arrays.gpus["server"]
        state.first_gpu[:] = first_gpus(state.gpu_holds, owner, len(self._lost))
        state.holders[:], state.num_replicas[:] = holder_lists(state.first_gpu)

    def _take_unanswered(self, server: int) -> dict[int, list[Calls]]:
        found = [call for call in self._unanswered if call.receiver == server]
        self._unanswered = [call for call in self._unanswered if call.receiver != server]
        of = self._state.messages
        waiting = [m for m in self._waiting_messages() if of["receiver"][m] == server]
        for message in waiting:
            leave_queues(self._links, message, *self._ends(message))
        waiting += [
            m for _, _, kind, m in self._events() if kind == SEND and of["receiver"][m] == server
        ]
        self._keep_events(lambda kind, m, key: not (kind == SEND and of["receiver"][m] == server))
        for message in waiting:
            if of["kind"][message] == CALL:
                found.append(self._unanswered_call(message))
            self._free_message(message)
        calls: dict[int, list[Calls]] = {}
        for call in found:
            if not self._lost[call.sender]:
                calls.setdefault(call.request, []).append(call.calls)
        return {
            number: sorted(of_request, key=lambda calls: self._experts(number, calls))
            for number, of_request in calls.items()
        }

    def _experts(self, number: int, calls: Calls) -> list[list[int]]:
        """The experts that each token calls, of tokens that call any."""
        request = self._state.requests[number]
        first, layer = int(request["token_row"]), int(request["layer"])
        rows = self._arrays.experts[first : first + len(calls), layer].tolist()
        return [
            [e for k, e in enumerate(row) if bits >> k & 1]
            for row, bits in zip(rows, calls.tolist(), strict=True)
            if bits
        ]

    def _restart(self, number: int) -> None:
        request = self._state.requests[number : number + 1]
        home, run = self._home(number), self._state.run
        prompt = self._arrays.prompts[self.scenario.requests.prompt[number]]
        prefill = int(prompt["prefill_tokens"])
        ids = int(prompt["decode_tokens"]) + (prefill > 0) - int(request["ids_left"][0])
        if request["table_row"][0] != run["table_row"][0] + home:
            run["num_on_older_tables"] -= 1
        self._restarts[number] += 1
        self._begin(number, (prefill or 1) + ids, prefill == 0 and ids == 0)

    def _begin(self, number: int, step_tokens: int, decoding: bool) -> None:
        """Begin the passes that are left of a request, on the newest table."""
        request = self._state.requests[number : number + 1]
        home = self._home(number)
        prompt = self._arrays.prompts[self.scenario.requests.prompt[number]]
        request["location"] = home
        request["table_row"] = self._state.run["table_row"] + home
        request["token_row"] = prompt["first_row"]
        request["step_tokens"] = step_tokens
        request["steps_left"] = request["ids_left"]
        request["decoding"] = decoding
        request["context"] = request["layer"] = request["pending_parts"] = 0
        self._make_room(1, 1)
        begin_passes(self._arrays, self._state, number)

    def _admit(self, number: int) -> None:
        request = self._state.requests[number : number + 1]
        prompt = self._arrays.prompts[self.scenario.requests.prompt[number]]
        prefill = int(prompt["prefill_tokens"])
        self._state.servers["num_active"][self._home(number)] += 1
        request["start_s"] = self._now
        request["ids_left"] = int(prompt["decode_tokens"]) + (prefill > 0)
        self._begin(number, prefill or 1, prefill == 0)

    def _repeat(self, number: int, calls: Calls) -> None:
        self._repeated_calls += 1
        if np.isnan(self._left_s[number]):
            self._state.requests["pending_parts"][number] -= 1
            self._call(number, calls, again=True)

    # --------------------------------------------------------- experts that no living server holds

    def _count_held_nowhere(self) -> None:
        self._own_arrays.flags["held_nowhere"] = int((self._state.num_replicas == 0).sum())

    def _pairs_coming(self) -> set[int]:
        steps = self._state.steps
        loads = steps[steps["is_load"]]
        held = self._state.gpu_holds[loads["gpu"], loads["pair"]]
        return set(loads["pair"][~held].tolist())

    def _lacking(self, number: int, calls: Calls) -> set[int]:
        first = int(self._state.requests["layer"][number]) * self.scenario.model.num_experts
        pairs = {first + e for token in self._experts(number, calls) for e in token}
        return {pair for pair in pairs if self._state.num_replicas[pair] == 0}

    def _call(self, number: int, calls: Calls, *, again: bool = False) -> None:
        """As ``start_calls`` of the reference: wait for what no server holds, or fail."""
        lacking = self._lacking(number, calls)
        if not lacking:
            self.start_calls(number, calls, again=again)
        elif lacking <= self._pairs_coming():
            self._state.requests["pending_parts"][number] += 1
            key = self._push(self._now + self._request_timeout_s, GIVEN_UP, number)
            self._waiting_calls.append(_WaitingCalls(number, calls, again, key))
            self._keep_waiting_calls(lambda calls: True)
        else:
            self._fail(number, HELD_NOWHERE)

    def _resume_waiting_calls(self) -> None:
        self._count_held_nowhere()
        ready = [w for w in self._waiting_calls if not self._lacking(w.request, w.calls)]
        self._keep_waiting_calls(lambda calls: calls not in ready)
        keys = {calls.key for calls in ready}
        self._keep_events(lambda kind, subject, key: kind != GIVEN_UP or key not in keys)
        for calls in ready:
            self._state.requests["pending_parts"][calls.request] -= 1
            self.start_calls(calls.request, calls.calls, again=calls.again)

    def _check_waiting_calls(self) -> None:
        coming = self._pairs_coming()
        hopeless = [
            calls.request
            for calls in self._waiting_calls
            if not self._lacking(calls.request, calls.calls) <= coming
        ]
        for number in hopeless:
            if np.isnan(self._left_s[number]):
                self._fail(number, HELD_NOWHERE)

    def _fail(self, number: int, why: int) -> None:
        self._drop_work([number])
        self._remove_request(number, why)
        following = self._next_queued(self._home(number))
        if following is not None:
            self._admit(following)

    # ------------------------------------------------------------------------------------- routing

    def start_calls(self, number: int, calls: Calls, *, again: bool) -> None:
        """Split calls by destination, start the local experts and send the messages."""
        arrays, servers = self._arrays, len(self._lost)
        self._make_room(servers + 1, servers)
        state = self._state
        request = state.requests[number : number + 1]
        at, layer = int(request["location"][0]), int(request["layer"][0])
        home, first = self._home(number), layer * self.scenario.model.num_experts
        rows = arrays.experts[request["token_row"][0] :, layer]
        batches: dict[int, dict[int, int]] = {}
        sent: dict[int, Calls] = {}
        named: dict[int, int] = {}
        remote, waiting, destinations, num_calls = 0, 0, 0, 0
        for token in np.flatnonzero(calls).tolist():
            missing = []
            for k, e in enumerate(rows[token].tolist()):
                if not calls[token] >> k & 1:
                    continue
                num_calls += 1
                if not again:
                    state.recent_calls[home, layer, e] += 1
                if state.first_gpu[at, first + e] >= 0:
                    batch = batches.setdefault(at, {})
                    batch[e] = batch.get(e, 0) + 1
                else:
                    missing.append((k, e))
            if not missing:
                continue
            state.missing_experts[0, : len(missing)] = [first + e for _, e in missing]
            choose_holders(
                arrays.route, number, state.missing_experts, len(missing), state.holders,
                state.num_replicas, state.tokens_sent[at], arrays.link_rank[at], state.held_mask,
                state.candidate_servers, state.cover_table,
            )  # fmt: skip
            place = state.missing_experts[1, : len(missing)].tolist()
            for (k, e), m in zip(missing, place, strict=True):
                batch = batches.setdefault(m, {})
                batch[e] = batch.get(e, 0) + 1
                sent.setdefault(m, np.zeros(len(calls), np.int64))[token] |= 1 << k
                named[m] = named.get(m, 0) + 1
            for m in set(place):
                state.tokens_sent[at, m] += 1
            remote += len(missing)
            waiting += 1
            destinations += len(set(place))
        if not again:
            own = state.servers[home : home + 1]
            own["calls"] += num_calls
            own["remote_calls"] += remote
            own["steps"] += len(calls)
            own["waiting"] += waiting
            own["destinations"] += destinations
            request["remote_experts"] = remote
        request["pending_parts"] += len(batches)
        if at in batches:
            work_s = self._gpu_work_s(at, layer, batches[at])
            end_s = 0.0
            for gpu, seconds in sorted(work_s.items()):
                of = state.gpus[gpu : gpu + 1]
                of["free_s"] = max(self._now, float(of["free_s"][0])) + seconds
                of["gpu_busy_s"] += seconds
                end_s = max(end_s, float(of["free_s"][0]))
            self._push(end_s, LOCAL, number)
        for m in sorted(sent):
            message = self._send_call(number, at, m, named[m], sent[m])
            first_gpu = int(arrays.servers["first_gpu"][m])
            for gpu, seconds in self._gpu_work_s(m, layer, batches[m]).items():
                state.message_work_s[message, gpu - first_gpu] = seconds

    def _send_call(self, number: int, at: int, to: int, named: int, calls: Calls) -> int:
        """Send a message with calls of so many experts by tokens; returns its number."""
        state, run = self._state, self._state.run
        run["free_messages"] -= 1
        message = int(state.free_messages[run["free_messages"][0]])
        states = int(np.count_nonzero(calls)) * self._arrays.token_bytes
        of = state.messages[message : message + 1]
        of["request"] = number
        of["layer"] = state.requests["layer"][number]
        of["sender"], of["receiver"] = at, to
        of["payload_bytes"], of["reply_bytes"] = states + BYTES_PER_CALL * named, states
        of["kind"], of["begins_pass"], of["returning"] = CALL, False, False
        self._own_arrays.calls[message, : len(calls)] = calls
        state.messages_sent[at, to] += 1
        self._push(self._now + self._arrays.call_overhead_s, SEND, message)
        return message

    def _gpu_work_s(self, server: int, layer: int, batch: dict[int, int]) -> dict[int, float]:
        """Seconds of work on each GPU of a server, added in the order of first calls."""
        arrays, state = self._arrays, self._state
        size = arrays.layers["size_class"][layer]
        work_s: dict[int, float] = {}
        for e, tokens in batch.items():
            gpu = int(state.first_gpu[server, layer * self.scenario.model.num_experts + e])
            seconds = float(arrays.expert_s[arrays.gpus["kind"][gpu], size, tokens])
            work_s[gpu] = work_s.get(gpu, 0.0) + seconds
            state.gpus["served"][gpu] += tokens
        return work_s
