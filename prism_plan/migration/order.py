"""In which order experts move: always covered, always within memory, at the target in the end.

A load waits for the drop that freed its room, a drop for the load of a copy that stays. The greedy
part loads what is called most, onto any GPU with room, and makes room by dropping what has another
copy. Where experts are of one size, it gets stuck only if every pending load is the sole copy of an
expert on a GPU that is stuck as well, as many in as out: then each connected group of such GPUs has
an Euler circuit, and one free slot (or duplicate) anywhere, put back afterwards, leads around it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prism_plan.errors import Infeasible, InputError
from prism_plan.migration.plan import (
    NAMES,
    Bools,
    Capacity,
    Endpoints,
    MigrationPlan,
    endpoints,
)
from prism_plan.migration_step import MigrationStep
from prism_plan.placement import Placement

#: A move of a sole copy that others wait for: (GPU that wants it, GPU that holds it, pair).
Move = tuple[int, int, int]


def migration_plan(
    a: Placement,
    b: Placement,
    *,
    gpu_capacity: Capacity | None = None,
    forbidden: npt.ArrayLike | None = None,
    priority: npt.ArrayLike | None = None,
    names: tuple[str, str] = NAMES,
) -> MigrationPlan:
    """The migration steps that lead from ``a`` to ``b``.

    Servers are matched by name and come in the order of ``b``. ``gpu_capacity`` is as in
    :class:`~prism_plan.instance.Instance`, by default that of ``b``. ``forbidden`` bool [N, L, E]
    says where no temporary copy may go. Loads of high ``priority`` come first: calls per second,
    [G, J] or [N, L, E]; ties go to the lowest index. Experts that nobody holds yet come before
    all others where that leaves room to move the rest. ``names`` are what errors call the two.

    Where experts are of one size, and nothing is forbidden, an order is found if one exists, with
    at most two extra loads for a group of GPUs that wait for each other. Where sizes differ or
    places are forbidden, the search may fail though an order exists.

    Raises
    ------
    InputError
        See :func:`~prism_plan.migration.plan.endpoints`; a shape is wrong, a priority is NaN.
    Infeasible
        No order exists, or none was found; says which and why.
    """
    ends = endpoints(a, b, gpu_capacity, names)
    order = _Order(
        ends,
        ~_by_gpu(ends, forbidden, "forbidden", bool) | ends.has,
        _by_gpu(ends, priority, "priority", np.float64),
    )
    order.run()
    return MigrationPlan(ends.model, ends.servers, ends.gpus, _in_order(order.way.steps))


def _by_gpu(ends: Endpoints, given: npt.ArrayLike | None, name: str, dtype: Any) -> Any:
    """Values for each GPU and pair [G, J], from those or from [N, L, E]."""
    gpus, pairs = ends.had.shape
    if given is None:
        return np.zeros((gpus, pairs), dtype)
    values = np.asarray(given, dtype)
    by_server = (len(ends.servers), ends.model.num_layers, ends.model.num_experts)
    if values.shape == by_server:
        values = values.reshape(len(ends.servers), pairs).repeat(ends.gpus, axis=0)
    if values.shape != (gpus, pairs):
        raise InputError(
            f"shape {values.shape}", place=name, expected=f"{by_server} or {(gpus, pairs)}"
        )
    if np.isnan(values).any():
        raise InputError("NaN", place=name, expected="numbers")
    return values


def _in_order(steps: Sequence[MigrationStep]) -> tuple[MigrationStep, ...]:
    """The steps, sorted topologically (the earliest made first), with needs renumbered."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(steps)))
    graph.add_edges_from((need, index) for index, step in enumerate(steps) for need in step.needs)
    order = list(nx.lexicographical_topological_sort(graph))  # raises where there is a cycle
    place = {index: at for at, index in enumerate(order)}
    return tuple(
        MigrationStep(
            step.kind,
            step.gpu,
            step.pair,
            tuple(sorted(place[need] for need in step.needs)),
            step.temporary,
        )
        for step in (steps[index] for index in order)
    )


# -------------------------------------------------------------------------- steps and their needs


@dataclass
class _Copy:
    """A copy of a pair on a GPU, while it is there; both fields are indices of steps."""

    loaded_by: int | None = None
    witness_of: list[int] = field(default_factory=list)


class _Way:
    """Who holds what after the steps so far, and what each step had to wait for.

    Where experts are of one size, a load waits for the one drop that freed its slot. Where sizes
    differ, all steps of a GPU wait for each other in turn.
    """

    def __init__(self, ends: Endpoints) -> None:
        self.ends = ends
        self._in_slots = ends.model.equal_expert_bytes
        self.steps: list[MigrationStep] = []
        self.held = ends.had.copy()
        self.free: list[int] = (ends.capacity - ends.had @ ends.size).tolist()
        self.copies: list[dict[int, _Copy]] = [{} for _ in range(ends.had.shape[1])]
        for g, j in np.argwhere(ends.had).tolist():
            self.copies[j][g] = _Copy()
        self.keepers: list[int] = (ends.had & ends.has).sum(axis=0).tolist()
        self._untouched = list(self.free)  # slots that were free from the start
        self._freed_by: list[deque[int]] = [deque() for _ in ends.had]
        self._last: list[int | None] = [None] * len(ends.had)
        self._dropped_by: dict[tuple[int, int], int] = {}

    def load(self, g: int, j: int) -> None:
        """Load a pair for which there is room."""
        needs = set()
        size = int(self.ends.size[j])
        if self._in_slots:
            if self._untouched[g]:
                self._untouched[g] -= 1
            else:
                needs.add(self._freed_by[g].popleft())
            if (g, j) in self._dropped_by:
                needs.add(self._dropped_by[g, j])
        self.free[g] -= size
        assert self.free[g] >= 0, "a load without room"
        self.held[g, j] = True
        self.keepers[j] += bool(self.ends.has[g, j])
        temporary = not self.ends.has[g, j] or (g, j) in self._dropped_by
        self.copies[j][g] = _Copy(self._add("load", g, j, needs, temporary))

    def drop(self, g: int, j: int) -> None:
        """Drop a pair of which there is another copy: its witness, which stays at least so long."""
        copy = self.copies[j].pop(g)
        needs = set(copy.witness_of)
        if copy.loaded_by is not None:
            needs.add(copy.loaded_by)
        witness = self._witness(j)
        if witness.loaded_by is not None:
            needs.add(witness.loaded_by)
        self.free[g] += int(self.ends.size[j])
        self.held[g, j] = False
        self.keepers[j] -= bool(self.ends.has[g, j])
        temporary = bool(self.ends.has[g, j]) or copy.loaded_by is not None
        index = self._add("drop", g, j, needs, temporary)
        witness.witness_of.append(index)
        self._freed_by[g].append(index)
        self._dropped_by[g, j] = index

    def _witness(self, j: int) -> _Copy:
        """A copy that need not be loaded first and is not dropped later, if there is one."""
        best = None
        for g, copy in self.copies[j].items():
            rank = (not self.ends.has[g, j], copy.loaded_by is not None, copy.loaded_by or g)
            if best is None or rank < best[0]:
                best = (rank, copy)
            if not any(rank[:2]):
                break
        assert best is not None, "a drop of the last copy"
        return best[1]

    def _add(
        self, kind: Literal["load", "drop"], g: int, j: int, needs: set[int], temporary: bool
    ) -> int:
        last = self._last[g]
        if last is not None and not self._in_slots:
            needs.add(last)
        index = self._last[g] = len(self.steps)
        self.steps.append(MigrationStep(kind, g, j, tuple(needs), temporary))
        return index


# ------------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class _Hole:
    """How a group of waiting GPUs gets a free slot.

    GPU ``start`` drops the duplicate ``lent`` for a while, or has room if that is ``None``. Then
    for each hop (pair, GPU) the GPU hands the pair to the one before it, and has the free slot.
    """

    start: int
    lent: int | None
    hops: tuple[tuple[int, int], ...]


class _Order:
    """The search for an order: greedy first, then around the circuits that are left."""

    def __init__(self, ends: Endpoints, allowed: Bools, priority: npt.NDArray[np.float64]) -> None:
        self.ends = ends
        self.allowed = allowed
        self.priority = priority
        self.way = _Way(ends)
        gpus, pairs = ends.had.shape
        self.covered: Bools = np.asarray(ends.had.any(axis=0))
        self.leaving: list[dict[int, None]] = [{} for _ in range(pairs)]  # GPUs that will drop it
        self.safe: list[list[tuple[bool, float, int]]] = [[] for _ in range(gpus)]
        self.pending: list[dict[int, list[tuple[bool, float, int]]]] = [{} for _ in range(gpus)]
        self.ready: list[tuple[tuple[bool, float, int], int]] = []
        self.queued = [False] * gpus
        self.tried: set[tuple[int, int]] = set()  # unequal sizes: temporary moves so far

    def run(self) -> None:
        """Make all steps."""
        new = self.ends.has & ~self.ends.had
        late = np.zeros_like(new) if self._slack_after_new() >= 1 else new & ~self.covered
        for g, j in np.argwhere(self.ends.had & ~self.ends.has).tolist():
            self.leaving[j][g] = None
            self._offer(g, j)
        self._want(new & ~late)
        while self._any_pending():
            if self.ends.model.equal_expert_bytes:
                self._around_circuits()
            else:
                self._relieve()
            self._greedy()
        self._want(late)  # every other expert is at its target, so all pending drops are safe
        assert not self._any_pending(), "a load without a safe drop"
        for g, j in sorted((g, j) for j, gpus in enumerate(self.leaving) for g in gpus):
            self._drop(g, j)

    def _slack_after_new(self) -> int:
        """Free slots and duplicates when all experts that nobody held have their first copy.

        Their loads use up slack for good; if nothing is left, they have to come last. Where sizes
        differ no such promise can be made, and they come first.
        """
        if not self.ends.model.equal_expert_bytes:
            return 1
        return int(self.ends.capacity.sum()) - int(self.ends.has.any(axis=0).sum())

    def _want(self, loads: Bools) -> None:
        for g, j in np.argwhere(loads).tolist():
            self._push(g, j)
        for g in range(len(self.pending)):
            self._queue(g)
        self._greedy()

    def _push(self, g: int, j: int) -> None:
        size = int(self.ends.size[j])
        key = (bool(self.covered[j]), -float(self.priority[g, j]), j)
        heapq.heappush(self.pending[g].setdefault(size, []), key)

    def _queue(self, g: int) -> None:
        """Let a GPU with pending loads try again."""
        if not self.queued[g] and self.pending[g]:
            key = min(heap[0] for heap in self.pending[g].values())
            heapq.heappush(self.ready, (key, g))
            self.queued[g] = True

    def _any_pending(self) -> bool:
        return any(self.pending)

    def _offer(self, g: int, j: int) -> None:
        """Note that a pending drop is safe, if it is: one with a copy that stays goes first."""
        if len(self.way.copies[j]) > 1:
            key = (not self.way.keepers[j], float(self.priority[g, j]), j)
            heapq.heappush(self.safe[g], key)

    def _load(self, g: int, j: int) -> None:
        self.way.load(g, j)
        if not self.ends.has[g, j]:
            self.leaving[j][g] = None
        first_keeper = self.ends.has[g, j] and self.way.keepers[j] == 1
        if len(self.way.copies[j]) == 2 or first_keeper:
            for other in self.leaving[j]:
                self._offer(other, j)
                self._queue(other)
        elif g in self.leaving[j]:
            self._offer(g, j)

    def _drop(self, g: int, j: int) -> None:
        self.way.drop(g, j)
        self.leaving[j].pop(g, None)

    def _greedy(self) -> None:
        """Load while some GPU has room or can make it."""
        while self.ready:
            _, g = heapq.heappop(self.ready)
            self.queued[g] = False
            for key, size in sorted((heap[0], size) for size, heap in self.pending[g].items()):
                drops = self._room(g, size)
                if drops is not None:
                    for j in drops:
                        self._drop(g, j)
                    self._unpend(g, size)
                    self._load(g, key[-1])
                    self._queue(g)
                    break

    def _unpend(self, g: int, size: int) -> None:
        heapq.heappop(self.pending[g][size])
        if not self.pending[g][size]:
            del self.pending[g][size]

    def _room(self, g: int, size: int) -> list[int] | None:
        """Safe pending drops that make room for so much, or None if there are too few."""
        room = self.way.free[g]
        taken: list[tuple[bool, float, int]] = []
        while room < size and self.safe[g]:
            key = heapq.heappop(self.safe[g])
            j = key[-1]
            known = any(j == other[-1] for other in taken)
            if g in self.leaving[j] and len(self.way.copies[j]) > 1 and not known:
                taken.append(key)
                room += int(self.ends.size[j])
        if room >= size:
            return [key[-1] for key in taken]
        for key in taken:
            heapq.heappush(self.safe[g], key)
        return None

    # --------------------------------------------------------------- circuits (experts of one size)

    def _waiting(self) -> Any:
        """Moves of sole copies between stuck GPUs, as edges from who wants to who holds."""
        import networkx as nx

        graph = nx.MultiDiGraph()
        for g, heaps in enumerate(self.pending):
            for _, _, j in sorted(key for heap in heaps.values() for key in heap):
                for holder in self.way.copies[j]:
                    if holder in self.leaving[j] and len(self.way.copies[j]) == 1:
                        graph.add_edge(g, holder, key=j)
        return graph

    def _around_circuits(self) -> None:
        """Finish every group of stuck GPUs, one after the other."""
        import networkx as nx

        graph = self._waiting()
        groups = [sorted(group) for group in nx.weakly_connected_components(graph)]
        for group in sorted(groups):
            edges = graph.subgraph(group).edges(keys=True)
            moves: list[Move] = sorted(edges, key=lambda move: move[2])
            hole = self._find_hole(group, moves)
            if hole is None:
                raise self._no_hole(graph.subgraph(group))
            self._go_around(graph.subgraph(group), hole, {j for _, _, j in moves})
            for g in group:
                self.pending[g] = {}

    def _go_around(self, graph: Any, hole: _Hole, moving: set[int]) -> None:
        import networkx as nx

        if hole.lent is not None:
            self._drop(hole.start, hole.lent)
        else:
            for j in self._room(hole.start, 1) or ():
                self._drop(hole.start, j)
        at = hole.start
        back = []
        first = None  # a pair of the circuit that has already left its GPU, for `at`
        for j, g in hole.hops:
            self._load(at, j)
            self._drop(g, j)
            if j in moving:
                first = (j, at)
            else:
                back.append((j, g, at))
            at = g
        circuit = [(n, m, j) for n, m, j in nx.eulerian_circuit(graph, source=at, keys=True)]
        if first is not None:
            turn = 1 + next(i for i, move in enumerate(circuit) if move[2] == first[0])
            circuit = circuit[turn:] + circuit[:turn]
        for n, m, j in circuit:
            self._load(n, j)
            if first is not None and j == first[0]:
                self._drop(first[1], j)
            else:
                self._drop(m, j)
        for j, g, holder in reversed(back):
            self._load(g, j)
            self._drop(holder, j)
        if hole.lent is not None:
            self._load(hole.start, hole.lent)

    def _find_hole(self, group: Sequence[int], moves: Sequence[Move]) -> _Hole | None:
        """The cheapest way to a free slot for the group: one extra load, two, or more."""
        holders = np.array([m for _, m, _ in moves])
        pairs = np.array([j for _, _, j in moves])
        server = np.repeat(np.arange(len(self.ends.gpus)), self.ends.gpus)

        def helped(f: int) -> tuple[tuple[int, int], ...]:
            """A hop of a moving pair to ``f``, which is best on the holder's own server."""
            fit = np.flatnonzero(self.allowed[f, pairs])
            near = fit[server[holders[fit]] == server[f]]
            return tuple((int(pairs[i]), int(holders[i])) for i in (*near[:1], *fit[:1]))[:1]

        rooms = [
            f
            for f, heaps in enumerate(self.pending)
            if not heaps and (self.way.free[f] > 0 or self._has_safe(f))
        ]
        for f in rooms:
            if helped(f):
                return _Hole(f, None, helped(f))
        lent = self._lendable()
        inside = [(self.priority[g, j], g, j) for g, j in lent if g in set(group)]
        if inside:
            _, g, j = min(inside)
            return _Hole(g, j, ())
        for _, f, j in sorted((self.priority[g, j], g, j) for g, j in lent):
            if helped(f):
                return _Hole(f, j, helped(f))
        starts = [_Hole(f, None, ()) for f in rooms] + [_Hole(f, j, ()) for f, j in lent]
        return self._walk(starts, set(group))

    def _has_safe(self, g: int) -> bool:
        drops = self._room(g, self.way.free[g] + 1)
        for j in drops or ():
            self._offer(g, j)
        return bool(drops)

    def _lendable(self) -> list[tuple[int, int]]:
        """The copy of each GPU that is called least there of those that stay and have another."""
        several = self.way.held & self.ends.has & (self.way.held.sum(axis=0) > 1)
        found = []
        for g in np.flatnonzero(several.any(axis=1)).tolist():
            pairs = np.flatnonzero(several[g])
            found.append((g, int(pairs[np.argmin(self.priority[g, pairs])])))
        return found

    def _walk(self, starts: Sequence[_Hole], group: set[int]) -> _Hole | None:
        """Breadth first over GPUs: a free slot moves on to any GPU that can hand over an expert.

        If it does not reach the group, no expert of the GPUs that it did not reach may enter those
        that it did, so they can never move: there is no way on from here.
        """
        queue = deque(starts)
        seen = {hole.start for hole in starts}
        while queue:
            hole = queue.popleft()
            at = hole.hops[-1][1] if hole.hops else hole.start
            welcome = self.allowed[at] & ~self.way.held[at]
            for g in np.flatnonzero((self.way.held & welcome).any(axis=1)).tolist():
                if g in seen:
                    continue
                seen.add(g)
                j = int(np.flatnonzero(self.way.held[g] & welcome)[0])
                step = _Hole(hole.start, hole.lent, (*hole.hops, (j, g)))
                if g in group:
                    return step
                queue.append(step)
        return None

    def _no_hole(self, graph: Any) -> Infeasible:
        held = int(self.way.held.sum())
        if held == int(self.ends.capacity.sum()) and not (self.way.held.sum(axis=0) > 1).any():
            found = "no order of loads and drops leads there"
            why = "every GPU is full and every expert has one copy"
            remedy = "free one slot on any GPU for the time of the move"
        else:
            found = "found no order of loads and drops"
            why = "no temporary copy may go where there is room"
            remedy = "free one slot, or forbid less"
        return Infeasible(
            f"{found}: {why}, and {self._cycle_text(graph)}",
            shortfall=1,
            unit="slots",
            remedy=remedy,
        )

    def _cycle_text(self, graph: Any) -> str:
        import networkx as nx

        cycle = list(nx.find_cycle(graph))
        names = [
            f"{self.ends.model.pair_text(j)} on {self.ends.gpu_text(holder)}"
            for _, holder, j in cycle
        ]
        shown = " and ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        return f"{shown} wait for each other's place"

    # ------------------------------------------------------------------ experts of unequal size

    def _relieve(self) -> None:
        """Help one stuck GPU by a temporary copy, or let one lend the room of a duplicate."""
        for g, j, f in self._helpers():
            drops = self._room(f, int(self.ends.size[j]))
            if drops is not None:
                self.tried.add((f, j))
                for other in drops:
                    self._drop(f, other)
                self._load(f, j)
                self._queue(g)
                return
        for g, lent in self._lendable():
            for size in sorted(self.pending[g]):
                enough = self.way.free[g] + int(self.ends.size[lent]) >= size
                if enough and (g, lent) not in self.tried:
                    self.tried.add((g, lent))
                    self._drop(g, lent)
                    wanted = self.pending[g][size][0][-1]
                    self._unpend(g, size)
                    self._load(g, wanted)
                    self._push(g, lent)
                    self._queue(g)
                    return
        raise self._fragmented()

    def _helpers(self) -> Iterator[Move]:
        """(stuck GPU, sole copy that it will drop, GPU that may hold a temporary copy)."""
        idle_first = sorted(range(len(self.pending)), key=lambda f: bool(self.pending[f]))
        for j, gpus in enumerate(self.leaving):
            for g in gpus:
                if self.pending[g] and len(self.way.copies[j]) == 1:
                    for f in idle_first:
                        if self.allowed[f, j] and f != g and (f, j) not in self.tried:
                            yield g, j, f

    def _fragmented(self) -> Infeasible:
        g = next(g for g, heaps in enumerate(self.pending) if heaps)
        size, heap = min(self.pending[g].items())
        return Infeasible(
            f"found no order of loads and drops: {self.ends.gpu_text(g)} has {self.way.free[g]:,} "
            f"bytes free for {self.ends.model.pair_text(heap[0][-1])} of {size:,} bytes and holds "
            "the only copies of what it would drop (experts that differ in size leave gaps)",
            shortfall=size - self.way.free[g],
            unit="bytes",
            remedy="leave more room for the time of the move",
        )
