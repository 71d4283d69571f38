"""Experts of one size: groups of full GPUs that wait for each other, moved around a circuit."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np

from prism_plan.errors import Infeasible
from prism_plan.migration.order.greedy import GreedyScheduler

#: The move of a sole copy that another GPU waits for: (GPU that waits, GPU that holds it, pair).
Move = tuple[int, int, int]


@dataclass(frozen=True)
class FreeSlotPath:
    """How a group of GPUs that wait for each other gets a free slot.

    GPU ``start`` has room, or drops the duplicate ``borrowed`` and loads it again in the end. In
    each hop (pair, GPU) the GPU hands the pair to the one before it, and then has the free slot.
    """

    start: int
    borrowed: int | None
    hops: tuple[tuple[int, int], ...]


def rotate_cycles(scheduler: GreedyScheduler) -> None:
    """Schedule the moves of every group of stuck GPUs, one after the other.

    Raises
    ------
    Infeasible
        A group can get no free slot.
    """
    graph = _wait_for_graph(scheduler)
    groups = [sorted(group) for group in nx.weakly_connected_components(graph)]
    for group in sorted(groups):
        within = graph.subgraph(group)
        moves: list[Move] = sorted(within.edges(keys=True), key=lambda move: move[2])
        path = _find_free_slot(scheduler, group, moves)
        if path is None:
            raise _no_free_slot(scheduler, within)
        _rotate_cycle(scheduler, within, path, {j for _, _, j in moves})
        for g in group:
            scheduler.pending_loads[g] = {}


def _wait_for_graph(scheduler: GreedyScheduler) -> Any:
    """Moves of sole copies between stuck GPUs, as edges from the GPU that waits to the holder."""
    graph = nx.MultiDiGraph()
    for g, heaps in enumerate(scheduler.pending_loads):
        for _, _, j in sorted(key for heap in heaps.values() for key in heap):
            for holder in scheduler.state.copies[j]:
                if holder in scheduler.pending_drops[j] and len(scheduler.state.copies[j]) == 1:
                    graph.add_edge(g, holder, key=j)
    return graph


def _rotate_cycle(
    scheduler: GreedyScheduler, graph: Any, path: FreeSlotPath, circuit_pairs: set[int]
) -> None:
    """Bring the free slot to the group, move every expert of its circuit, and restore the rest."""
    if path.borrowed is not None:
        scheduler.drop(path.start, path.borrowed)
    else:
        scheduler.make_room(path.start, 1)
    free_gpu = path.start
    detours = []
    moved_to = {}  # the pair of the circuit that a hop has moved already: where it is
    for j, g in path.hops:
        scheduler.load(free_gpu, j)
        scheduler.drop(g, j)
        if j in circuit_pairs:
            moved_to[j] = free_gpu
        else:
            detours.append((j, g, free_gpu))
        free_gpu = g
    circuit = list(nx.eulerian_circuit(graph, source=free_gpu, keys=True))
    for moved in moved_to:  # its own move comes last
        turn = 1 + next(i for i, move in enumerate(circuit) if move[2] == moved)
        circuit = circuit[turn:] + circuit[:turn]
    for waiting, holder, j in circuit:
        scheduler.load(waiting, j)
        scheduler.drop(moved_to.get(j, holder), j)
    for j, g, holder in reversed(detours):
        scheduler.load(g, j)
        scheduler.drop(holder, j)
    if path.borrowed is not None:
        scheduler.load(path.start, path.borrowed)


def _find_free_slot(
    scheduler: GreedyScheduler, group: Sequence[int], moves: Sequence[Move]
) -> FreeSlotPath | None:
    """The cheapest path from a free slot to the group: one extra load, two, or more."""
    holders = np.array([holder for _, holder, _ in moves])
    pairs = np.array([j for _, _, j in moves])
    server = np.repeat(np.arange(len(scheduler.ends.gpus)), scheduler.ends.gpus)

    def first_hop(g: int) -> tuple[tuple[int, int], ...]:
        """A hop of a pair of the circuit to ``g``, if possible from a GPU of the same server."""
        fit = np.flatnonzero(scheduler.allowed[g, pairs])
        same_server = fit[server[holders[fit]] == server[g]]
        return tuple((int(pairs[i]), int(holders[i])) for i in (*same_server[:1], *fit[:1]))[:1]

    with_room = [
        g
        for g, heaps in enumerate(scheduler.pending_loads)
        if not heaps and (scheduler.state.free[g] > 0 or scheduler.can_make_room(g))
    ]
    for g in with_room:
        if hops := first_hop(g):
            return FreeSlotPath(g, None, hops)
    duplicates = scheduler.least_used_duplicates()
    by_priority = sorted((scheduler.priority[g, j], g, j) for g, j in duplicates)
    for _, g, j in by_priority:
        if g in group:
            return FreeSlotPath(g, j, ())
    for _, g, j in by_priority:
        if hops := first_hop(g):
            return FreeSlotPath(g, j, hops)
    starts = [FreeSlotPath(g, None, ()) for g in with_room]
    starts += [FreeSlotPath(g, j, ()) for g, j in duplicates]
    return _extend_paths(scheduler, starts, set(group))


def _extend_paths(
    scheduler: GreedyScheduler, starts: Sequence[FreeSlotPath], group: set[int]
) -> FreeSlotPath | None:
    """Breadth-first search: a free slot moves on to any GPU that can hand over an expert.

    If it does not reach the group, no expert of the GPUs that it did not reach may enter those
    that it did, so they can never move: no order exists from here.
    """
    held = scheduler.state.held
    queue = deque(starts)
    seen = {path.start for path in starts}
    while queue:
        path = queue.popleft()
        free_gpu = path.hops[-1][1] if path.hops else path.start
        movable = held & scheduler.allowed[free_gpu] & ~held[free_gpu]
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


def _no_free_slot(scheduler: GreedyScheduler, graph: Any) -> Infeasible:
    ends, held = scheduler.ends, scheduler.state.held
    if int(held.sum()) == int(ends.capacity.sum()) and not (held.sum(axis=0) > 1).any():
        found = "no order of loads and drops leads there"
        why = "every GPU is full and every expert has one copy"
        remedy = "free one slot on any GPU for the time of the move"
    else:
        found = "found no order of loads and drops"
        why = "no temporary copy may go where there is room"
        remedy = "free one slot, or forbid less"
    cycle = [
        f"{ends.model.pair_text(j)} on {ends.gpu_text(holder)}"
        for _, holder, j in nx.find_cycle(graph)
    ]
    shown = " and ".join(cycle[:2]) + (f" and {len(cycle) - 2} more" if len(cycle) > 2 else "")
    return Infeasible(
        f"{found}: {why}, and {shown} wait for each other's place",
        shortfall=1,
        unit="slots",
        remedy=remedy,
    )
