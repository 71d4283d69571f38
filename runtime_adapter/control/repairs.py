"""Repairs: migrations that bring back what was lost with servers.

They are begun where a server came back with less than it is to hold, or where an expert is held by
fewer servers than it should be. Where all servers are there they lead to the last placement that
was reached; where some are missing, to the nearest one among the others that has as many replicas
as there is room for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prism_plan.errors import PrismError
from prism_plan.instance import Instance
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration.repair import missing_text, repair_placement
from prism_plan.placement import Placement
from runtime_adapter.control.migrations import NAMES, Migrations
from runtime_adapter.control.placement_reviews import Reviews
from runtime_adapter.control.run_state import RunState
from runtime_adapter.transport.rendezvous import RuntimeFailure

#: A repair begins so long after a server came or went: one that is started again at once is not
#: repaired twice. Where experts were lost requests wait for them, and so it begins at once.
SETTLING_S = 2.0
#: After a repair that did not succeed the next one waits, twice as long each time.
FIRST_DELAY_S, LONGEST_DELAY_S = 5.0, 300.0


class Repairs:
    """The repairs of a run."""

    def __init__(self, state: RunState, migrations: Migrations, reviews: Reviews) -> None:
        self._state = state
        self._migrations = migrations
        self._reviews = reviews
        self._delay_s = FIRST_DELAY_S
        self._not_before_s = 0.0
        self._begun_at_change = -1.0  # when servers had last changed, as a repair was begun
        self._of_no_use: object = None  # the state in which nothing more can be repaired
        self._looked_at: tuple[object, bool] = (None, False)  # a state, and whether it needs one

    @property
    def pending(self) -> bool:
        """Whether a repair is about to begin: other migrations wait for it."""
        state = self._state
        return (
            state.begun
            and bool(state.alive)
            and not state.all_finished
            and not state.hung
            and not state.absent  # after a restart of the store: they are on their way
            and state.now() >= self._not_before_s
            and self._of_no_use != self._state_now
            and self._needed()
        )

    @property
    def _state_now(self) -> object:
        """Differs when what is held, who is up or what is wanted does."""
        state = self._state
        return state.changed_s, state.expert_map.version, id(state.placement)

    @property
    def _urgent(self) -> bool:
        """Whether a loss has left experts that nobody holds."""
        state = self._state
        return state.last_was_loss and not state.expert_map.on_gpu().any(axis=0).all()

    def begin_when_due(self) -> None:
        """Begin a repair where one is needed and servers have settled; no migration is active."""
        state = self._state
        self._note_the_last()
        if state.now() - state.changed_s < SETTLING_S and not self._urgent:
            return
        if not self.pending:
            if state.begun and not self._needed():
                state.joined.clear()
                if state.expert_map.on_gpu().any(axis=1).all():
                    state.adopt_placement()
            return
        try:
            found = self._plan()
        except RuntimeFailure:
            raise
        except PrismError as error:
            state.report(f"what was lost cannot be repaired now: {error}", once=True)
            self._wait()
            return
        if found is None:
            self._of_no_use = self._state_now
            state.joined.clear()
            return
        plan, target, missing = found
        if missing:
            state.report(f"a repair among the servers that are there leaves: {missing}", once=True)
        state.joined.clear()
        self._begun_at_change = state.changed_s
        self._migrations.begin(plan, target, repair=True)

    def _note_the_last(self) -> None:
        """Wait after a repair that has failed by itself, not because a server came or went."""
        ended, self._migrations.repaired = self._migrations.repaired, None
        if ended is None:
            return
        state = self._state
        if ended:
            self._delay_s = FIRST_DELAY_S
            if not state.all_up:  # what it could not repair waits for servers
                self._of_no_use = self._state_now
        else:
            state.joined.update(state.alive)
            if self._begun_at_change == state.changed_s:
                self._wait()

    def _wait(self) -> None:
        self._not_before_s = self._state.now() + self._delay_s
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)

    # ------------------------------------------------------------------------------------ what for

    def _needed(self) -> bool:
        key = (self._state_now, frozenset(self._state.joined))
        if self._looked_at[0] != key:
            self._looked_at = (key, self._look())
        return self._looked_at[1]

    def _look(self) -> bool:
        state = self._state
        held = state.expert_map.on_gpu()
        if any(self._lacks(n, held) is not None for n in state.joined):
            return True
        replicas = min(state.placement.plan.min_replicas, len(state.alive))
        return bool((self._copies(held) < replicas).any())

    def _lacks(self, n: int, held: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
        """What a server that has come is to hold, bool [G of it, J]; None if it has all of that.

        Where the last placement is not known, which is so if nothing is left of the scheduler that
        has made it, a server without any experts gets those of the run's placement file.
        """
        state = self._state
        gpus = state.config.placement.gpus_of(n)
        if not state.placement_known and held[gpus].any():
            return None
        known = state.placement if state.placement_known else state.config.placement
        wanted: npt.NDArray[np.bool_] = known.on_gpu.reshape(held.shape)[gpus]
        return wanted if (wanted & ~held[gpus]).any() else None

    def _copies(self, held: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """On how many servers that are up each pair is, int [J]."""
        placement = self._state.config.placement
        on_servers = [held[placement.gpus_of(n)].any(axis=0) for n in self._state.alive]
        copies: npt.NDArray[np.int64] = np.sum(on_servers, axis=0, dtype=np.int64)
        return copies

    # ------------------------------------------------------------------------------------- whereto

    def _plan(self) -> tuple[MigrationPlan, Placement, str] | None:
        """Steps, target and what is missing there; ``None`` where no step is of use."""
        state = self._state
        instance = state.instance
        current = state.held_placement(instance)
        if state.all_up and state.placement_known:
            target = state.placement.replace(gpu_capacity=instance.gpu_capacity)
            try:
                plan = self._order(current, target, instance)
            except RuntimeFailure:
                raise
            except PrismError as error:
                state.report(f"the last placement cannot be restored: {error}", once=True)
            else:
                return (plan, state.placement, "") if plan.steps else None
        target = repair_placement(
            self._to_begin_with(instance), instance, self._rates(), partly=True
        )
        plan = self._order(current, target, instance)
        if not plan.loads:
            return None
        target = target.replace(gpu_capacity=current.gpu_capacity)
        return plan, target, missing_text(target, instance)

    def _to_begin_with(self, instance: Instance) -> Placement:
        """What the servers hold, those that have come back what they are to hold."""
        state = self._state
        on_gpu = state.expert_map.on_gpu()
        for n in state.joined:
            wanted = self._lacks(n, on_gpu)
            if wanted is not None:
                on_gpu[state.config.placement.gpus_of(n)] = wanted
        return state.part_of(on_gpu, instance)

    def _order(self, current: Placement, target: Placement, instance: Instance) -> MigrationPlan:
        return migration_plan(
            current, target, gpu_capacity=instance.gpu_capacity,
            forbidden=instance.mask(instance.forbidden), priority=self._rates(),
            min_replicas=instance.min_replicas, names=(NAMES[0], "the placement of the repair"),
        )  # fmt: skip

    def _rates(self) -> npt.NDArray[np.float64]:
        """Calls of the servers that are up, float64 [N, L, E]: the most called load first."""
        return self._reviews.rates[self._state.alive]
