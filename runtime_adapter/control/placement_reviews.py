"""Periodic reviews: collect the servers' call counts and decide whether to move experts."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible, InputError, UnsupportedFeature
from prism_plan.migration.cost import call_seconds, gpu_load_gbs
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.policy import Review, review
from prism_plan.placement_check import violations
from runtime_adapter.control import log_entries
from runtime_adapter.control.migrations import Migrations
from runtime_adapter.control.run_state import RunState, surviving_cluster
from runtime_adapter.control.table_reviews import require_cache_memory, reviewed_instance

#: Upper bound of calls and of microseconds between two reviews.
MAX_CALLS = 1 << 53

Floats = npt.NDArray[np.float64]


@dataclass(eq=False)
class PendingReview:
    """A review that waits for the servers' call counts; ``at_s`` from the run's start.

    ``calls`` [N, L, E] are those of each home that servers have ``reported`` so far.
    """

    number: int
    at_s: float
    since_s: float
    calls: npt.NDArray[np.int64]
    reported: set[int] = field(default_factory=set)
    times: dict[int, Any] = field(default_factory=dict)


class Reviews:
    """The reviews of a run; ``pending`` is the one in progress.

    ``rates`` [N, L, E] are the calls by which experts are ranked, of all servers of the run.
    """

    def __init__(self, state: RunState, migrations: Migrations) -> None:
        self._state = state
        self._migrations = migrations
        self._shape = state.config.instance.activations.shape
        self._statistics = state.config.options.counting().start(self._shape)
        self.rates: Floats = np.zeros(self._shape)
        self.pending: PendingReview | None = None
        self._num_reviews = 0
        self._reviewed_s: float | None = None

    def begin_when_due(self) -> None:
        """Ask all drivers for their call counts if it is time for a review."""
        state, options = self._state, self._state.config.options
        if options.migrate == "never" or state.start_s is None or state.all_finished:
            return
        now = state.now()
        if now < state.start_s + (self._num_reviews + 1) * options.migrate_every_s:
            return
        # after a long solve the reviews that were missed are left out
        self._num_reviews = int((now - state.start_s) / options.migrate_every_s)
        self.pending = PendingReview(
            self._num_reviews, now - state.start_s, now, np.zeros(self._shape, np.int64)
        )
        state.log.append(log_entries.ReviewStarted(self._num_reviews))

    def forget_pending(self) -> None:
        """End the review in progress without a decision: its log is over."""
        self.pending = None

    # --------------------------------------------------------------------------------- call counts

    def handle(self, entry: log_entries.CallsReported) -> None:
        """Read the counts that a driver has reported; unreadable ones count as none."""
        pending = self.pending
        if pending is None or pending.number != entry.review:
            return
        try:
            calls = self._read_calls(f"calls/{entry.server}/{pending.number}")
            times = self._read_times(f"times/{entry.server}/{pending.number}")
        except InputError as error:
            self._state.report(f"calls of a server are not counted: {error}", once=True)
            calls, times = 0, None
        if entry.server not in pending.reported:
            pending.reported.add(entry.server)
            pending.calls += calls
        if times is not None:
            pending.times[entry.server] = times

    def _read_calls(self, key: str) -> Any:
        """Calls that a server has made since the last review, by home, int64 [N, L, E]."""
        size = 8 * int(np.prod(self._shape))
        source = f"the run's store: {key}"
        try:
            decompressor = zlib.decompressobj()
            raw = decompressor.decompress(self._state.log.get_bytes(key), size)
        except zlib.error as error:
            raise InputError(str(error), source=source) from error
        if len(raw) != size:
            raise InputError(f"{len(raw):,} bytes", source=source, expected=f"{size:,}")
        calls = np.frombuffer(raw, np.int64).reshape(self._shape)
        if (calls < 0).any() or (calls > MAX_CALLS).any():
            raise InputError("numbers of calls", source=source, expected=f"0 to {MAX_CALLS:,}")
        return calls

    def _read_times(self, key: str) -> dict[str, int]:
        """Microseconds of a server's computing and waiting since the last review."""
        times = self._state.log.get(key)
        names = ("compute_us", "waiting_us")
        if not isinstance(times, dict) or any(
            type(times.get(name)) is not int or not 0 <= times[name] < MAX_CALLS for name in names
        ):
            raise InputError(
                f"{times!r:.60}", source=f"the run's store: {key}", expected=" and ".join(names)
            )
        return times

    # ------------------------------------------------------------------------------------ decision

    def finish_when_reported(self) -> None:
        """Finish the pending review once all drivers have reported, or the timeout is over."""
        state, pending = self._state, self.pending
        if pending is None:
            return
        missing = [n for n in state.alive if n not in pending.reported]
        if missing and state.now() - pending.since_s < state.config.timeout_s:
            return
        self.pending = None
        state.log.delete("calls/")
        state.log.delete("times/")
        calls = pending.calls
        previous_s = self._reviewed_s
        if previous_s is None:
            previous_s = state.start_s or 0.0
        self._statistics.add(calls, pending.since_s - previous_s)
        self._reviewed_s = pending.since_s
        self.rates = self._statistics.rates()
        event: dict[str, Any] = {
            "at_s": round(pending.at_s, 6),
            "moved_experts": 0,
            "moved_bytes": 0,
            "decision": "busy",
            "saving_s": None,
            "cost_s": None,
            "finished_at_s": None,
            "servers": [
                {
                    "name": state.config.placement.servers[n],
                    "calls": int(calls[n].sum()),
                    "compute_s": 1e-6 * times["compute_us"],
                    "waiting_s": 1e-6 * times["waiting_us"],
                }
                for n, times in sorted(pending.times.items())
            ],
        }
        if self._migrations.active is None and not state.all_finished:
            self.decide(event)
        self._migrations.events.append(event)
        self._migrations.publish_events()

    def decide(self, event: dict[str, Any]) -> None:
        """Review the placement that is held, and begin a migration where that pays."""
        state, config = self._state, self._state.config
        assert config.model is not None
        assert config.cluster is not None
        event["decision"] = "stay"
        if state.hung:
            state.report(f"no review: {state.hung_text(min(state.hung))}", once=True)
            return
        try:
            instance = reviewed_instance(state)
        except InputError as error:
            state.report(f"no review: {error}", once=True)
            return
        current = state.held_placement(instance)
        for violation in violations(current, instance=instance)[:1]:
            state.report(f"no review: {violation.message}", once=True)
            return
        cluster = surviving_cluster(config.cluster, state.alive)
        rates = self.rates[state.alive]
        try:
            decision: Review = review(
                config.options.policy(), current, rates, instance,
                call_seconds(cluster, config.model), gpu_load_gbs(cluster),
            )  # fmt: skip
            event |= {"saving_s": decision.saving_s, "cost_s": decision.cost_s}
            if decision.target is None:
                return
            table = decision.target.execution_table
            if state.all_up and not np.array_equal(table, state.table):
                require_cache_memory(config, [state.table, table])
            plan = migration_plan(
                current, decision.target, gpu_capacity=instance.gpu_capacity,
                forbidden=instance.mask(instance.forbidden), priority=rates,
                min_replicas=instance.min_replicas,
            )  # fmt: skip
        except (Infeasible, InputError, UnsupportedFeature) as error:
            state.report(f"a move was not made: {error}", once=True)
            return
        event |= {
            "decision": "move",
            "moved_experts": decision.moved_experts,
            "moved_bytes": decision.moved_bytes,
        }
        self._statistics.moved()
        self._migrations.begin(plan, decision.target, event=event)
