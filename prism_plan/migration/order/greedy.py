"""The greedy part: load by priority wherever a GPU has room, or can make it by safe drops."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from prism_plan.migration.endpoints import Bools, Endpoints
from prism_plan.migration.order.schedule_state import ScheduleState

#: Order of loads and of drops on a GPU; the last item is the pair.
_Key = tuple[bool, float, int]


class GreedyScheduler:
    """Schedules pending loads and drops, and keeps track of those that are left.

    Parameters
    ----------
    ends
        The two placements.
    allowed
        Where copies may go, bool [G, J].
    priority
        Calls per second, [G, J]: what is loaded first and dropped last.

    Attributes
    ----------
    pending_drops
        For each pair, the GPUs that are to drop it, in the order in which that became known.
    pending_loads
        For each GPU, heaps of loads by the size of the expert.
    """

    def __init__(self, ends: Endpoints, allowed: Bools, priority: npt.NDArray[np.float64]) -> None:
        self.ends = ends
        self.allowed = allowed
        self.priority = priority
        self.state = ScheduleState(ends)
        gpus, pairs = ends.initial.shape
        self._covered_at_first: Bools = np.asarray(ends.initial.any(axis=0))
        self.pending_drops: list[dict[int, None]] = [{} for _ in range(pairs)]
        self.pending_loads: list[dict[int, list[_Key]]] = [{} for _ in range(gpus)]
        # heap for each GPU; an entry may be out of date, and is checked when it is taken
        self._droppable: list[list[_Key]] = [[] for _ in range(gpus)]
        self._ready: list[tuple[_Key, int]] = []  # heap of GPUs to try, by their first load
        self._is_ready = [False] * gpus
        for g, j in np.argwhere(ends.initial & ~ends.final).tolist():
            self.pending_drops[j][g] = None
            self.offer_drop(g, j)

    def add_loads(self, loads: Bools) -> None:
        """Make loads [G, J] pending, and schedule as many as possible."""
        for g, j in np.argwhere(loads).tolist():
            self.add_load(g, j)
        for g in range(len(self.pending_loads)):
            self.retry(g)
        self.load_while_possible()

    def add_load(self, g: int, j: int) -> None:
        """Make a load pending; experts that nobody held at first come before all others."""
        key = (bool(self._covered_at_first[j]), -float(self.priority[g, j]), j)
        heapq.heappush(self.pending_loads[g].setdefault(int(self.ends.size[j]), []), key)

    def remove_load(self, g: int, size: int) -> int:
        """Take the first pending load of experts of a size; returns the pair."""
        pair = heapq.heappop(self.pending_loads[g][size])[-1]
        if not self.pending_loads[g][size]:
            del self.pending_loads[g][size]
        return pair

    def has_pending_loads(self) -> bool:
        """Whether any GPU has loads that are not scheduled yet."""
        return any(self.pending_loads)

    def retry(self, g: int) -> None:
        """Let a GPU with pending loads try again."""
        if not self._is_ready[g] and self.pending_loads[g]:
            key = min(heap[0] for heap in self.pending_loads[g].values())
            heapq.heappush(self._ready, (key, g))
            self._is_ready[g] = True

    def load_while_possible(self) -> None:
        """Schedule loads while some GPU has room or can make it."""
        while self._ready:
            _, g = heapq.heappop(self._ready)
            self._is_ready[g] = False
            heaps = self.pending_loads[g]
            for _, size in sorted((heap[0], size) for size, heap in heaps.items()):
                if self.make_room(g, size):
                    self.load(g, self.remove_load(g, size))
                    self.retry(g)
                    break

    def load(self, g: int, j: int) -> None:
        """Schedule a load; drops of other copies of the pair may have become possible."""
        self.state.load(g, j)
        final = self.ends.final[g, j]
        if not final:
            self.pending_drops[j][g] = None
        first_final_holder = final and self.state.final_holders[j] == 1
        if len(self.state.copies[j]) == 2 or first_final_holder:
            for other in self.pending_drops[j]:
                self.offer_drop(other, j)
                self.retry(other)
        elif g in self.pending_drops[j]:
            self.offer_drop(g, j)

    def drop(self, g: int, j: int) -> None:
        """Schedule a drop."""
        self.state.drop(g, j)
        self.pending_drops[j].pop(g, None)

    def drop_rest(self) -> None:
        """Schedule all pending drops."""
        for g, j in sorted((g, j) for j, gpus in enumerate(self.pending_drops) for g in gpus):
            self.drop(g, j)

    def offer_drop(self, g: int, j: int) -> None:
        """Note that a pending drop is possible, if it is; one with a copy that stays goes first."""
        if len(self.state.copies[j]) > 1:
            key = (not self.state.final_holders[j], float(self.priority[g, j]), j)
            heapq.heappush(self._droppable[g], key)

    def make_room(self, g: int, size: int) -> bool:
        """Drop what makes room for ``size`` on a GPU; nothing if that is not possible."""
        drops = self._drops_for(g, size)
        for j in drops or ():
            self.drop(g, j)
        return drops is not None

    def can_make_room(self, g: int) -> bool:
        """Whether the GPU has a pending drop that is possible now."""
        drops = self._drops_for(g, self.state.free[g] + 1)
        for j in drops or ():
            self.offer_drop(g, j)
        return bool(drops)

    def _drops_for(self, g: int, size: int) -> list[int] | None:
        """Possible pending drops that make room for ``size``, or None if there are too few."""
        room = self.state.free[g]
        taken: list[_Key] = []
        while room < size and self._droppable[g]:
            key = heapq.heappop(self._droppable[g])
            j = key[-1]
            known = any(j == other[-1] for other in taken)
            if g in self.pending_drops[j] and len(self.state.copies[j]) > 1 and not known:
                taken.append(key)
                room += int(self.ends.size[j])
        if room >= size:
            return [key[-1] for key in taken]
        for key in taken:
            heapq.heappush(self._droppable[g], key)
        return None

    def least_used_duplicates(self) -> list[tuple[int, int]]:
        """(GPU, pair): the copy of each GPU called least, of those that stay and have another."""
        several = self.state.held & self.ends.final & (self.state.held.sum(axis=0) > 1)
        found = []
        for g in np.flatnonzero(several.any(axis=1)).tolist():
            pairs = np.flatnonzero(several[g])
            found.append((g, int(pairs[np.argmin(self.priority[g, pairs])])))
        return found
