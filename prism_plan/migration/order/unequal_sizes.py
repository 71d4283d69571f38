"""Experts of unequal size: a stuck GPU gets room by a temporary copy elsewhere or a duplicate."""

from __future__ import annotations

from collections.abc import Iterator

from prism_plan.errors import Infeasible
from prism_plan.migration.order.greedy import GreedyScheduler

#: (GPU, pair) of the temporary moves tried so far, none of which is tried twice.
Attempts = set[tuple[int, int]]


def relieve_stuck_gpu(scheduler: GreedyScheduler, tried: Attempts) -> None:
    """Make room on one stuck GPU; what is tried is added to ``tried``.

    Either another GPU takes a temporary copy of what the stuck one is to drop, or the stuck one
    drops a duplicate for a while.

    Raises
    ------
    Infeasible
        Everything was tried.
    """
    ends = scheduler.ends
    for stuck, j, host in _temporary_copies(scheduler, tried):
        if scheduler.make_room(host, int(ends.size[j])):
            tried.add((host, j))
            scheduler.load(host, j)
            scheduler.retry(stuck)
            return
    for g, borrowed in scheduler.least_used_duplicates():
        for size in sorted(scheduler.pending_loads[g]):
            enough = scheduler.state.free[g] + int(ends.size[borrowed]) >= size
            if enough and (g, borrowed) not in tried:
                tried.add((g, borrowed))
                scheduler.drop(g, borrowed)
                scheduler.load(g, scheduler.remove_load(g, size))
                scheduler.add_load(g, borrowed)
                scheduler.retry(g)
                return
    raise _fragmented(scheduler)


def _temporary_copies(
    scheduler: GreedyScheduler, tried: Attempts
) -> Iterator[tuple[int, int, int]]:
    """(stuck GPU, sole copy that it is to drop, GPU that may hold a temporary copy)."""
    pending = scheduler.pending_loads
    idle_first = sorted(range(len(pending)), key=lambda g: bool(pending[g]))
    for j, gpus in enumerate(scheduler.pending_drops):
        for g in gpus:
            if pending[g] and len(scheduler.state.copies[j]) == 1:
                for host in idle_first:
                    if scheduler.allowed[host, j] and host != g and (host, j) not in tried:
                        yield g, j, host


def _fragmented(scheduler: GreedyScheduler) -> Infeasible:
    ends = scheduler.ends
    g = next(g for g, heaps in enumerate(scheduler.pending_loads) if heaps)
    free = scheduler.state.free[g]
    size, heap = min(scheduler.pending_loads[g].items())
    return Infeasible(
        f"found no order of loads and drops: {ends.gpu_text(g)} has {free:,} "
        f"bytes free for {ends.model.pair_text(heap[0][-1])} of {size:,} bytes and holds "
        "the only copies of what it would drop (experts that differ in size leave gaps)",
        shortfall=size - free,
        unit="bytes",
        remedy="leave more room for the time of the move",
    )
