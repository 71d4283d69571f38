"""The plain engine with servers that are lost and come back: the definition of both.

The rules stand in docs/design.md, section 4, *Lost servers*. A loss, its notice and a return happen
between events; the events of the engine itself are those of a run without losses, and one more, the
end of a wait for an expert that no server holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import TableChange
from prism_plan.migration_step import MigrationStep
from prism_plan.simulate import events
from prism_plan.simulate.losses import HELD_NOWHERE, LOST, WAITED_TOO_LONG, LossOutcome
from prism_plan.simulate.network import BYTES_PER_TOKEN_ID
from prism_plan.simulate.reference_engine import ActiveRequest, Message, ReferenceEngine
from prism_plan.simulate.scenario import Scenario

#: An execution table int32 [N, L].
Table = npt.NDArray[np.int32]
#: The experts that each token calls.
Calls = list[list[int]]

#: Events of messages.
_OF_MESSAGES = (events.SEND, events.ARRIVED, events.COMPUTED, events.RETURNED, events.FREED)


@dataclass(eq=False)
class _WaitingCalls:
    """Calls of a step that wait for an expert which no server holds; see ``start_calls``."""

    request: ActiveRequest
    tokens: Calls
    again: bool


class ReferenceEngineWithLosses(ReferenceEngine):
    """See :class:`prism_plan.simulate.engine_interface.EngineWithLosses`."""

    def __init__(
        self, scenario: Scenario, *, request_timeout_s: float = 60.0, log: bool = False
    ) -> None:
        super().__init__(scenario, log=log)
        if scenario.offload:
            raise ValueError("offloading servers do not help each other when one is lost")
        self._request_timeout_s = request_timeout_s
        self._lost = [False] * len(self._num_active)
        # those whose server was lost before it answered, and nobody knows yet
        self._unanswered: list[Message] = []
        self._waiting_calls: list[_WaitingCalls] = []
        self._held_nowhere = self._pairs_held_nowhere()
        self._num_left = 0
        self._left_s = np.full(len(scenario.requests), np.nan)
        self._why = np.zeros(len(scenario.requests), np.int8)
        self._restarts = np.zeros(len(scenario.requests), np.int64)
        self._repeated_calls = 0

    # ------------------------------------------------------------------------------- the protocol

    @property
    def all_finished(self) -> bool:
        return self._num_finished + self._num_left == len(self.scenario.requests)

    def losses(self) -> LossOutcome:
        return LossOutcome(
            self._left_s.copy(), self._why.copy(), self._restarts.copy(), self._repeated_calls
        )

    def lose(self, server: int) -> None:
        self._lost[server] = True
        own = [r for r in self._admitted.values() if r.home == server]
        for request in own:
            self._remove_request(request.number, LOST)
        for number in self._admission_queue[server]:
            self._leave(number, server, LOST)
        self._admission_queue[server].clear()
        self._num_active[server] = 0
        self._drop_work({request.number for request in own})
        self._stop_work(server)
        self._cut_transfers(server)
        self._hold_steps(server)

    def notice(
        self, server: int, steps: Sequence[MigrationStep], table: Table, later: Table | None = None
    ) -> None:
        gpus = slice(self._gpu_start[server], self._gpu_start[server + 1])
        self._gpu_holds[gpus] = False
        self._replace_migration(steps, table, later)
        again = {
            request.number: request
            for request in self._admitted.values()
            if server in request.executes_at
        }
        self._drop_work(again)
        unanswered = self._take_unanswered(server)
        for number in sorted({*again, *unanswered}):
            if number in again:
                self._restart(again[number])
            for calls in unanswered.get(number, ()):
                self._repeat(number, calls)
        self._check_waiting_calls()
        self._update_tables()

    def rejoin(
        self, server: int, steps: Sequence[MigrationStep], table: Table, later: Table | None = None
    ) -> None:
        self._lost[server] = False
        for busy in (*self._up_busy, *self._down_busy):
            busy[server] = False
        for gpu in range(self._gpu_start[server], self._gpu_start[server + 1]):
            self._gpu_free_s[gpu] = self._load_free_s[gpu] = self.now
        for port in ("up", "down"):
            self._bucket[port][server] = [self.scenario.network.burst_bytes, self.now]
        self._tokens_sent[server] = [0] * len(self._lost)
        self._replace_migration(steps, table, later)
        self._check_waiting_calls()
        self._update_tables()

    # -------------------------------------------------------------------------------------- a loss

    def _remove_request(self, number: int, why: int) -> None:
        """An admitted request leaves without an answer."""
        request = self._admitted.pop(number)
        if request.table != len(self._tables) - 1:
            self._num_on_older_tables -= 1
        self._num_active[request.home] -= 1
        self._leave(number, request.home, why)

    def _leave(self, number: int, home: int, why: int) -> None:
        self._left_s[number] = self.now
        self._why[number] = why
        self._num_left += 1
        self._count_present(home, -1)

    def _drop_work(self, numbers: Collection[int]) -> None:
        """Drop events and messages of requests.

        What GPUs have queued for them is computed, and transfers under way hold their ports to the
        end; nothing follows from either.
        """

        def goes_on(kind: int, subject: Any) -> bool:
            if kind in _OF_MESSAGES:
                return kind == events.FREED or subject.request not in numbers
            if kind in (events.DENSE, events.LOCAL):
                return subject.number not in numbers
            return kind != events.GIVEN_UP or subject.request.number not in numbers

        if not numbers:
            return
        self._keep_events(goes_on)
        self._waiting_messages = [m for m in self._waiting_messages if m.request not in numbers]
        self._unanswered = [m for m in self._unanswered if m.request not in numbers]
        self._waiting_calls = [
            calls for calls in self._waiting_calls if calls.request.number not in numbers
        ]

    def _keep_events(self, goes_on: Callable[[int, Any], bool]) -> None:
        """Remove the events of the heap for which ``goes_on`` of kind and subject is false."""
        # in order, which is a heap too
        self._heap = [entry for entry in sorted(self._heap) if goes_on(entry[3], entry[4])]

    def _stop_work(self, server: int) -> None:
        """The server computes nothing more; what was queued on its GPUs is not done."""

        def goes_on(kind: int, subject: Any) -> bool:
            if kind in (events.DENSE, events.LOCAL):
                return bool(subject.location != server)
            if kind == events.LOADED:
                return bool(self._server_of_gpu[self._steps[subject].gpu] != server)
            if kind == events.COMPUTED and subject.to == server:
                self._unanswered.append(subject)
                return False
            return not (kind == events.GIVEN_UP and subject.request.location == server)

        self._keep_events(goes_on)
        self._waiting_calls = [
            calls for calls in self._waiting_calls if calls.request.location != server
        ]
        for gpu in range(self._gpu_start[server], self._gpu_start[server + 1]):
            rest_s = max(self._gpu_free_s[gpu] - self.now, 0.0)
            self.gpu_busy_s[gpu] = max(self.gpu_busy_s[gpu] - rest_s, 0.0)
            self._gpu_free_s[gpu] = self.now

    def _cut_transfers(self, server: int) -> None:
        """The server's ports are closed: what waits for them waits on, and transfers are cut.

        What it sent completely arrives. The other ends of cut transfers are free at once.
        """
        cut = [
            (end_s, message)
            for end_s, _, _, kind, message in self._heap
            if kind == events.FREED and server in message.ends
        ]
        cut_messages = {id(message) for _, message in cut}

        def goes_on(kind: int, subject: Any) -> bool:
            if kind not in _OF_MESSAGES:
                return True
            sender, receiver = subject.ends
            if kind in (events.ARRIVED, events.RETURNED):
                arrives = receiver != server and id(subject) not in cut_messages
                if not arrives:
                    self._count_unanswered(subject, server)
                return arrives
            if kind == events.SEND:
                return bool(sender != server)
            return id(subject) not in cut_messages

        self._keep_events(goes_on)
        for end_s, message in cut:
            sender, receiver = message.ends
            short = int(message.payload < self.scenario.network.short_bytes)
            self._up_busy[short][sender] = self._down_busy[short][receiver] = False
            self.up_busy_s[sender] -= end_s - self.now
            self.down_busy_s[receiver] -= end_s - self.now
        for busy in (*self._up_busy, *self._down_busy):
            busy[server] = True
        waiting, self._waiting_messages = self._waiting_messages, []
        for message in waiting:
            if message.ends[0] == server:
                self._count_unanswered(message, server)
            else:
                self._start_or_enqueue(message)

    def _count_unanswered(self, message: Message, server: int) -> None:
        """Remember a message that is lost with a server, if it is a call that it has to answer."""
        if message.kind == "call" and message.to == server:
            self._unanswered.append(message)

    def _hold_steps(self, server: int) -> None:
        """Steps of a migration at a lost server do not start."""
        for index, step in enumerate(self._steps):
            if self._server_of_gpu[step.gpu] == server:
                self._open_needs[index] += 1

    # ------------------------------------------------------------------------------------ a notice

    def _replace_migration(
        self, steps: Sequence[MigrationStep], table: Table, later: Table | None
    ) -> None:
        """Give up the migration under way, with its loads, and begin another one and a table."""
        self._keep_events(lambda kind, subject: kind != events.LOADED)
        for gpu, free_s in enumerate(self._load_free_s):
            self._load_free_s[gpu] = min(free_s, self.now)
        end = len(steps)
        self._steps, self._open_steps, self._waiting_steps = (), 0, ()
        self._change = TableChange(table, 0, 0)
        self._update_tables()
        self._begin_migration(steps, None if later is None else TableChange(later, end, end))
        self._update_tables()
        self._held_nowhere = self._pairs_held_nowhere()

    def dependencies(
        self, steps: Sequence[MigrationStep], change: TableChange | None
    ) -> tuple[list[int], list[list[int]]]:
        """Steps at servers of whose loss nobody knows yet have a need that is never met."""
        needs, dependents = super().dependencies(steps, change)
        for index, step in enumerate(steps):
            needs[index] += self._lost[self._server_of_gpu[step.gpu]]
        return needs, dependents

    def _take_unanswered(self, server: int) -> dict[int, list[Calls]]:
        """The calls to a lost server, by request, that were lost or wait for it; they are removed.

        Not those that wait at another lost server, whose requests are started again in their turn.
        """
        found = [m for m in self._unanswered if m.to == server]
        self._unanswered = [m for m in self._unanswered if m.to != server]
        found += [m for m in self._waiting_messages if m.to == server]
        self._waiting_messages = [m for m in self._waiting_messages if m.to != server]
        found += [m for _, _, _, kind, m in self._heap if kind == events.SEND and m.to == server]
        self._keep_events(lambda kind, m: not (kind == events.SEND and m.to == server))
        calls: dict[int, list[Calls]] = {}
        for message in found:
            if message.kind == "call" and not self._lost[message.at]:
                calls.setdefault(message.request, []).append(message.calls)
        return {number: sorted(of_request) for number, of_request in calls.items()}

    def _restart(self, request: ActiveRequest) -> None:
        """Start a request again from its prompt and the tokens that are at home, on the new table.

        One pass over all of them makes the next token.
        """
        prompts = self.scenario.requests.prompts
        prompt = int(self.scenario.requests.prompt[request.number])
        prefill = int(prompts.prefill_tokens[prompt])
        ids = int(prompts.decode_tokens[prompt]) + (prefill > 0) - request.ids_left
        if request.table != len(self._tables) - 1:
            self._num_on_older_tables -= 1
        request.table = len(self._tables) - 1
        request.executes_at = self._tables[-1][request.home].tolist()
        request.location = request.home
        request.token_row = int(prompts.first_row[prompt])
        request.step_tokens = (prefill or 1) + ids
        request.steps_left = request.ids_left
        request.decoding = prefill == 0 and ids == 0
        request.context = request.layer = request.pending_parts = 0
        self._restarts[request.number] += 1
        first = request.executes_at[0]
        if first == request.home:
            self._begin_layer(request)
        else:
            payload = BYTES_PER_TOKEN_ID * request.step_tokens
            self._send_hop("start", request, -1, first, payload, begins_pass=True)

    def _repeat(self, number: int, calls: Calls) -> None:
        """Send the calls of a message again, unless one before them has failed its request."""
        self._repeated_calls += 1
        if number in self._admitted:
            self._admitted[number].pending_parts -= 1
            self.start_calls(self._admitted[number], calls, again=True)

    # --------------------------------------------------------- experts that no living server holds

    def _pairs_held_nowhere(self) -> set[int]:
        return set(np.flatnonzero(~self._gpu_holds.any(axis=0)).tolist())

    def _pairs_coming(self) -> set[int]:
        """Those that the migration under way loads."""
        return {
            step.pair
            for step in self._steps
            if step.kind == "load" and not self._gpu_holds[step.gpu, step.pair]
        }

    def start_calls(self, request: ActiveRequest, tokens: Calls, *, again: bool = False) -> None:
        """Wait as a whole for what no server holds, if a migration brings it; else fail."""
        lacking = self._lacking(request, tokens)
        if not lacking:
            super().start_calls(request, tokens, again=again)
        elif lacking <= self._pairs_coming():
            request.pending_parts += 1
            calls = _WaitingCalls(request, tokens, again)
            self._waiting_calls.append(calls)
            self._push(self.now + self._request_timeout_s, events.GIVEN_UP, calls)
        else:
            self._fail(request, HELD_NOWHERE)

    def _lacking(self, request: ActiveRequest, tokens: Calls) -> set[int]:
        """Pairs that the calls need and no server holds."""
        if not self._held_nowhere:
            return set()
        first = request.layer * self.scenario.model.num_experts
        return {first + e for token in tokens for e in token} & self._held_nowhere

    def complete_load(self, index: int) -> None:
        super().complete_load(index)
        if not self._held_nowhere:
            return
        self._held_nowhere.discard(self._steps[index].pair)
        ready = [w for w in self._waiting_calls if not self._lacking(w.request, w.tokens)]
        self._waiting_calls = [w for w in self._waiting_calls if w not in ready]
        self._keep_events(lambda kind, subject: kind != events.GIVEN_UP or subject not in ready)
        for calls in ready:
            calls.request.pending_parts -= 1
            super().start_calls(calls.request, calls.tokens, again=calls.again)

    def _check_waiting_calls(self) -> None:
        """Fail the requests that wait for what the new migration does not bring."""
        coming = self._pairs_coming()
        hopeless = [
            calls.request
            for calls in self._waiting_calls
            if not self._lacking(calls.request, calls.tokens) <= coming
        ]
        for request in hopeless:
            if request.number in self._admitted:  # it may have waited twice
                self._fail(request, HELD_NOWHERE)

    def _fail(self, request: ActiveRequest, why: int) -> None:
        """A request leaves its place without an answer; the next one of its home is admitted."""
        self._drop_work({request.number})
        self._remove_request(request.number, why)
        if self._admission_queue[request.home]:
            self._admit(self._admission_queue[request.home].popleft())

    # -------------------------------------------------------------------------------------- events

    def process(self, kind: int, subject: Any) -> None:
        if kind != events.GIVEN_UP:
            super().process(kind, subject)
            return
        self._record(kind, subject)
        self._fail(subject.request, WAITED_TOO_LONG)
        self._update_tables()

    def where(self, kind: int, subject: Any) -> tuple[int, int, int, int]:
        if kind == events.GIVEN_UP:
            request = subject.request
            return request.number, request.layer, request.location, request.location
        return super().where(kind, subject)
