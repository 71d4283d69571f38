"""The migration of a run that is in progress: how the scheduler starts, stops and ends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prism_plan.errors import InputError, PrismError
from prism_plan.instance import Instance
from prism_plan.io.migration import migration_to_json
from prism_plan.io.placement import placement_from_json, write_placement
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration.replica_dips import dips_text
from prism_plan.model_spec import require_same_model
from prism_plan.placement import Placement, SolveReport, require_home_execution
from prism_plan.placement_check import violations
from runtime_adapter.control import log_entries
from runtime_adapter.control.event_log import StoreLost
from runtime_adapter.control.run_state import RunState

#: What errors call the placement that is held, and the target.
NAMES = ("what the servers hold now", "the placement")


@dataclass(eq=False)
class _ActiveMigration:
    """A migration in progress; ``left`` are the steps that are not done.

    It was requested by the move ``requested_by``, or decided by the review of ``event``.
    """

    number: int
    target: Placement
    left: set[int]
    loads: int
    loaded_bytes: int
    begun_s: float
    requested_by: str | None = None
    event: dict[str, Any] | None = None
    stopped_s: float | None = None
    reason: str = ""
    stopped_servers: set[int] = field(default_factory=set)


class Migrations:
    """The migrations of a run, one at a time; ``active`` is the one in progress.

    ``events`` are the reviews' decisions, as a simulation's report has them.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self.active: _ActiveMigration | None = None
        self.events: list[dict[str, Any]] = []
        self._num_migrations = 0
        self._num_files = 0

    def handle(self, entry: log_entries.LogEntry) -> None:
        """Note the progress that an entry announces."""
        active = self.active
        if isinstance(entry, log_entries.MigrationStarted) and entry.plan > self._num_migrations:
            # a stranger's: drivers would wait for its end
            text = "a migration that the scheduler has not planned"
            self._state.log.append(log_entries.MigrationFinished(entry.plan, False, text))
        if active is None or getattr(entry, "plan", None) != active.number:
            return
        match entry:
            case log_entries.ExpertsLoaded():
                active.left.difference_update(change.step for change in entry.experts)
            case log_entries.SlotsFreed():
                active.left.difference_update(entry.steps)
            case log_entries.StepFailed():
                self.stop(f"server {entry.server!r}: {entry.reason}")
            case log_entries.ServerStopped():
                active.stopped_servers.add(entry.server)

    def begin(
        self, plan: MigrationPlan, target: Placement, *, requested_by: str | None = None,
        event: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Start a migration that is planned among the servers that are alive."""
        state = self._state
        self._num_migrations += 1
        number = self._num_migrations
        self.active = _ActiveMigration(
            number, target, set(range(len(plan.steps))), plan.loads, plan.moved_bytes,
            state.now(), requested_by, event,
        )  # fmt: skip
        if plan.dips:
            state.report(f"migration {number}: {dips_text(plan)}")
        state.log.put(f"plan/{number}", migration_to_json(plan))
        state.log.append(log_entries.MigrationStarted(number))

    def stop(self, reason: str) -> None:
        """Let servers begin no further step of the active migration."""
        active = self.active
        if active is None or active.stopped_s is not None:
            return
        active.stopped_s, active.reason = self._state.now(), reason
        self._state.log.append(log_entries.StopRequested(active.number, reason))

    def end_when_done(self) -> None:
        """End the active migration if every step is done, or no server is at a step any more."""
        state, active = self._state, self.active
        if active is None or (active.left and active.stopped_s is None):
            return
        now = state.now()
        if active.left and active.stopped_s is not None:
            limit_s = 2 * state.config.rendezvous.timeout_s
            waiting_for = set(state.alive) - active.stopped_servers
            if waiting_for and now - active.stopped_s < limit_s:
                return
        self.active = None
        complete = not active.left
        if complete:
            state.placement = active.target
            text = (
                f"migration {active.number} is done: {active.loads} experts loaded, "
                f"{active.loaded_bytes:,} bytes, in {now - active.begun_s:.2f} s"
            )
        else:
            old = state.placement.plan
            interrupted = SolveReport("interrupted", seed=old.seed, min_replicas=old.min_replicas)
            state.placement = state.placement.replace(plan=interrupted)
            text = (
                f"migration {active.number} is abandoned, {len(active.left)} steps were left: "
                f"{active.reason}"
            )
        written = self._write_placement()
        state.log.append(log_entries.MigrationFinished(active.number, complete, text))
        state.report(text + (f"; {written}" if written else ""))
        if active.event is not None:
            if complete and state.start_s is not None:
                active.event["finished_at_s"] = round(now - state.start_s, 6)
            self.publish_events()
        if active.requested_by is not None:
            self._answer(active.requested_by, 0 if complete else 5, text)

    def publish_events(self) -> None:
        """Write the reviews' decisions to the store."""
        self._state.log.put("migrations", self.events)

    def _write_placement(self) -> str:
        """Write what is held to a new file; returns its name, or what went wrong."""
        state, folder = self._state, self._state.config.placements_dir
        if folder is None:
            return ""
        self._num_files += 1
        path = Path(folder) / f"placement-{self._num_files}.json"
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_placement(path, state.held_placement(state.instance))
        except (OSError, PrismError) as error:
            return f"{path}: {error}"
        return str(path)

    # ----------------------------------------------------------------------------- requested moves

    def begin_requested(self, move: str, rates: Any) -> None:
        """Start the move that somebody has requested, or refuse it.

        ``rates`` [N, L, E] are the calls of the servers that are alive: the most called load first.
        """
        state = self._state
        try:
            instance = state.instance
            target = _target(state, placement_from_json(state.log.get(f"move/{move}")), instance)
            plan = migration_plan(
                state.held_placement(instance), target, gpu_capacity=instance.gpu_capacity,
                forbidden=instance.mask(instance.forbidden), priority=rates,
                min_replicas=target.plan.min_replicas, names=NAMES,
            )  # fmt: skip
        except StoreLost:
            raise
        except PrismError as error:
            self._answer(move, error.exit_code, f"refused: {error}")
            return
        if state.all_finished:
            self._answer(move, 5, "refused: the run is ending")
        elif state.hung:
            self._answer(move, 5, f"refused: {state.hung_text(min(state.hung))}")
        else:
            self.begin(plan, target, requested_by=move)

    def _answer(self, move: str, code: int, text: str) -> None:
        self._state.log.append(log_entries.MoveFinished(move, code, text))


def _target(state: RunState, requested: Placement, instance: Instance) -> Placement:
    """The requested placement with the run's servers in their order.

    Raises
    ------
    InputError
        It is for other servers or another model, or breaks a rule.
    """
    require_same_model(requested.model, instance.model, source=NAMES[1], other=NAMES[0])
    require_home_execution(requested, source=NAMES[1])
    lost = [name for name in state.config.placement.servers if name not in instance.servers]
    if set(requested.servers) != set(instance.servers):
        raise InputError(
            f"{sorted(requested.servers)}",
            source=NAMES[1],
            place="servers",
            expected=f"{sorted(instance.servers)}"
            + (f", for {', '.join(lost)} is lost" if lost else ""),
        )
    order = [requested.servers.index(name) for name in instance.servers]
    gpus = np.concatenate([requested.gpus_of(n) for n in order])
    target = requested.replace(
        servers=instance.servers,
        gpu_capacity=tuple(requested.gpu_capacity[n] for n in order),
        on_gpu=requested.on_gpu[gpus],
    )
    replicas = instance.replace(min_replicas=requested.plan.min_replicas)
    for violation in violations(target, instance=replicas)[:1]:
        raise InputError(violation.message, source=NAMES[1], place="servers")
    return target.replace(gpu_capacity=instance.gpu_capacity)
