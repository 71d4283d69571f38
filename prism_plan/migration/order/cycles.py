"""Experts of one size: groups of full GPUs that wait for each other, moved around a circuit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx

from prism_plan.errors import Infeasible
from prism_plan.migration.order.free_slot import FreeSlotPath, find_dip, find_free_slot
from prism_plan.migration.order.greedy import GreedyScheduler
from prism_plan.migration.order.wait_for_graph import Move, wait_for_graph


def rotate_cycles(scheduler: GreedyScheduler) -> None:
    """Schedule the moves of every group of stuck GPUs, one after the other.

    Where a group can get a free slot only by a copy that cannot be spared, one expert has a copy
    less than it should for a while.

    Raises
    ------
    Infeasible
        A group can get no free slot, even so.
    """
    graph = wait_for_graph(scheduler)
    groups = [sorted(group) for group in nx.weakly_connected_components(graph)]
    for group in sorted(groups):
        within = graph.subgraph(group)
        moves: list[Move] = sorted(within.edges(keys=True), key=lambda move: move[2])
        path = find_free_slot(scheduler, group, moves) or find_dip(scheduler, group, moves)
        if path is None:
            raise _no_free_slot(scheduler, within)
        _rotate_cycle(scheduler, within, path, moves)
        for g in group:
            scheduler.pending_loads[g] = {}


def _rotate_cycle(
    scheduler: GreedyScheduler, graph: Any, path: FreeSlotPath, moves: Sequence[Move]
) -> None:
    """Bring the free slot to the group, move every expert of its circuit, and restore the rest."""
    dropped = path.borrowed if path.moved is None else path.moved
    if dropped is not None:
        scheduler.drop(path.start, dropped)
    else:
        scheduler.make_room(path.start, 1)
    free_gpu = path.start
    detours = []
    # the copy of the circuit that has left its GPU already: where it is, if anywhere
    moved_to: dict[tuple[int, int], int | None] = {}
    if path.moved is not None:
        moved_to[path.start, path.moved] = None
    of_circuit = {(holder, j) for _, holder, j in moves}
    for j, g in path.hops:
        scheduler.load(free_gpu, j)
        scheduler.drop(g, j)
        if (g, j) in of_circuit:
            moved_to[g, j] = free_gpu
        else:
            detours.append((j, g, free_gpu))
        free_gpu = g
    circuit = list(nx.eulerian_circuit(graph, source=free_gpu, keys=True))
    for moved in moved_to:  # its own move comes last
        turn = 1 + next(i for i, move in enumerate(circuit) if move[1:] == moved)
        circuit = circuit[turn:] + circuit[:turn]
    for waiting, holder, j in circuit:
        scheduler.load(waiting, j)
        left_at = moved_to.get((holder, j), holder)
        if left_at is not None:
            scheduler.drop(left_at, j)
    for j, g, holder in reversed(detours):
        scheduler.load(g, j)
        scheduler.drop(holder, j)
    if path.borrowed is not None:
        scheduler.load(path.start, path.borrowed)


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
