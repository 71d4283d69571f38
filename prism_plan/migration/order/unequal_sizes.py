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
    drops a duplicate for a while. Where nothing of this is left to try, some expert may from then
    on have a copy less than it should.

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
    if not _lower_a_floor(scheduler):
        raise _fragmented(scheduler)


def _lower_a_floor(scheduler: GreedyScheduler) -> bool:
    """Let a stuck GPU drop a copy that cannot be spared, of an expert that others hold too.

    If possible one that alone makes enough room, of these that of the expert called least.
    """
    calls, size = scheduler.priority.sum(axis=0), scheduler.ends.size
    candidates = []
    for j, gpus in enumerate(scheduler.pending_drops):
        for g in gpus if scheduler.floor[j] > 1 else ():
            if scheduler.pending_loads[g] and not scheduler.may_drop(g, j):
                room = scheduler.state.free[g] + int(size[j])
                enough = room >= min(scheduler.pending_loads[g])
                candidates.append((not enough, float(calls[j]), j))
    if not candidates:
        return False
    _, _, lowered = min(candidates)
    scheduler.floor[lowered] -= 1
    for g in scheduler.pending_drops[lowered]:
        scheduler.offer_drop(g, lowered)
        scheduler.retry(g)
    return True


def _temporary_copies(
    scheduler: GreedyScheduler, tried: Attempts
) -> Iterator[tuple[int, int, int]]:
    """(stuck GPU, copy to drop that cannot be spared, GPU that may hold one for a while)."""
    pending, state = scheduler.pending_loads, scheduler.state

    def may_hold(host: int, g: int, j: int) -> bool:
        n = state.server[host]
        elsewhere = n == state.server[g] or not state.num_on_server(n, j)
        return bool(scheduler.allowed[host, j] and elsewhere and not state.held[host, j])

    idle_first = sorted(range(len(pending)), key=lambda g: bool(pending[g]))
    for j, gpus in enumerate(scheduler.pending_drops):
        for g in gpus:
            if pending[g] and not scheduler.may_drop(g, j):
                for host in idle_first:
                    if may_hold(host, g, j) and (host, j) not in tried:
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
