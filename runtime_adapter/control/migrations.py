"""The migration of a run that is in progress: how the scheduler starts, stops and ends it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import InputError, LimitReached, PrismError
from prism_plan.execution_table import home_execution
from prism_plan.instance import Instance
from prism_plan.io.migration import migration_to_json
from prism_plan.io.placement import placement_from_json, placement_to_json, write_placement
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration.replica_dips import dips_text
from prism_plan.model_spec import require_same_model
from prism_plan.placement import Placement, SolveReport
from prism_plan.placement_check import violations
from runtime_adapter.control import log_entries
from runtime_adapter.control.event_log import NewLog
from runtime_adapter.control.run_state import RunState
from runtime_adapter.control.table_reviews import require_cache_memory
from runtime_adapter.log_output import log_warning
from runtime_adapter.transport.rendezvous import RuntimeFailure

#: What a scheduler leaves in the store for one that is started after it has died.
STATE = "scheduler/state"

#: What errors call the placement that is held, and the target.
NAMES = ("what the servers hold now", "the placement")


@dataclass(eq=False)
class _ActiveMigration:
    """A migration in progress; ``left`` are the steps that are not done.

    It was requested by the move ``requested_by``, or decided by the review of ``event``, or is a
    ``repair``. ``taking_part`` are the servers that do its steps. Of one that an earlier scheduler
    began, which is only stopped, neither target nor steps are known.
    """

    number: int
    target: Placement | None
    left: set[int]
    loads: int
    loaded_bytes: int
    begun_s: float
    taking_part: set[int]
    requested_by: str | None = None
    event: dict[str, Any] | None = None
    repair: bool = False
    stopped_s: float | None = None
    reason: str = ""
    stopped_servers: set[int] = field(default_factory=set)


class Migrations:
    """The migrations of a run, one at a time; ``active`` is the one in progress.

    ``events`` are the reviews' decisions, as a simulation's report has them. ``repaired`` says how
    the last repair ended: ``None`` while it goes on, and where none was begun since it was read.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self.active: _ActiveMigration | None = None
        self.events: list[dict[str, Any]] = []
        self.repaired: bool | None = None
        self._num_migrations = 0
        self._num_files = 0
        self._is_new = True
        self._inherited: list[int] = []  # migrations of an earlier scheduler that are still open

    # ----------------------------------------------------------------------------- the log begins

    def begin_log(self, new: NewLog) -> None:
        """Give up the active migration; close those that the log has open."""
        if self._is_new:
            self._read_state()
            self._is_new = False
        if self.active is not None:
            self._end_with_its_log(self.active)
            self.active = None
        self._num_migrations = max([self._num_migrations, *new.open_plans])
        self._write_state()
        if self.events:
            self.publish_events()
        self._inherited = sorted(new.open_plans)
        self.stop_inherited()

    def _end_with_its_log(self, active: _ActiveMigration) -> None:
        """Say how the migration ended whose log is over."""
        if active.left:
            self._forget_target()
            text = (
                f"migration {active.number} is abandoned: the store of the run was restarted, or "
                "the scheduler could not follow it; some experts may have moved"
            )
        else:
            self._reach(active)
            if not active.repair:
                self._begin_table(active)
            text = f"migration {active.number} is done"
        if active.repair:
            self.repaired = not active.left
        if active.requested_by is not None:
            self.answer(active.requested_by, 5 if active.left else 0, text)
        self._state.report(text)

    def stop_inherited(self) -> None:
        """Stop the next migration of an earlier scheduler, which nobody knows how to go on with."""
        if self.active is not None or not self._inherited:
            return
        state, number = self._state, self._inherited.pop(0)
        self.active = _ActiveMigration(number, None, {-1}, 0, 0, state.now(), set(state.alive))
        self._forget_target()
        self.stop("the scheduler of the run was started anew")

    def _read_state(self) -> None:
        """Continue where an earlier scheduler of this run ended."""
        log = self._state.log
        try:
            if not log.has(STATE):
                return
            found = log.get(STATE)
            placement = placement_from_json(found["placement"], f"the run's store: {STATE}")
            if found["known"] and placement.on_gpu.shape == self._state.placement.on_gpu.shape:
                self._state.placement, self._state.placement_known = placement, True
            self._num_migrations = int(found["migrations"])
            self._num_files = int(found["files"])
            if log.has("migrations"):
                events = log.get("migrations")
                self.events = [event for event in events if isinstance(event, dict)]
        except (InputError, KeyError, TypeError, ValueError) as error:
            self._state.placement_known = False
            self._state.report(f"what an earlier scheduler has left cannot be read: {error}")

    def _write_state(self) -> None:
        values = {
            "placement": placement_to_json(self._state.placement),
            "known": self._state.placement_known,
            "migrations": self._num_migrations,
            "files": self._num_files,
        }
        self._state.log.put(STATE, values)

    # -------------------------------------------------------------------------- while one goes on

    def handle(self, entry: log_entries.LogEntry, changed: list[int]) -> None:
        """Note the progress that an entry announces; ``changed`` are servers that came or went."""
        active = self.active
        if isinstance(entry, log_entries.MigrationStarted):
            if entry.plan > self._num_migrations:
                # a stranger's: drivers would wait for its end
                text = "a migration that the scheduler has not planned"
                self._state.log.append(log_entries.MigrationFinished(entry.plan, False, text))
            elif (
                active is not None
                and entry.plan == active.number
                and (self._state.last_change >= entry.read)
            ):
                self.stop("what servers hold changed while it was planned")
            return
        if active is None:
            return
        for server in changed:
            active.taking_part.discard(server)
            self.stop(self._change_text(server))
        if getattr(entry, "plan", None) != active.number:
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

    def _change_text(self, server: int) -> str:
        name = self._state.config.placement.servers[server]
        came = server in self._state.alive
        return f"server {name!r} has joined" if came else f"server {name!r} is lost"

    def begin(
        self, plan: MigrationPlan, target: Placement, *, requested_by: str | None = None,
        event: dict[str, Any] | None = None, repair: bool = False,
    ) -> None:  # fmt: skip
        """Start a migration that is planned among the servers that are up."""
        state = self._state
        self._num_migrations += 1
        number = self._num_migrations
        try:
            state.log.delete("plan/")  # that of the one before
            state.log.put(f"plan/{number}", migration_to_json(plan))
            self._write_state()
        except (InputError, LimitReached) as error:  # it is too long for the store
            state.report(f"migration {number} was not begun: {error}")
            if repair:
                self.repaired = False
            if requested_by is not None:
                self.answer(requested_by, 5, f"not begun: {error}")
            return
        self.active = _ActiveMigration(
            number, target, set(range(len(plan.steps))), plan.loads, plan.moved_bytes,
            state.now(), set(state.alive), requested_by, event, repair,
        )  # fmt: skip
        if repair:
            self.repaired = None
        if plan.dips:
            state.report(f"migration {number}: {dips_text(plan)}")
        state.log.append(log_entries.MigrationStarted(number, state.read))

    def stop(self, reason: str) -> None:
        """Let servers begin no further step of the active migration."""
        active = self.active
        if active is None or active.stopped_s is not None:
            return
        reason = reason[: log_entries.MAX_TEXT // 2]
        active.stopped_s, active.reason = self._state.now(), reason
        self._state.log.append(log_entries.StopRequested(active.number, reason))

    def end_when_done(self) -> None:
        """End the active migration if every step is done, or no server is at a step any more."""
        state, active = self._state, self.active
        if active is None or (active.left and active.stopped_s is None):
            return
        now = state.now()
        if active.left and active.stopped_s is not None:
            limit_s = 2 * state.config.timeout_s
            waiting_for = active.taking_part - active.stopped_servers
            if waiting_for and now - active.stopped_s < limit_s:
                return
        complete = not active.left
        if complete:
            self._reach(active)
            text = (
                f"migration {active.number} is done: {active.loads} experts loaded, "
                f"{active.loaded_bytes:,} bytes, in {now - active.begun_s:.2f} s"
            )
        else:
            self._forget_target()
            left = f", {len(active.left)} steps were left" if active.target is not None else ""
            text = f"migration {active.number} is abandoned{left}: {active.reason}"
        if active.repair:
            self.repaired = complete
            text += " (a repair)"
        if complete and not active.repair:
            self._begin_table(active)
        written = self._write_placement()
        self._write_state()
        state.log.append(log_entries.MigrationFinished(active.number, complete, text))
        state.report(text + (f"; {written}" if written else ""))
        if active.event is not None:
            if complete and state.start_s is not None:
                active.event["finished_at_s"] = round(now - state.start_s, 6)
            self.publish_events()
        if active.requested_by is not None:
            self.answer(active.requested_by, 0 if complete else 5, text)
        self.active = None  # not before: if the store is restarted meanwhile, all this is due again

    def _begin_table(self, active: _ActiveMigration) -> None:
        """Let requests that start from now on execute as the target says."""
        state, target = self._state, active.target
        assert target is not None
        table = _table_of_run(state, target)
        if not np.array_equal(table, state.table):
            state.log.append(log_entries.TableBegan(active.number, table.tolist()))
            state.table = table  # not before: a store that has died by now has not begun it

    def _reach(self, active: _ActiveMigration) -> None:
        """Remember the target as what servers are to hold, also when they come back.

        A repair among some of the servers is not: when all are there, all is as it was.
        """
        state, target = self._state, active.target
        assert target is not None
        if target.num_servers == state.config.placement.num_servers:
            state.placement, state.placement_known = target, True
        elif not active.repair:
            on_gpu = state.placement.on_gpu.copy()
            for n, name in enumerate(target.servers):
                gpus = state.config.placement.gpus_of(state.placement.servers.index(name))
                on_gpu[gpus] = target.on_gpu[target.gpus_of(n)]
            plan = target.plan
            if active.requested_by is None:  # replicas were limited by the servers that are there
                plan = replace(plan, min_replicas=state.placement.plan.min_replicas)
            state.placement = state.placement.replace(on_gpu=on_gpu, plan=plan)

    def _forget_target(self) -> None:
        """What is held is no solver's placement any more."""
        state = self._state
        old = state.placement.plan
        interrupted = SolveReport("interrupted", seed=old.seed, min_replicas=old.min_replicas)
        state.placement = state.placement.replace(plan=interrupted)

    def publish_events(self) -> None:
        """Write the reviews' decisions to the store."""
        self._state.log.put("migrations", self.events)

    def _write_placement(self) -> str:
        """Write what is held to a new file; returns its name, or what went wrong."""
        state, folder = self._state, self._state.config.placements_dir
        if folder is None or not state.alive:
            return ""
        path = self._next_file(Path(folder))
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_placement(path, state.held_placement(state.instance))
        except (OSError, PrismError) as error:
            text = f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}"
            log_warning(text)  # it is on the store's machine
            return text
        return str(path)

    def _next_file(self, folder: Path) -> Path:
        """The next number that no file has: an earlier run, or store, may have written some."""
        while True:
            self._num_files += 1
            path = folder / f"placement-{self._num_files}.json"
            if not os.path.lexists(path):
                return path

    # ----------------------------------------------------------------------------- requested moves

    def begin_requested(self, move: str, rates: Any) -> None:
        """Start the move that somebody has requested, or refuse it.

        ``rates`` [N, L, E] are the calls of the servers that are alive: the most called load first.
        """
        state = self._state
        if state.left:
            self.answer(move, 5, "refused: the run is ending")
            return
        try:
            instance = state.instance
            target = _target(state, placement_from_json(state.log.get(f"move/{move}")), instance)
            _require_same_caches(state.config.kv_tokens, target)
            table = _table_of_run(state, target)
            if not np.array_equal(table, state.table):
                require_cache_memory(state.config, [state.table, table])
            plan = migration_plan(
                state.held_placement(instance), target, gpu_capacity=instance.gpu_capacity,
                forbidden=instance.mask(instance.forbidden), priority=rates,
                min_replicas=target.plan.min_replicas, names=NAMES,
            )  # fmt: skip
        except RuntimeFailure:
            raise
        except PrismError as error:
            self.answer(move, error.exit_code, f"refused: {error}")
            return
        if state.all_finished:
            self.answer(move, 5, "refused: the run is ending")
        elif state.hung:
            self.answer(move, 5, f"refused: {state.hung_text(min(state.hung))}")
        else:
            self.begin(plan, target, requested_by=move)

    def answer(self, move: str, code: int, text: str) -> None:
        """Tell who asked for a move how it ended."""
        text = text[: log_entries.MAX_TEXT]
        self._state.log.append(log_entries.MoveFinished(move, code, text))
        self._state.log.delete(f"move/{move}")


def _table_of_run(state: RunState, target: Placement) -> npt.NDArray[np.int32]:
    """The execution table of a target for all servers of the run, int32 [N, L].

    Requests of those that it does not have would execute at home.
    """
    table = home_execution(*state.table.shape)
    places = [state.config.placement.servers.index(name) for name in target.servers]
    table[places] = np.array(places)[target.execution_table]
    return table


def _require_same_caches(kv_tokens: Mapping[str, int], target: Placement) -> None:
    """Refuse a plan that is made for other caches than the run's servers bound.

    Raises
    ------
    InputError
        Names the first home whose ``kv_tokens`` differ.
    """
    for name in target.servers if target.kv_tokens else ():
        given, own = target.kv_tokens.get(name, 0), kv_tokens.get(name, 0)
        if given != own:
            raise InputError(
                f"{given:,} of {name!r}",
                source=NAMES[1],
                place="kv_tokens",
                expected=f"{own:,}, with which the run has started" if own
                else "none, as the run has started without",
                remedy="plan with these, or start the run again",
            )  # fmt: skip


def _target(state: RunState, requested: Placement, instance: Instance) -> Placement:
    """The requested placement with the run's servers in their order.

    Raises
    ------
    InputError
        It is for other servers or another model, or breaks a rule.
    """
    require_same_model(requested.model, instance.model, source=NAMES[1], other=NAMES[0])
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
    place = np.argsort(order)  # of the requested placement's servers among the run's
    gpus = np.concatenate([requested.gpus_of(n) for n in order])
    target = requested.replace(
        servers=instance.servers,
        gpu_capacity=tuple(requested.gpu_capacity[n] for n in order),
        on_gpu=requested.on_gpu[gpus],
        execution=place[requested.execution_table[order]],
    )
    replicas = instance.replace(min_replicas=requested.plan.min_replicas)
    for violation in violations(target, instance=replicas)[:1]:
        raise InputError(violation.message, source=NAMES[1], place="servers")
    return target.replace(gpu_capacity=instance.gpu_capacity)
