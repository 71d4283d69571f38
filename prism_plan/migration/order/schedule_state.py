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
    differ, all steps of a GPU wait for each other in turn. A drop relies on copies on
    ``min_replicas`` other servers, or on as many as there are: it waits for their loads, and their
    own drops wait for it. So in every order that the needs allow, each drop leaves at least as many
    copies as in the order of ``steps``, or ``min_replicas``.

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
    server
        For each GPU, its server.
    num_servers
        For each pair, how many servers hold it.
    final_servers
        For each pair, how many servers have it on a GPU that holds it in the end, too.
    """

    def __init__(self, ends: Endpoints, min_replicas: int = 1) -> None:
        self.ends = ends
        self.min_replicas = min_replicas
        self._in_slots = ends.model.equal_expert_bytes
        self.steps: list[MigrationStep] = []
        self.held = ends.initial.copy()
        self.free: list[int] = (ends.capacity - ends.initial @ ends.size).tolist()
        self.copies: list[dict[int, _Copy]] = [{} for _ in range(ends.initial.shape[1])]
        for g, j in np.argwhere(ends.initial).tolist():
            self.copies[j][g] = _Copy()
        self.server: list[int] = ends.server_of_gpu.tolist()
        self._on_server = ends.on_servers(ends.initial)
        self._final_on_server = ends.on_servers(ends.initial & ends.final)
        self.num_servers: list[int] = (self._on_server > 0).sum(axis=0).tolist()
        self.final_servers: list[int] = (self._final_on_server > 0).sum(axis=0).tolist()
        self._initially_free = list(self.free)  # slots of these that are still unused
        self._freeing_drops: list[deque[int]] = [deque() for _ in ends.initial]
        self._last_step: list[int | None] = [None] * len(ends.initial)
        self._drop_step: dict[tuple[int, int], int] = {}

    def num_on_server(self, n: int, j: int) -> int:
        """On how many GPUs of a server a pair is."""
        return int(self._on_server[n, j])

    def servers_without(self, g: int, j: int) -> int:
        """How many servers hold a pair if a GPU drops its copy."""
        return self.num_servers[j] - int(self._on_server[self.server[g], j] == 1)

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
        self._count(g, j, 1)
        temporary = not self.ends.final[g, j] or (g, j) in self._drop_step
        self.copies[j][g] = _Copy(self._add("load", g, j, needs, temporary))

    def drop(self, g: int, j: int) -> None:
        """Drop a pair that has other copies, which stay at least until this drop is done."""
        copy = self.copies[j].pop(g)
        remaining = self._remaining_copies(j)
        loads = (copy.load_step, *(other.load_step for other in remaining))
        needs = {*copy.relied_on_by, *(step for step in loads if step is not None)}
        self.free[g] += int(self.ends.size[j])
        self._count(g, j, -1)
        temporary = bool(self.ends.final[g, j]) or copy.load_step is not None
        index = self._add("drop", g, j, needs, temporary)
        for other in remaining:
            other.relied_on_by.append(index)
        self._freeing_drops[g].append(index)
        self._drop_step[g, j] = index

    def _count(self, g: int, j: int, change: int) -> None:
        """Note that a GPU has a copy more (1) or less (-1)."""
        n, final = self.server[g], bool(self.ends.final[g, j])
        self.held[g, j] = change > 0
        for on_server, servers, counted in (
            (self._on_server, self.num_servers, True),
            (self._final_on_server, self.final_servers, final),
        ):
            if counted:
                before = on_server[n, j] > 0
                on_server[n, j] += change
                servers[j] += int(on_server[n, j] > 0) - int(before)

    def _remaining_copies(self, j: int) -> list[_Copy]:
        """The copies to rely on, each on another server: as many as are to be kept, if there are.

        Those come first that need not be loaded first and are not dropped later, then those that
        were loaded first.
        """
        best: dict[int, tuple[tuple[bool, bool, int], _Copy]] = {}
        for g, copy in self.copies[j].items():
            rank = (not self.ends.final[g, j], copy.load_step is not None, copy.load_step or g)
            n = self.server[g]
            if n not in best or rank < best[n][0]:
                best[n] = (rank, copy)
        assert best, "a drop of the last copy"
        ranked = sorted(best.values(), key=lambda entry: entry[0])
        return [copy for _, copy in ranked[: self.min_replicas]]

    def _add(
        self, kind: Literal["load", "drop"], g: int, j: int, needs: set[int], temporary: bool
    ) -> int:
        last = self._last_step[g]
        if last is not None and not self._in_slots:
            needs.add(last)
        index = self._last_step[g] = len(self.steps)
        self.steps.append(MigrationStep(kind, g, j, tuple(needs), temporary))
        return index
