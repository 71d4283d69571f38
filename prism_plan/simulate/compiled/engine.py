"""The compiled engine: the arrays of `tables` and the loop of `loop` behind the Engine protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.migration_step import MigrationStep
from prism_plan.simulate.compiled import engine_state as tables
from prism_plan.simulate.compiled import event_loop as loop
from prism_plan.simulate.compiled.heap import push
from prism_plan.simulate.compiled.migration_kernels import begin_steps
from prism_plan.simulate.engine import Ints, Outcome
from prism_plan.simulate.events import ARRIVAL, RANK, Event, Log
from prism_plan.simulate.scenario import Scenario

#: Route `cover` tries every set of a token's missing experts; 2^K of them.
MAX_TOP_K = 16
#: Between two looks at the clock and at Ctrl-C.
CHUNK = 200_000

_FULL = {loop.HEAP_FULL: "heap", loop.MESSAGES_FULL: "messages", loop.LOG_FULL: "log"}


class CompiledEngine:
    """See :class:`prism_plan.simulate.engine.Engine`; equal to the reference, event for event.

    Raises
    ------
    InputError
        Route ``cover`` with more than :data:`MAX_TOP_K` experts a token.
    """

    def __init__(self, scenario: Scenario, *, log: bool = False) -> None:
        if scenario.route == "cover" and scenario.model.top_k > MAX_TOP_K:
            raise InputError(
                f"top_k {scenario.model.top_k}",
                parameter="route",
                expected=f"at most {MAX_TOP_K} for route cover",
                remedy="use nearest or spread",
            )
        self.s = scenario
        self._fixed = tables.fixed(scenario)
        self._set(tables.state(scenario, log=log))
        if len(scenario.requests):
            push(
                self._state.heap_s,
                self._state.heap_key,
                self._state.heap_what,
                self._state.number,
                float(scenario.requests.arrival_s[0]),
                int(RANK[ARRIVAL]),
                ARRIVAL,
                0,
            )

    def _set(self, state: tables.State) -> None:
        self._state = state
        self._links = tables.links(self._fixed, state)

    def advance(self, until_s: float = math.inf, max_events: int | None = None) -> bool:
        left = max_events
        while True:
            before = int(self._state.number[tables.TAKEN])
            most = CHUNK if left is None else min(left, CHUNK)
            code = loop.run(self._fixed, self._state, self._links, until_s, most)
            if left is not None:
                left -= int(self._state.number[tables.TAKEN]) - before
            if code == loop.ALL:
                break
            if code == loop.MOST:
                if left == 0:
                    return False
            elif code == loop.UNCOVERED:
                raise self._uncovered()
            else:
                self._set(tables.grown(self._state, _FULL[code]))
        if math.isfinite(until_s):
            self._state.now[0] = max(self._state.now[0], until_s)
        return True

    def _uncovered(self) -> ValueError:
        index = int(self._state.number[tables.ERROR])
        pair = int(self._state.step_pair[index])
        return ValueError(f"step {index} drops the only copy of pair {pair}")

    @property
    def arrivals_done(self) -> bool:
        return self.finished == len(self.s.requests)

    @property
    def finished(self) -> int:
        return int(self._state.number[tables.FINISHED])

    @property
    def migrating(self) -> bool:
        return int(self._state.number[tables.OPEN_STEPS]) > 0

    @property
    def migrated_s(self) -> float:
        return float(self._state.now[1])

    def migrate(self, steps: Sequence[MigrationStep]) -> None:
        if self.migrating:
            raise ValueError("a migration is still under way")
        if self.s.offload:
            raise ValueError("offloading servers keep what they use; there is nothing to migrate")
        lacking = np.array([len(set(step.needs)) for step in steps], np.int32)
        following: list[list[int]] = [[] for _ in steps]
        for index, step in enumerate(steps):
            for need in set(step.needs):
                following[need].append(index)
        start = np.concatenate([[0], np.cumsum([len(f) for f in following])])
        queue = np.zeros(len(steps), np.int32)
        ready = np.flatnonzero(lacking == 0)
        queue[: len(ready)] = ready
        self._state = self._state._replace(
            step_load=np.array([step.kind == "load" for step in steps], np.bool_),
            step_gpu=np.array([step.gpu for step in steps], np.int32),
            step_pair=np.array([step.pair for step in steps], np.int64),
            step_lacking=lacking,
            step_start=start.astype(np.int64),
            step_next=np.array([i for f in following for i in f], np.int32),
            step_queue=queue,
        )
        self._state.number[tables.OPEN_STEPS] = len(steps)
        while len(self._state.heap_s) - int(self._state.number[tables.HEAP]) <= len(steps):
            self._set(tables.grown(self._state, "heap"))
        if not begin_steps(self._fixed, self._state, len(ready)):
            raise self._uncovered()

    def take_calls(self) -> Ints:
        taken: Ints = self._state.called.copy()
        self._state.called[:] = 0
        return taken

    def on_gpu(self) -> npt.NDArray[np.bool_]:
        held: npt.NDArray[np.bool_] = self._state.held.copy()
        return held.reshape(self.s.placement.on_gpu.shape)

    def log(self) -> Log:
        lines = int(self._state.number[tables.LOGGED])
        times = self._state.log_s[:lines].tolist()
        whats = self._state.log_what[:lines].tolist()
        return [Event(time_s, *what) for time_s, what in zip(times, whats, strict=True)]

    def outcome(self) -> Outcome:
        s = self._state
        now = float(s.now[0])
        s.present_s[:] += s.present * (now - s.present_since)
        s.present_since[:] = now
        names = (
            "start_s", "first_token_s", "done_s", "calls", "remote_calls", "steps", "waiting",
            "destinations", "present_s", "bytes_out", "bytes_in", "up_busy_s", "down_busy_s",
            "messages", "gpu_busy_s", "served", "layer_steps", "layer_s",
        )  # fmt: skip
        return Outcome(
            **{name: getattr(s, name).copy() for name in names},
            loads=int(s.number[tables.LOADS]),
            loaded_bytes=int(s.number[tables.LOADED_BYTES]),
            events=int(s.number[tables.TAKEN]),
            now_s=now,
        )
