"""The greedy part: load by priority wherever a GPU has room, or can make it by safe drops."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from prism_plan.migration.endpoints import Bools, Endpoints
from prism_plan.migration.order.schedule_state import ScheduleState

#: Order of loads and of drops on a GPU; the last item is the pair.
_Key = tuple[int, float, int]


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
    min_replicas
        On how many servers every expert is to be at every moment, where the placements allow it.
    kept
        The number of servers below which drops are not to bring any expert; by default
        ``min_replicas``.

    Attributes
    ----------
    floor
        For each pair, the number of servers that its drops leave at least, where that is possible.
    dipped
        For each pair, whether a drop has left fewer.
    pending_drops
        For each pair, the GPUs that are to drop it, in the order in which that became known.
    pending_loads
        For each GPU, heaps of loads by the size of the expert.
    """

    def __init__(
        self, ends: Endpoints, allowed: Bools, priority: npt.NDArray[np.float64],
        min_replicas: int = 1, kept: int | None = None,
    ) -> None:  # fmt: skip
        self.ends = ends
        self.allowed = allowed
        self.priority = priority
        self.min_replicas = min_replicas
        self.state = ScheduleState(ends, min_replicas)
        gpus, pairs = ends.initial.shape
        floor = ends.kept_replicas(min_replicas if kept is None else kept)
        self.floor: list[int] = np.maximum(floor, 1).tolist()
        self.dipped = [False] * pairs
        self._wanted = _wanted_replicas(ends, min_replicas)
        self._urgency = np.where(
            np.array(self.state.num_servers) < self._wanted, self.state.num_servers, min_replicas
        ).tolist()
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
        """Make a load pending.

        Experts that nobody held at first come before all others, then those that fewer servers held
        than are wanted, the fewest first.
        """
        key = (self._urgency[j], -float(self.priority[g, j]), j)
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
        state, floor = self.state, self.floor[j]
        servers, final_servers = state.num_servers[j], state.final_servers[j]
        on_server = state.num_on_server(state.server[g], j)
        state.load(g, j)
        if not self.ends.final[g, j]:
            self.pending_drops[j][g] = None
        spare = servers == floor and not on_server
        enough_stay = final_servers < state.final_servers[j] == floor
        if spare or on_server == 1 or enough_stay:
            for other in self.pending_drops[j]:
                self.offer_drop(other, j)
                self.retry(other)
        elif g in self.pending_drops[j]:
            self.offer_drop(g, j)

    def drop(self, g: int, j: int) -> None:
        """Schedule a drop."""
        self.state.drop(g, j)
        self.pending_drops[j].pop(g, None)
        self.dipped[j] |= self.state.num_servers[j] < self.floor[j]

    def drop_rest(self) -> None:
        """Schedule all pending drops."""
        for g, j in sorted((g, j) for j, gpus in enumerate(self.pending_drops) for g in gpus):
            self.drop(g, j)

    def may_drop(self, g: int, j: int) -> bool:
        """Whether a copy can be dropped and enough servers still hold the pair."""
        state = self.state
        return (
            state.num_on_server(state.server[g], j) > 1 or state.num_servers[j] - 1 >= self.floor[j]
        )

    def offer_drop(self, g: int, j: int) -> None:
        """Note that a pending drop is possible, if it is; one of which enough stay goes first."""
        if self.may_drop(g, j):
            enough_stay = self.state.final_servers[j] >= self.floor[j]
            heapq.heappush(self._droppable[g], (not enough_stay, float(self.priority[g, j]), j))

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
            if g in self.pending_drops[j] and self.may_drop(g, j) and not known:
                taken.append(key)
                room += int(self.ends.size[j])
        if room >= size:
            return [key[-1] for key in taken]
        for key in taken:
            heapq.heappush(self._droppable[g], key)
        return None

    def is_wanted(self, g: int, j: int) -> bool:
        """Whether fewer servers than are wanted hold the pair without this copy."""
        return bool(self.state.servers_without(g, j) < self._wanted[j])

    def droppable(self) -> Bools:
        """Where :meth:`may_drop` holds of a copy, bool [G, J]."""
        return self.spare_copies(np.array(self.floor))

    def spare_copies(self, floor: npt.NDArray[np.int64]) -> Bools:
        """The copies without which ``floor`` [J] servers still hold the pair, bool [G, J]."""
        held = self.state.held
        on_server = self.ends.on_servers(held)
        elsewhere = (on_server > 0).sum(axis=0) - 1
        several = on_server[self.state.server] > 1
        spare: Bools = held & (several | (elsewhere >= floor))
        return spare

    def least_used_duplicates(self) -> list[tuple[int, int]]:
        """(GPU, pair): a copy of each GPU that stays in the end and can be spared for a while.

        It is the one called least, of those that are not wanted beside the others, if there are.
        """
        several = self.droppable() & self.ends.final
        unwanted = several & self.spare_copies(self._wanted)
        found = []
        for g in np.flatnonzero(several.any(axis=1)).tolist():
            pairs = np.flatnonzero(unwanted[g] if unwanted[g].any() else several[g])
            found.append((g, int(pairs[np.argmin(self.priority[g, pairs])])))
        return found


def _wanted_replicas(ends: Endpoints, min_replicas: int) -> npt.NDArray[np.int64]:
    """On how many servers each pair is wanted: ``min_replicas``, if it is in the end, [J]."""
    wanted: npt.NDArray[np.int64] = np.minimum(
        min_replicas, (ends.on_servers(ends.final) > 0).sum(axis=0)
    )
    return wanted
