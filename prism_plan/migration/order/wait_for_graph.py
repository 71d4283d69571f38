"""Which full GPUs wait for each other's copies: the moves that one free slot can lead around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx

from prism_plan.migration.order.greedy import GreedyScheduler

#: The move of a copy that cannot be spared: (GPU that waits for it, GPU that holds it, pair).
Move = tuple[int, int, int]


def wait_for_graph(scheduler: GreedyScheduler) -> Any:
    """Moves of copies between stuck GPUs, as edges from the GPU that waits to the holder.

    Every GPU has as many edges in as out, for each stuck pair is dropped as often as it is loaded:
    else it had a copy to spare.
    """
    waiting: dict[int, list[int]] = {}
    for g, heaps in enumerate(scheduler.pending_loads):
        for _, _, j in sorted(key for heap in heaps.values() for key in heap):
            waiting.setdefault(j, []).append(g)
    graph = nx.MultiDiGraph()
    for g, holder, j in _connected(_moves(scheduler, waiting), scheduler.state.server):
        graph.add_edge(g, holder, key=j)
    return graph


def _moves(scheduler: GreedyScheduler, waiting: dict[int, list[int]]) -> list[Move]:
    """The pending loads of each pair, by the order of GPUs, and the drops that wait for them.

    A GPU that shifts a pair to another one of its server hands it to that one.
    """
    server = scheduler.state.server
    moves: list[Move] = []
    for j, gpus in waiting.items():
        holders = [
            g
            for g in scheduler.state.copies[j]
            if g in scheduler.pending_drops[j] and not scheduler.may_drop(g, j)
        ]
        shifted = {g: h for g in gpus for h in holders if server[g] == server[h]}
        rest = [h for h in holders if h not in shifted.values()]
        others = [g for g in gpus if g not in shifted]
        moves += [(g, h, j) for g, h in shifted.items()]
        moves += [(g, h, j) for g, h in zip(others, rest, strict=True)]
    return sorted(moves, key=lambda move: move[0])


def _connected(moves: list[Move], server: Sequence[int]) -> list[Move]:
    """The moves with receivers of a pair exchanged so that its moves are in one group.

    One group needs one free slot; two moves of a pair in two groups are as good crosswise.
    """
    groups = nx.utils.UnionFind(g for move in moves for g in move[:2])
    for g, holder, _ in moves:
        groups.union(g, holder)
    first: dict[int, int] = {}  # the first move of each pair from one server to another
    for i, (g, holder, j) in enumerate(moves):
        if server[g] == server[holder]:
            continue
        k = first.setdefault(j, i)
        other_g, other_holder, _ = moves[k]
        if groups[g] != groups[other_g]:
            groups.union(g, other_g)
            moves[i], moves[k] = (g, other_holder, j), (other_g, holder, j)
    return moves
