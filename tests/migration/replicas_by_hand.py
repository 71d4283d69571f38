"""Copies of experts during migrations, by referees that know nothing of how plans are made."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.plan import MigrationPlan
from prism_plan.placement import Placement
from tests.migration.moves_by_hand import capacities, flat, placed, sizes_of


def num_servers(placement: Placement, held: np.ndarray) -> np.ndarray:
    """On how many servers each pair is, [J], of what the GPUs hold, [G, J]."""
    on_server = np.zeros((placement.num_servers, held.shape[1]), bool)
    for g, n in enumerate(placement.server_of_gpu):
        on_server[n] |= held[g].astype(bool)
    return on_server.sum(axis=0)


def promised(a: Placement, b: Placement, min_replicas: int) -> np.ndarray:
    """On how many servers each pair is to be at every moment, [J]."""
    ends = [num_servers(placement, flat(placement)) for placement in (a, b)]
    return np.minimum(min_replicas, np.minimum(*ends))


def too_few_copies(
    plan: MigrationPlan, done: frozenset[int], a: Placement, b: Placement
) -> str | None:
    """What the plan does not say of the copies that are there when exactly ``done`` is complete."""
    held = flat(a).astype(int)
    for index in done:
        held[plan.steps[index].gpu, plan.steps[index].pair] += (
            1 if plan.steps[index].kind == "load" else -1
        )
    least = promised(a, b, plan.min_replicas)
    for dip in plan.dips:
        if dip.drop in done and dip.load not in done:
            least[dip.pair] = min(least[dip.pair], dip.copies)
    found = num_servers(a, held)
    for j in np.flatnonzero(found < least)[:1]:
        return f"after {sorted(done)}: {found[j]} copies of {j}, not {least[j]}"
    return None


def fewest_dips(
    a: Placement, b: Placement, min_replicas: int, forbidden: np.ndarray | None = None
) -> int | None:
    """By how many copies in all experts have to fall below what is promised; ``None``: no order.

    Search over all states, for every way to distribute so many copies over the experts.
    """
    wanted = promised(a, b, min_replicas)
    room = np.maximum(wanted - 1, 0)
    lowest = [range(int(n) + 1) for n in room]
    if not _can_keep(a, b, np.minimum(wanted, 1), forbidden):
        return None
    for dips in sorted(itertools.product(*lowest), key=sum):
        if _can_keep(a, b, wanted - np.array(dips), forbidden):
            return sum(dips)
    raise AssertionError("an order exists that keeps single copies")


def _can_keep(
    a: Placement, b: Placement, floor: Sequence[int] | np.ndarray, forbidden: np.ndarray | None
) -> bool:
    """Whether an order exists that leaves ``floor`` servers for each pair; states are bit sets."""
    gpus, pairs = flat(a).shape
    server = a.server_of_gpu.tolist()
    size, capacity = sizes_of(a).tolist(), capacities(b).tolist()
    barred = np.zeros((gpus, pairs), bool) if forbidden is None else forbidden & ~flat(b)
    bit = [[1 << (g * pairs + j) for j in range(pairs)] for g in range(gpus)]
    masks = [
        [sum(bit[g][j] for g in range(gpus) if server[g] == n) for n in sorted(set(server))]
        for j in range(pairs)
    ]

    def code(held: np.ndarray) -> int:
        return sum(bit[g][j] for g, j in np.argwhere(held).tolist())

    def enough(state: int, j: int) -> bool:
        return sum((state & mask) != 0 for mask in masks[j]) >= floor[j]

    goal = code(flat(b))
    seen = {code(flat(a))}
    stack = list(seen)
    while stack:
        state = stack.pop()
        if state == goal:
            return True
        for g in range(gpus):
            row = [j for j in range(pairs) if state & bit[g][j]]
            used = sum(size[j] for j in row)
            following = [state ^ bit[g][j] for j in row if enough(state ^ bit[g][j], j)]
            following += [
                state ^ bit[g][j]
                for j in range(pairs)
                if not state & bit[g][j] and used + size[j] <= capacity[g] and not barred[g, j]
            ]
            for other in following:
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
    return False


@dataclasses.dataclass(frozen=True)
class Case:
    """Two placements, how many replicas a move between them keeps, and where none may go [N, J]."""

    a: Placement
    b: Placement
    min_replicas: int
    forbidden: np.ndarray

    @property
    def forbidden_on_gpus(self) -> np.ndarray:
        """The same for each GPU, bool [G, J]."""
        return self.forbidden[self.a.server_of_gpu]

    def plan(self, **options: Any) -> MigrationPlan:
        """The migration plan."""
        model = self.a.model
        shape = (-1, model.num_layers, model.num_experts)
        return migration_plan(
            self.a, self.b, forbidden=self.forbidden.reshape(shape),
            min_replicas=self.min_replicas, **options,
        )  # fmt: skip


def drawn_case(
    seed: int,
    *,
    servers: int = 4,
    pairs: int = 5,
    several_gpus: bool = False,
    forbidden: bool = False,
    unequal: bool = False,
    uncovered: bool = False,
) -> Case:
    """Placements with two or three replicas of most pairs on GPUs that are full, or nearly.

    The second one is mostly the first with a few pairs exchanged, so that full GPUs wait for each
    other. ``servers`` and ``pairs`` are the most that there are.
    """
    rng = np.random.default_rng(seed)
    num = int(rng.integers(3, servers + 1))
    gpus = [1 + int(several_gpus and rng.random() < 0.5) for _ in range(num)]
    server = np.repeat(np.arange(num), gpus)
    pairs = int(rng.integers(2, pairs + 1))
    replicas = 2 if rng.random() < 0.8 else 3
    size = rng.integers(1, 4, pairs) if unequal else np.ones(pairs, int)
    if unequal:
        size[0] = 4
    a, b = (_filled(rng, server, pairs, replicas) for _ in "ab")
    if rng.random() < 0.8:
        b = _with_exchanges(rng, a, server, int(rng.integers(1, 8)))
    if uncovered:
        a = a & (rng.random(pairs) < 0.7)
    room = np.maximum(a @ size, b @ size)
    if rng.random() < 0.4:
        room[rng.integers(len(room))] += int(rng.integers(0, 3))
    sizes = size.tolist() if unequal else None
    barred = (rng.random((num, pairs)) < 0.4) & forbidden
    both = (
        placed(
            [np.flatnonzero(row) for row in held], room.tolist(), pairs=pairs, gpus=gpus,
            sizes=sizes,
        )
        for held in (a, b)
    )  # fmt: skip
    return Case(*both, replicas, barred)


def _filled(rng: np.random.Generator, server: np.ndarray, pairs: int, replicas: int) -> np.ndarray:
    held = np.zeros((len(server), pairs), bool)
    num = int(server.max()) + 1
    for j in range(pairs):
        some = replicas if rng.random() < 0.8 else int(rng.integers(1, replicas + 1))
        for n in rng.choice(num, min(num, some), replace=False):
            held[rng.choice(np.flatnonzero(server == n)), j] = True
    return held


def _with_exchanges(
    rng: np.random.Generator, held: np.ndarray, server: np.ndarray, times: int
) -> np.ndarray:
    """Pairs of two GPUs change places, where that leaves each on as many servers."""
    held = held.copy()
    for _ in range(times if len(held) > 1 else 0):
        g, h = rng.choice(len(held), 2, replace=False)

        def may_go(src: int, dst: int) -> np.ndarray:
            there = held[server == server[dst]].any(axis=0) & (server[src] != server[dst])
            return np.flatnonzero(held[src] & ~held[dst] & ~there)

        there, back = may_go(g, h), may_go(h, g)
        if len(there) and len(back):
            x, y = rng.choice(there), rng.choice(back)
            held[g, x] = held[h, y] = False
            held[h, x] = held[g, y] = True
    return held
