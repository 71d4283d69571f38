"""How a group of full GPUs that wait for each other gets a free slot, by few extra loads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from prism_plan.migration.endpoints import Bools
from prism_plan.migration.order.greedy import GreedyScheduler
from prism_plan.migration.order.wait_for_graph import Move


@dataclass(frozen=True)
class FreeSlotPath:
    """How a group of GPUs that wait for each other gets a free slot.

    GPU ``start`` has room, or drops the copy ``borrowed`` and loads it again in the end, or is in
    the group and drops ``moved``, a copy of one of the group's moves, before the others. In each
    hop (pair, GPU) the GPU hands the pair to the one before it, and then has the free slot.
    """

    start: int
    borrowed: int | None
    hops: tuple[tuple[int, int], ...]
    moved: int | None = None


def find_free_slot(
    scheduler: GreedyScheduler, group: Sequence[int], moves: Sequence[Move]
) -> FreeSlotPath | None:
    """The cheapest path from a free slot to the group: one extra load, two, or more."""
    hops = _Hops(scheduler, moves)
    with_room = [
        g
        for g, heaps in enumerate(scheduler.pending_loads)
        if not heaps and (scheduler.state.free[g] > 0 or scheduler.can_make_room(g))
    ]
    for g in with_room:
        if hop := hops.first(g):
            return FreeSlotPath(g, None, hop)
    duplicates = scheduler.least_used_duplicates()
    if path := _by_borrowing(scheduler, duplicates, group, hops):
        return path
    starts = [FreeSlotPath(g, None, ()) for g in with_room]
    starts += [FreeSlotPath(g, j, ()) for g, j in duplicates]
    return _extend_paths(scheduler, starts, set(group), hops)


def _by_borrowing(
    scheduler: GreedyScheduler,
    duplicates: Sequence[tuple[int, int]],
    group: Sequence[int],
    hops: _Hops,
) -> FreeSlotPath | None:
    """The least used copy (GPU, pair) that gives a free slot to the group by at most one hop."""
    ranked = sorted(
        duplicates, key=lambda at: (scheduler.is_wanted(*at), scheduler.priority[at], at)
    )
    for g, j in ranked:
        if g in group:
            return FreeSlotPath(g, j, ())
    for g, j in ranked:
        if hop := hops.first(g):
            return FreeSlotPath(g, j, hop)
    return None


def find_dip(
    scheduler: GreedyScheduler, group: Sequence[int], moves: Sequence[Move]
) -> FreeSlotPath | None:
    """A free slot for the group by a copy that cannot be spared, of an expert with others.

    At best the copy is one that moves anyway, which costs no load: it is dropped first and loaded
    last. Of several, it is that of the expert called least.
    """
    floor, calls = np.array(scheduler.floor), scheduler.priority.sum(axis=0)

    def least(copies: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        return sorted(copies, key=lambda at: (not scheduler.dipped[at[1]], calls[at[1]], at))

    for holder, j in least((holder, j) for _, holder, j in moves if floor[j] > 1):
        return FreeSlotPath(holder, None, (), moved=j)
    several = scheduler.spare_copies(np.maximum(floor - 1, 1)) & scheduler.ends.final
    copies = [
        least((g, int(j)) for j in np.flatnonzero(several[g]))[0]
        for g in np.flatnonzero(several.any(axis=1)).tolist()
    ]
    hops = _Hops(scheduler, moves)
    if path := _by_borrowing(scheduler, copies, group, hops):
        return path
    return _extend_paths(scheduler, [FreeSlotPath(g, j, ()) for g, j in copies], set(group), hops)


class _Hops:
    """Which copies may move to a GPU with a free slot for the time of a group's moves.

    A hop is a load and a drop that leave a pair on as many servers as before. One of the ``moves``
    of the group is the beginning of that move. No other may bring a pair to the server of a GPU
    that waits for it, for the load there would then bring no further server.
    """

    def __init__(self, scheduler: GreedyScheduler, moves: Sequence[Move]) -> None:
        self._held = scheduler.state.held
        self._allowed = scheduler.allowed
        self._server = np.array(scheduler.state.server)
        self._on_server = scheduler.ends.on_servers(self._held) > 0
        self._one_is_enough = np.array(scheduler.floor) == 1
        self._moves = moves

    def to(self, free_gpu: int) -> Bools:
        """The copies that may move to a GPU, bool [G, J]."""
        n = self._server[free_gpu]
        same_server = (self._server == n)[:, None]
        stays_as_often = ~self._on_server[n] | same_server | self._one_is_enough
        waited_for, own = np.zeros(len(stays_as_often[0]), bool), np.zeros_like(self._held)
        for g, holder, j in self._moves:
            if self._server[g] == n:
                waited_for[j] = own[holder, j] = True
        fit: Bools = self._held & self._allowed[free_gpu] & ~self._held[free_gpu]
        fit &= stays_as_often & (own | ~waited_for)
        return fit

    def first(self, free_gpu: int) -> tuple[tuple[int, int], ...]:
        """A hop of a pair of the group's moves, if possible from a GPU of the same server."""
        fit = self.to(free_gpu)
        found = [(j, holder) for _, holder, j in self._moves if fit[holder, j]]
        same = [hop for hop in found if self._server[hop[1]] == self._server[free_gpu]]
        return tuple((same or found)[:1])


def _extend_paths(
    scheduler: GreedyScheduler, starts: Sequence[FreeSlotPath], group: set[int], hops: _Hops
) -> FreeSlotPath | None:
    """Breadth-first search: a free slot moves on to any GPU that can hand over an expert.

    If it does not reach the group, no expert of the GPUs that it did not reach may enter those
    that it did, so they can never move: no order exists from here.
    """
    queue = deque(starts)
    seen = {path.start for path in starts}
    while queue:
        path = queue.popleft()
        free_gpu = path.hops[-1][1] if path.hops else path.start
        movable = hops.to(free_gpu)
        for g in np.flatnonzero(movable.any(axis=1)).tolist():
            if g in seen:
                continue
            seen.add(g)
            j = int(np.flatnonzero(movable[g])[0])
            longer = FreeSlotPath(path.start, path.borrowed, (*path.hops, (j, g)))
            if g in group:
                return longer
            queue.append(longer)
    return None
