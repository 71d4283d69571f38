"""The compiled engine: the event loop and its arrays behind the Engine protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError
from prism_plan.execution_table import TableChange
from prism_plan.migration_step import MigrationStep
from prism_plan.simulate.compiled import engine_state, event_loop
from prism_plan.simulate.compiled.heap import push_event
from prism_plan.simulate.compiled.records import STEP
from prism_plan.simulate.engine_interface import Ints, Outcome, step_dependencies
from prism_plan.simulate.events import ARRIVAL, Event, Log
from prism_plan.simulate.scenario import Scenario

#: Route `cover` tries every set of a token's missing experts; 2^K of them.
MAX_TOP_K = 16
#: Events between two checks of the clock and of Ctrl-C.
CHUNK = 200_000

_FULL = {
    event_loop.HEAP_FULL: "heap",
    event_loop.MESSAGES_FULL: "messages",
    event_loop.LOG_FULL: "log",
}


class CompiledEngine:
    """The compiled :class:`~prism_plan.simulate.engine_interface.Engine`, event for event as plain.

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
        self.scenario = scenario
        self._losses: engine_state.LossArrays | None = None
        self._arrays = engine_state.scenario_arrays(scenario)
        self.set_state(engine_state.initial_state(scenario, log=log))
        if len(scenario.requests):
            push_event(float(scenario.requests.arrival_s[0]), ARRIVAL, 0, self._state.heap)

    def set_state(self, state: engine_state.EngineState) -> None:
        self._state = state
        self._links = engine_state.transfer_arrays(self._arrays, state)

    def advance(self, until_s: float = math.inf, max_events: int | None = None) -> bool:
        left = max_events
        while True:
            before = self._total("processed")
            chunk = CHUNK if left is None else min(left, CHUNK)
            reason = self._run_events(until_s, chunk)
            if left is not None:
                left -= self._total("processed") - before
            if reason == event_loop.NO_EVENT_LEFT:
                break
            if reason == event_loop.LIMIT_REACHED:
                if left == 0:
                    return False
            elif reason == event_loop.TABLES_CHANGED:
                continue
            elif reason == event_loop.LAST_REPLICA_DROPPED:
                raise self._last_replica_dropped()
            elif reason not in _FULL:
                self._react(reason)
            else:
                self.set_state(engine_state.grow(self._state, _FULL[reason]))
        if math.isfinite(until_s):
            self._state.run["now_s"] = max(float(self._state.run["now_s"][0]), until_s)
        return True

    def _run_events(self, until_s: float, most: int) -> int:
        return event_loop.run_events(
            self._arrays, self._state, self._links, until_s, most, self._losses
        )

    def _react(self, reason: int) -> None:
        """Go on where the event loop left it to Python."""
        raise AssertionError(f"the event loop ended for reason {reason}")

    def _total(self, name: str) -> int:
        return int(self._state.run[name][0])

    def _last_replica_dropped(self) -> ValueError:
        index = self._total("failed_step")
        pair = int(self._state.steps["pair"][index])
        return ValueError(f"step {index} drops the only copy of pair {pair}")

    @property
    def all_finished(self) -> bool:
        return self.num_finished == len(self.scenario.requests)

    @property
    def num_finished(self) -> int:
        return self._total("finished")

    @property
    def migrating(self) -> bool:
        return self._total("open_steps") > 0

    @property
    def migration_end_s(self) -> float:
        return float(self._state.run["migration_end_s"][0])

    def migrate(self, steps: Sequence[MigrationStep], change: TableChange | None = None) -> None:
        if self.migrating:
            raise ValueError("a migration is still under way")
        if self.scenario.offload:
            raise ValueError("offloading servers keep what they use; there is nothing to migrate")
        num_needs, dependents = self.dependencies(steps, change)
        end = np.cumsum([len(own) for own in dependents], dtype=np.int64)
        records = np.zeros(len(steps), STEP)
        records["is_load"] = [step.kind == "load" for step in steps]
        records["gpu"] = [step.gpu for step in steps]
        records["pair"] = [step.pair for step in steps]
        records["open_needs"] = num_needs
        records["first_dependent"][1:] = end[:-1]
        records["end_dependent"] = end
        ready = np.flatnonzero(records["open_needs"] == 0)
        queue = np.zeros(len(steps), np.int32)
        queue[: len(ready)] = ready
        self._state = self._state._replace(
            steps=records,
            step_dependents=np.array([i for own in dependents for i in own], np.int32),
            ready_steps=queue,
        )
        self._state.run["open_steps"] = len(steps)
        if not steps:
            self._state.run["migration_end_s"] = self._state.run["now_s"]
        while len(self._state.heap.entries) - int(self._state.heap.counts[0]) <= len(steps):
            self.set_state(engine_state.grow(self._state, "heap"))
        self._state.run["new_steps"] = len(ready)
        if change is not None:
            self._arrays = engine_state.with_table(self._arrays, change.execution)
            last_row = len(self._arrays.execution) - len(change.execution)
            self._state.run["next_table_row"] = last_row
            self._state.run["begins_after"] = change.begins_after
        self._state.run["waits_from"] = len(steps) if change is None else change.waits_from
        self._start_steps()

    def dependencies(
        self, steps: Sequence[MigrationStep], change: TableChange | None
    ) -> tuple[list[int], list[list[int]]]:
        return step_dependencies(steps, change)

    def _start_steps(self) -> None:
        """Start the steps of a migration that can, and a table whose steps are complete."""
        if self._run_events(-math.inf, 0) == event_loop.LAST_REPLICA_DROPPED:
            raise self._last_replica_dropped()

    def tables_in_use(self) -> npt.NDArray[np.int32]:
        requests, servers = self._state.requests, len(self._state.servers)
        running = np.isfinite(requests["start_s"]) & np.isnan(requests["done_s"])
        rows = requests["table_row"][running] // servers * servers
        first_rows = sorted({self._total("table_row"), *rows.tolist()}, reverse=True)
        return np.stack([self._arrays.execution[row : row + servers] for row in first_rows])

    def take_calls(self) -> Ints:
        taken: Ints = self._state.recent_calls.copy()
        self._state.recent_calls[:] = 0
        return taken

    def on_gpu(self) -> npt.NDArray[np.bool_]:
        held: npt.NDArray[np.bool_] = self._state.gpu_holds.copy()
        return held.reshape(self.scenario.placement.on_gpu.shape)

    def log(self) -> Log:
        lines = self._total("log_lines")
        return [Event(*line) for line in self._state.log[:lines].tolist()]

    def outcome(self) -> Outcome:
        s = self._state
        now_s = float(s.run["now_s"][0])
        s.servers["present_s"] += s.servers["num_present"] * (now_s - s.servers["present_since_s"])
        s.servers["present_since_s"] = now_s
        measured = {
            name: of[name].copy()
            for of in (s.requests, s.servers, s.gpus)
            for name in of.dtype.names
            if name in Outcome.__dataclass_fields__
        }
        return Outcome(
            **measured,
            messages=s.messages_sent.copy(),
            hops=s.hops_sent.copy(),
            layer_steps=s.layer_steps.copy(),
            layer_s=s.layer_s.copy(),
            loads=self._total("loads"),
            loaded_bytes=self._total("loaded_bytes"),
            events=self._total("processed"),
            now_s=now_s,
        )
