"""Exchange experts between servers while the calls of layers get faster."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from prism_plan.errors import Infeasible
from prism_plan.placement import Placement
from prism_plan.solvers.latency.layer_costs import CopyChange, LayerCosts
from prism_plan.solvers.latency.problem import LatencyProblem

#: Sweeps over all changes at most.
SWEEPS = 6
#: A change is made where it gains more than this share of the seconds of all layers.
GAIN = 1e-9
#: Changes of two layers at a time: so many of the best of each kind are combined.
COMBINED = 8


class _Change(NamedTuple):
    """Put an expert of a layer on ``to`` and take it from ``source``; -1 for neither."""

    layer: int
    expert: int
    source: int
    to: int


class ExpertExchange:
    """A local search for a plan with the same table whose calls take less time.

    By the steps of the prompts: within a layer experts move, change places, get a copy or lose one;
    then in two layers at a time changes that need each other's slots. ``most`` bounds the changes
    that are tried. By the rules of the instance.
    """

    def __init__(self, problem: LatencyProblem, plan: Placement, most: int) -> None:
        self._problem, self._plan = problem, plan
        instance = problem.instance
        self.costs = LayerCosts(problem, plan)
        self._most = most
        self._layers, self._experts = plan.local.shape[1:]
        self._free = np.array([sum(gpus) for gpus in plan.gpu_capacity])
        self._free -= plan.local.sum(axis=(1, 2))
        self._cap = instance.max_per_layer
        self._least = instance.min_replicas
        self._pinned = instance.mask(instance.pinned)
        self._forbidden = instance.mask(instance.forbidden)
        self._seconds = [self.costs.seconds(layer) for layer in range(self._layers)]

    @property
    def tried(self) -> int:
        """How often the seconds of a layer were found."""
        return self.costs.evaluations

    def plan(self) -> Placement | None:
        """The plan that the search finds; ``None`` where it finds none."""
        if not self.improve():
            return None
        table, capacity = self._plan.execution_table, self._plan.gpu_capacity
        try:
            return self._problem.packed(self.costs.local, table, capacity)
        except Infeasible:
            return None

    def improve(self) -> bool:
        """Make changes until none helps or the work is done; whether any was made."""
        changed = False
        for _ in range(SWEEPS):
            now = False
            for layer in range(self._layers):
                now |= self._sweep_layer(layer)
            if any(self.costs.calls_elsewhere(layer) for layer in range(self._layers)):
                now |= self._sweep_pairs()
            changed |= now
            if not now or self._over():
                break
        return changed

    def _over(self) -> bool:
        return self.costs.evaluations >= self._most

    def _sweep_layer(self, layer: int) -> bool:
        """Changes within one layer, each made at once where it helps."""
        if not self.costs.calls_elsewhere(layer):
            return False
        changed = False
        for expert in range(self._experts):
            for change in list(self._changes(layer, expert)):
                if self._over():
                    return changed
                if not self._allowed(change):
                    continue
                if self._fits((change,)) and self._try((change,)):
                    changed = True
                    continue
                if change.source < 0 or change.to < 0:
                    continue
                local = self.costs.local
                theirs = local[change.to, layer] & ~local[change.source, layer]
                for other in np.flatnonzero(theirs).tolist():
                    if self._over():
                        return changed
                    back = _Change(layer, other, change.to, change.source)
                    if self._allowed(back) and self._try((change, back)):
                        changed = True
                        break
        return changed

    def _sweep_pairs(self) -> bool:
        """Changes in two layers that use each other's slots; their gains add up."""
        by_slots: dict[tuple[int, int], list[tuple[float, _Change]]] = {}
        for layer in range(self._layers):
            for expert in range(self._experts):
                for change in self._changes(layer, expert):
                    if self._over():
                        return False
                    if self._allowed(change):
                        cost = self._cost_of((change,))
                        by_slots.setdefault((change.source, change.to), []).append((cost, change))
        for changes in by_slots.values():
            changes.sort(key=lambda entry: entry[0])
            del changes[COMBINED:]
        changed = False
        for one, two in itertools.combinations_with_replacement(sorted(by_slots), 2):
            for first, second in itertools.product(by_slots[one], by_slots[two]):
                if first[0] + second[0] >= 0 or first[1].layer == second[1].layer:
                    continue
                both = (first[1], second[1])
                if all(self._allowed(change) for change in both) and self._fits(both):
                    changed |= self._try(both)
        return changed

    def _changes(self, layer: int, expert: int) -> Iterator[_Change]:
        """Moves of an expert's copies, further copies, and copies that go."""
        local = self.costs.local[:, layer, expert]
        holding, lacking = np.flatnonzero(local).tolist(), np.flatnonzero(~local).tolist()
        for to in lacking:
            for source in holding:
                yield _Change(layer, expert, source, to)
            yield _Change(layer, expert, -1, to)
        if len(holding) > self._least:
            for source in holding:
                yield _Change(layer, expert, source, -1)

    def _stands(self, change: _Change) -> bool:
        """Whether a change can still be made, after others were."""
        local = self.costs.local[:, change.layer, change.expert]
        if change.source >= 0 and not local[change.source]:
            return False
        if change.to >= 0 and local[change.to]:
            return False
        goes = change.source >= 0 and change.to < 0
        return not goes or int(local.sum()) > self._least

    def _allowed(self, change: _Change) -> bool:
        if not self._stands(change):
            return False
        if change.source >= 0 and self._pinned[change.source, change.layer, change.expert]:
            return False
        if change.to >= 0:
            if self._forbidden[change.to, change.layer, change.expert]:
                return False
            held = int(self.costs.local[change.to, change.layer].sum())
            return bool(held < self._cap[change.to])
        return True

    def _fits(self, changes: tuple[_Change, ...]) -> bool:
        left = self._free.copy()
        for change in changes:
            if change.source >= 0:
                left[change.source] += 1
            if change.to >= 0:
                left[change.to] -= 1
        return bool((left >= 0).all())

    def _make(self, change: _Change) -> list[CopyChange]:
        made = []
        if change.source >= 0:
            made.append(self.costs.take(change.source, change.layer, change.expert))
            self._free[change.source] += 1
        if change.to >= 0:
            made.append(self.costs.put(change.to, change.layer, change.expert))
            self._free[change.to] -= 1
        return made

    def _undo(self, made: CopyChange) -> None:
        """Undo one step: other GPUs would give the layer other seconds than those kept of it."""
        self.costs.undo(made)
        self._free[made.server] += 1 if made.gpu_before < 0 else -1

    def _cost_of(self, changes: tuple[_Change, ...], *, keep: bool = False) -> float:
        """Seconds that some changes add; they stay only where they are kept and gain."""
        made = [step for change in changes for step in self._make(change)]
        layers = {change.layer for change in changes}
        after = {layer: self.costs.seconds(layer) for layer in layers}
        added = sum(after[layer] - self._seconds[layer] for layer in layers)
        if keep and added < -GAIN * sum(self._seconds):
            for layer in layers:
                self._seconds[layer] = after[layer]
            return added
        for step in reversed(made):
            self._undo(step)
        return added

    def _try(self, changes: tuple[_Change, ...]) -> bool:
        """Make changes where they gain."""
        return bool(self._cost_of(changes, keep=True) < -GAIN * sum(self._seconds))
