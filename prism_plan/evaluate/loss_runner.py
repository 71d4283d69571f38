"""Runs the simulation of one placement whose servers are lost and come back.

The rules stand in docs/design.md, section 4, *Lost servers*.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible, LimitReached
from prism_plan.evaluate.loss_tables import LossTables
from prism_plan.evaluate.simulation_runner import SimulationRunner, signals_deferred
from prism_plan.execution_table import moved_activations
from prism_plan.instance import Instance
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.repair import missing_text, repair_placement
from prism_plan.migration.replica_dips import dips_text
from prism_plan.migration_step import MigrationStep
from prism_plan.placement import Placement
from prism_plan.simulate.compiled.compiled_losses import CompiledEngineWithLosses
from prism_plan.simulate.engine_interface import EngineWithLosses, Outcome
from prism_plan.simulate.loss_report import Losses, LossRecord
from prism_plan.simulate.losses import LossEvent, LossPlan
from prism_plan.simulate.reference_losses import ReferenceEngineWithLosses
from prism_plan.simulate.report import SimulationRun

ENGINES: Mapping[str, Callable[..., EngineWithLosses]] = {
    "compiled": CompiledEngineWithLosses,
    "reference": ReferenceEngineWithLosses,
}

Capacity = tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class LossRunner(SimulationRunner):
    """Simulates one placement with losses, repairs and returns.

    ``not_served`` counts the arrivals that were left out, for their home server is away.
    """

    plan: LossPlan
    not_served: int

    def __post_init__(self) -> None:
        super().__post_init__()
        model, seed = self.scenario.model, self.options.seed
        self._tables = LossTables(self.placement, self.instance, model, seed)
        self._records = [
            LossRecord(loss.server, loss.at_s, loss.return_s) for loss in self.plan.losses
        ]
        self._away: set[int] = set()  # as the others know
        self._unready: set[int] = set()  # back, but without their experts so far
        self._repaired_by_next: set[int] = set()  # losses that are over with the next repair
        self._calls = np.zeros(self.instance.activations.shape)
        # the loss whose repair or return is under way, and the field of its record for the end
        self._repairing: tuple[int, str] | None = None

    def _new_engine(self) -> EngineWithLosses:
        self._engine = ENGINES[self.options.engine](
            self.scenario, request_timeout_s=self.plan.request_timeout_s
        )
        return self._engine

    def _uninterrupted(self) -> AbstractContextManager[None]:
        return signals_deferred()  # both engines do what losses need in Python

    def run(self) -> SimulationRun:
        """As :meth:`SimulationRunner.run`; the run tells of its losses."""
        run = super().run()
        self._record_end_of_repair()
        losses = Losses(tuple(self._records), self._engine.losses(), self.not_served)
        return dataclasses.replace(run, losses=losses, notes=tuple(dict.fromkeys(self.notes)))

    def _advance_to_end(self) -> None:
        for event in self.plan.events(self.placement.servers):
            self._advance(event.at_s)
            if self.engine.all_finished:
                self._note_what_comes_too_late(event)
                break
            with self._uninterrupted():
                self._record_end_of_repair()
                if event.kind == "loss":
                    self._engine.lose(event.server)
                else:
                    self._repair(event)
        self._advance(math.inf)

    def _note_what_comes_too_late(self, event: LossEvent) -> None:
        name = self.placement.servers[event.server]
        self.notes.append(
            f"no request was left at the {event.kind} of {name!r} at {event.at_s:g} s"
        )

    def _outcome(self) -> Outcome:
        """The measurements up to the last answer, departure or load."""
        outcome = self.engine.outcome()
        if not self.engine.all_finished or self.engine.migrating:
            return outcome
        ends_s = (outcome.done_s, self._engine.losses().left_s, [self.engine.migration_end_s])
        end_s = float(np.nanmax(np.concatenate(ends_s)))
        return dataclasses.replace(outcome, now_s=min(outcome.now_s, end_s))

    def _repair(self, event: LossEvent) -> None:
        """All servers know of a loss or a return: move experts, and where layers execute."""
        lost = event.kind == "notice"
        if lost:
            self._away.add(event.server)
            self._unready.discard(event.server)
            self._set_record(event.number, "noticed_s", event.at_s)
            returns = self._records[event.number].return_s is not None
        else:
            returns = False
            self._away.discard(event.server)
            self._unready.add(event.server)
        planned = self.placement.on_gpu
        held = self._living(self.engine.on_gpu())
        if lost:  # those that came back before go on to get their share
            wanted = self._living(np.where(self._gpus_of(self._unready), planned, held.on_gpu))
        else:
            wanted = self._living(planned)
        rules, rates = self._rules(held, wanted), self._rates(event.at_s)
        target, steps = self._move(held, wanted, rules, rates)
        if lost and (missing := missing_text(target, rules)):
            name = self.placement.servers[event.server]
            self.notes.append(f"after the loss of {name!r} {missing}")
        table = self._tables.table(target, self._away | self._unready)
        later = self._tables.table(target, self._away)
        self._require_room_for_caches(target, table)
        do = self._engine.notice if lost else self._engine.rejoin
        do(event.server, steps, table, None if np.array_equal(later, table) else later)
        self._repairing = event.number, "repaired_s" if lost else "restored_s"
        if not returns:
            self._repaired_by_next.add(event.number)

    # ------------------------------------------------------------------------------- what is moved

    def _gpus_of(self, servers: set[int]) -> npt.NDArray[np.bool_]:
        """Which GPUs belong to some servers, bool [G, 1, 1]."""
        return np.isin(self.placement.server_of_gpu, sorted(servers))[:, None, None]

    def _living(self, on_gpu: npt.NDArray[np.bool_]) -> Placement:
        """A placement of experts at servers that are not known to be away."""
        return self.placement.replace(on_gpu=on_gpu & ~self._gpus_of(self._away))

    def _rules(self, *placements: Placement) -> Instance:
        """The rules for servers that are not away, with room for what placements have anyway.

        Capacities are those that the KV caches of the planned table leave.
        """
        limits = self.instance.with_execution(
            self.placement.execution_table, self.scenario.model
        ).gpu_capacity
        used = np.max([p.on_gpu.sum(axis=2) @ self.instance.expert_size for p in placements], 0)
        least = iter(used.tolist())
        capacity = tuple(
            tuple(max(slots, next(least)) * (n not in self._away) for slots in gpus)
            for n, gpus in enumerate(limits)
        )
        living = self.placement.num_servers - len(self._away)
        return self.instance.replace(
            gpu_capacity=capacity,
            min_replicas=min(self.instance.min_replicas, living),
            pinned=tuple(pin for pin in self.instance.pinned if pin[0] not in self._away),
        )

    def _rates(self, now_s: float) -> npt.NDArray[np.float64]:
        """Calls per second so far, where they are made by the planned table, [N, L, E]."""
        self._calls += self.engine.take_calls()
        return moved_activations(self._calls / max(now_s, 1.0), self.placement.execution_table)

    def _move(
        self, held: Placement, wanted: Placement, rules: Instance, rates: npt.NDArray[np.float64]
    ) -> tuple[Placement, tuple[MigrationStep, ...]]:
        """The repair of what is wanted, and the order of its loads and drops.

        What is held, and no steps, where none is found.
        """
        try:
            target = repair_placement(wanted, rules, rates, partly=True)
            plan = migration_plan(
                held, target, gpu_capacity=rules.gpu_capacity,
                forbidden=rules.mask(rules.forbidden), priority=rates,
            )  # fmt: skip
        except (Infeasible, LimitReached) as error:
            self.notes.append(f"a repair was not made: {error}")
            return held, ()
        if plan.dips:
            self.dips.append(dips_text(plan))
        return target, plan.steps

    def _require_room_for_caches(self, target: Placement, table: npt.NDArray[np.int32]) -> None:
        """Note where the KV caches of a table without lost servers and the experts do not fit."""
        try:
            limits = self.instance.with_execution(table, self.scenario.model).gpu_capacity
        except Infeasible as error:
            self.notes.append(f"{error}; the simulation goes on as if it did fit")
            return
        room = np.array([slots for gpus in limits for slots in gpus])
        used = target.on_gpu.sum(axis=2) @ self.instance.expert_size
        for g in np.flatnonzero(used > room).tolist():
            server = self.placement.servers[int(self.placement.server_of_gpu[g])]
            unit = "experts" if self.instance.in_slots else "bytes"
            self.notes.append(
                f"while servers are away {server!r} has {used[g] - room[g]:,} {unit} too many "
                "beside its KV caches; the simulation goes on as if they did fit"
            )

    # --------------------------------------------------------------------------------- the records

    def _record_end_of_repair(self) -> None:
        """Enter the end of the latest repair into the records, once it is complete."""
        if self._repairing is None or self.engine.migrating:
            return
        number, field = self._repairing
        end_s = self.engine.migration_end_s
        self._repairing = None
        self._unready.clear()
        self._set_record(number, field, end_s)
        for over in self._repaired_by_next:
            self._set_record(over, "over_s", end_s)
        self._repaired_by_next.clear()

    def _set_record(self, number: int, field: str, value: float | None) -> None:
        changed: dict[str, Any] = {field: value}
        self._records[number] = dataclasses.replace(self._records[number], **changed)
