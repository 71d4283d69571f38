"""Runs the simulation of one placement: events, reviews and migrations until the last request."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from prism_plan.cluster import Cluster
from prism_plan.errors import Infeasible
from prism_plan.evaluate.simulation_options import SimulationOptions
from prism_plan.instance import Instance
from prism_plan.migration.cost import call_seconds, gpu_load_gbs
from prism_plan.migration.policy import review
from prism_plan.migration.replica_dips import dips_text
from prism_plan.migration.staged import staged_migration
from prism_plan.placement import Placement
from prism_plan.printable_text import quantity
from prism_plan.simulate.compiled.compiled_engine import CHUNK, CompiledEngine
from prism_plan.simulate.engine_interface import Engine, Outcome
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.simulate.report import ReviewRecord, SimulationRun
from prism_plan.simulate.scenario import Scenario

ENGINES: Mapping[str, Callable[[Scenario], Engine]] = {
    "compiled": CompiledEngine,
    "reference": ReferenceEngine,
}
#: Events between two checks of the clock; the reference engine is hundreds of times slower.
REFERENCE_CHUNK = 2000


class _TimeLimitReached(Exception):
    """The wall-clock time limit of the simulation."""


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of the block, so that no event is left half processed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # other threads receive no signals
        return
    handlers: dict[int, Any] = {}
    received: list[tuple[Any, ...]] = []
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda *signaled: received.append(signaled))
        yield
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)
    for signaled in received:
        handlers[signaled[0]](*signaled)


@dataclass(eq=False)
class SimulationRunner:
    """Simulates one placement from the first arrival to the last request, with reviews.

    ``instance`` has the rules that migrations keep.
    """

    name: str
    placement: Placement
    scenario: Scenario
    instance: Instance
    cluster: Cluster
    options: SimulationOptions
    progress: Callable[[int], None]
    deadline: float

    def __post_init__(self) -> None:
        self.engine = self._new_engine()
        self.migrations: list[ReviewRecord] = []
        self.notes: list[str] = []
        self.dips: list[str] = []  # of each move that does not keep all replicas
        self.interrupted = False
        self.call_s = call_seconds(self.cluster, self.scenario.model)
        self.load_gbs = gpu_load_gbs(self.cluster)

    def _new_engine(self) -> Engine:
        return ENGINES[self.options.engine](self.scenario)

    def run(self) -> SimulationRun:
        """Simulate; Ctrl-C is raised before the first event, and later ends the run."""
        begin = time.perf_counter()
        partial = False
        try:
            self._advance_to_end()
        except _TimeLimitReached:
            partial = True
        except KeyboardInterrupt:
            if not self.engine.outcome().events:
                raise
            partial = self.interrupted = True
        self._record_migration_end()
        if self.dips:
            more = len(self.dips) - 1
            others = f"; so it was in {quantity(more, 'other move')}" if more else ""
            self.notes.append(f"during a move {self.dips[0]}{others}")
        return SimulationRun(
            placement=self.name,
            solver=self.placement.plan.solver,
            scenario=self.scenario,
            outcome=self._outcome(),
            experts=self.engine.on_gpu().sum(axis=(1, 2)),
            migrations=tuple(self.migrations),
            partial=partial,
            runtime_s=time.perf_counter() - begin,
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _advance_to_end(self) -> None:
        if self.options.migrate == "never" or self.scenario.offload:
            self._advance(math.inf)
        else:
            self._advance_with_reviews()

    def _advance(self, until_s: float) -> None:
        compiled = self.options.engine == "compiled"
        done = False
        while not done:
            with self._uninterrupted():
                done = self.engine.advance(until_s, CHUNK if compiled else REFERENCE_CHUNK)
            self.progress(self.engine.num_finished)
            if time.monotonic() > self.deadline and not (done and math.isinf(until_s)):
                raise _TimeLimitReached

    def _uninterrupted(self) -> AbstractContextManager[None]:
        """In which no event is left half processed by a signal."""
        if self.options.engine == "compiled":  # it returns to Python only between events
            return contextlib.nullcontext()
        return signals_deferred()

    def _advance_with_reviews(self) -> None:
        every_s = self.options.migrate_every_s
        policy = self.options.policy()
        statistics = self.options.counting().start(self.instance.activations.shape)
        limits = self.instance.with_execution(self.placement.execution_table, self.scenario.model)
        current = self.placement.replace(gpu_capacity=limits.gpu_capacity)
        reviews = 0
        while not self.engine.all_finished:
            reviews += 1
            at_s = reviews * every_s
            self._advance(at_s)
            if self.engine.all_finished:
                break
            statistics.add(self.engine.take_calls(), every_s)
            if self.engine.migrating:
                self.migrations.append(ReviewRecord(at_s, 0, 0, "busy", None, None))
                continue
            self._record_migration_end()
            rates = statistics.rates()
            try:
                reviewed = review(policy, current, rates, self.instance, self.call_s, self.load_gbs)
            except Infeasible as error:  # the caches of its table leave the candidate no room
                self.notes.append(f"a move was not made: {error}")
                self.migrations.append(ReviewRecord(at_s, 0, 0, "stay", None, None))
                continue
            moved = reviewed.target is not None and self._start_migration(
                current, reviewed.target, rates
            )
            if moved and reviewed.target is not None:
                current = reviewed.target
                statistics.moved()
            self.migrations.append(
                ReviewRecord(
                    at_s=at_s,
                    moved_experts=reviewed.moved_experts if moved else 0,
                    moved_bytes=reviewed.moved_bytes if moved else 0,
                    decision="move" if moved else "stay",
                    saving_s=reviewed.saving_s,
                    cost_s=reviewed.cost_s,
                )
            )
        self._advance(math.inf)

    def _start_migration(self, current: Placement, target: Placement, rates: Any) -> bool:
        """Start a migration; False if there is no order in which its steps can be done."""
        try:
            plan = staged_migration(
                current,
                target,
                self.engine.tables_in_use(),
                self.instance,
                self.scenario.model,
                rates=rates,
            )
        except Infeasible as error:
            self.notes.append(f"a move was not made: {error}")
            return False
        if plan.dips:
            self.dips.append(dips_text(plan))
        self.engine.migrate(plan.steps, plan.change)
        return True

    def _outcome(self) -> Outcome:
        """The measurements up to the last event rather than the last review."""
        outcome = self.engine.outcome()
        if not self.engine.all_finished or self.engine.migrating:
            return outcome
        end_s = max(float(outcome.done_s.max(initial=0.0)), self.engine.migration_end_s)
        return dataclasses.replace(outcome, now_s=min(outcome.now_s, end_s))

    def _record_migration_end(self) -> None:
        """Enter the end of the latest migration into its review, once it is complete."""
        if self.engine.migrating:
            return
        for index, migration in reversed(list(enumerate(self.migrations))):
            if migration.decision == "move":
                if migration.finished_at_s is None:
                    self.migrations[index] = dataclasses.replace(
                        migration, finished_at_s=self.engine.migration_end_s
                    )
                break
