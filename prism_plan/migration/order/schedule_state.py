"""Which GPU holds which experts after the steps so far, and which steps each step waits for."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from prism_plan.migration.endpoints import Endpoints
from prism_plan.migration_step import MigrationStep


@dataclass
class _Copy:
    """A copy of a pair on a GPU: the step that loaded it, and the drops that rely on it."""

    load_step: int | None = None
    relied_on_by: list[int] = field(default_factory=list)


class ScheduleState:
    """The steps scheduled so far and the placement that they lead to.

    Where experts are of one size, a load waits for the one drop that freed its slot. Where sizes
    differ, all steps of a GPU wait for each other in turn.

    Attributes
    ----------
    steps
        In the order in which they were scheduled; their needs are indices of this list.
    held
        Which GPU holds which pair, bool [G, J].
    free
        Free slots of each GPU, or free bytes where sizes differ, [G].
    copies
        For each pair, its copies by GPU.
    final_holders
        For each pair, how many GPUs hold it now and in the end.
    """

    def __init__(self, ends: Endpoints) -> None:
        self.ends = ends
        self._in_slots = ends.model.equal_expert_bytes
        self.steps: list[MigrationStep] = []
        self.held = ends.initial.copy()
        self.free: list[int] = (ends.capacity - ends.initial @ ends.size).tolist()
        self.copies: list[dict[int, _Copy]] = [{} for _ in range(ends.initial.shape[1])]
        for g, j in np.argwhere(ends.initial).tolist():
            self.copies[j][g] = _Copy()
        self.final_holders: list[int] = (ends.initial & ends.final).sum(axis=0).tolist()
        self._initially_free = list(self.free)  # slots of these that are still unused
        self._freeing_drops: list[deque[int]] = [deque() for _ in ends.initial]
        self._last_step: list[int | None] = [None] * len(ends.initial)
        self._drop_step: dict[tuple[int, int], int] = {}

    def load(self, g: int, j: int) -> None:
        """Load a pair for which there is room."""
        needs = set()
        if self._in_slots:
            if self._initially_free[g]:
                self._initially_free[g] -= 1
            else:
                needs.add(self._freeing_drops[g].popleft())
            if (g, j) in self._drop_step:
                needs.add(self._drop_step[g, j])
        self.free[g] -= int(self.ends.size[j])
        assert self.free[g] >= 0, "a load without room"
        self.held[g, j] = True
        self.final_holders[j] += bool(self.ends.final[g, j])
        temporary = not self.ends.final[g, j] or (g, j) in self._drop_step
        self.copies[j][g] = _Copy(self._add("load", g, j, needs, temporary))

    def drop(self, g: int, j: int) -> None:
        """Drop a pair that has another copy, which stays at least until this drop is done."""
        copy = self.copies[j].pop(g)
        remaining = self._remaining_copy(j)
        loads = (copy.load_step, remaining.load_step)
        needs = {*copy.relied_on_by, *(step for step in loads if step is not None)}
        self.free[g] += int(self.ends.size[j])
        self.held[g, j] = False
        self.final_holders[j] -= bool(self.ends.final[g, j])
        temporary = bool(self.ends.final[g, j]) or copy.load_step is not None
        index = self._add("drop", g, j, needs, temporary)
        remaining.relied_on_by.append(index)
        self._freeing_drops[g].append(index)
        self._drop_step[g, j] = index

    def _remaining_copy(self, j: int) -> _Copy:
        """The copy to rely on: one that need not be loaded first and is not dropped later, if any.

        Else the one that was loaded first.
        """
        best = None
        for g, copy in self.copies[j].items():
            rank = (not self.ends.final[g, j], copy.load_step is not None, copy.load_step or g)
            if best is None or rank < best[0]:
                best = (rank, copy)
            if not any(rank[:2]):
                break
        assert best is not None, "a drop of the last copy"
        return best[1]

    def _add(
        self, kind: Literal["load", "drop"], g: int, j: int, needs: set[int], temporary: bool
    ) -> int:
        last = self._last_step[g]
        if last is not None and not self._in_slots:
            needs.add(last)
        index = self._last_step[g] = len(self.steps)
        self.steps.append(MigrationStep(kind, g, j, tuple(needs), temporary))
        return index
