"""Minimum-cost flow of the placement problem by shortest augmenting paths over servers.

Without coverage each server's best experts are optimal, so that is where the search starts.
Then, for every copy that coverage still wants, one shortest path says who takes it: a server makes
room by handing an expert to another server that lacks it, and so on, until one drops an expert
that has copies to spare or has a free slot. Potentials (distances to the end of a path) keep the
search short, A*-like, and are the dual prices of the certificate. Costs are whole numbers, so
that nothing depends on rounding.

Nodes are (server, group) pairs, numbered ``n * groups + g``, and one hub for each server: a group
is a layer where layer caps are given, else all experts. A token at node (n, g) is an expert too
many of group g on n; at hub n it is an expert too many on n, of whichever group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.jit import jit

FREE, HELD, FORBIDDEN, PINNED = 0, 1, 2, 3

Ints = npt.NDArray[Any]


@jit
def _add(
    k: int, n: int, g: int, state: Ints, place: Ints, held: Ints, count: Ints, used: Ints,
    copies: Ints,
) -> None:  # pragma: no cover - compiled
    state[k, n] = HELD
    place[k, n] = count[n, g]
    held[n, g, count[n, g]] = k
    count[n, g] += 1
    used[n] += 1
    copies[k] += 1


@jit
def _remove(
    k: int, n: int, g: int, state: Ints, place: Ints, held: Ints, count: Ints, used: Ints,
    copies: Ints,
) -> None:  # pragma: no cover - compiled
    state[k, n] = FREE
    count[n, g] -= 1
    last = held[n, g, count[n, g]]
    held[n, g, place[k, n]] = last
    place[last, n] = place[k, n]
    used[n] -= 1
    copies[k] -= 1


@jit
def start(
    weight: Ints, order: Ints, state: Ints, slots: Ints, cap: Ints, group_size: int, far: int,
    place: Ints, held: Ints, count: Ints, used: Ints, copies: Ints, potential: Ints,
) -> None:  # pragma: no cover - compiled
    """Give each server its pins and then its best experts; set the potentials to match.

    ``weight`` int64 [J, N]; ``order`` [N, J] by falling weight; ``state`` int8 [J, N] with FREE,
    FORBIDDEN and PINNED; ``slots`` [N]; ``cap`` [N, groups]. The rest is filled in.
    """
    pairs, servers = weight.shape
    groups = cap.shape[1]
    for n in range(servers):
        lowest = np.full(groups, far, np.int64)
        for k in range(pairs):
            if state[k, n] == PINNED:
                count_at = k // group_size
                place[k, n] = -1
                used[n] += 1
                cap[n, count_at] -= 1  # pins are outside the lists and the caps
                copies[k] += 1
        price = far if used[n] >= slots[n] else 0
        for i in range(pairs):
            k = order[n, i]
            if used[n] >= slots[n] or weight[k, n] <= 0:
                break
            g = k // group_size
            if state[k, n] != FREE or count[n, g] >= cap[n, g]:
                continue
            _add(k, n, g, state, place, held, count, used, copies)
            lowest[g] = weight[k, n]
            if used[n] >= slots[n]:
                price = weight[k, n]
        potential[servers * groups + n] = price
        for g in range(groups):
            full = count[n, g] >= cap[n, g]
            potential[n * groups + g] = max(price, lowest[g]) if full else price


@jit
def cover(
    weight: Ints, state: Ints, slots: Ints, cap: Ints, group_size: int, min_replicas: int,
    far: int, place: Ints, held: Ints, count: Ints, used: Ints, copies: Ints, potential: Ints,
    work: Ints,
) -> int:  # pragma: no cover - compiled
    """Augment until every expert has ``min_replicas`` copies; -1, or an expert that cannot.

    ``work`` int64 [2] counts augmentations and expanded nodes.
    """
    pairs, servers = weight.shape
    groups = cap.shape[1]
    hub = servers * groups
    nodes = hub + servers
    infinite = np.int64(1) << 62
    key = np.empty(nodes, np.int64)  # length from the source plus potential
    done = np.empty(nodes, np.bool_)
    parent = np.empty(nodes, np.int64)  # node before, or -1 at the source
    moved = np.empty(nodes, np.int64)  # expert handed over on the way from it, or -1
    for wanted in range(pairs):
        while copies[wanted] < min_replicas:
            key[:] = infinite
            done[:] = False
            own = wanted // group_size
            for n in range(servers):
                if state[wanted, n] == FREE:
                    v = n * groups + own
                    key[v] = potential[v] - weight[wanted, n]
                    parent[v] = -1
                    moved[v] = wanted
            best = infinite  # length of the shortest complete path so far
            end = -1
            dropped = np.int64(-1)
            while True:
                v = -1
                least = best
                for u in range(nodes):
                    if not done[u] and key[u] < least:
                        least = key[u]
                        v = u
                if v < 0:
                    break
                done[v] = True
                work[1] += 1
                length = key[v] - potential[v]
                if length + far < best:  # more than there is room for: the way out of no way
                    best, end, dropped = length + far, v, np.int64(-1)
                if v >= hub:
                    n = v - hub
                    if used[n] < slots[n]:
                        if length < best:
                            best, end, dropped = length, v, np.int64(-1)
                        continue
                    for g in range(groups):
                        u = n * groups + g
                        if count[n, g] > 0 and not done[u] and length + potential[u] < key[u]:
                            key[u] = length + potential[u]
                            parent[u] = v
                            moved[u] = -1
                    continue
                n, g = v // groups, v % groups
                u = hub + n
                if count[n, g] < cap[n, g] and not done[u] and length + potential[u] < key[u]:
                    key[u] = length + potential[u]
                    parent[u] = v
                    moved[u] = -1
                for i in range(count[n, g]):
                    k = held[n, g, i]
                    without = length + weight[k, n]
                    if copies[k] > min_replicas and without < best:
                        best, end, dropped = without, v, k
                    for m in range(servers):
                        if state[k, m] == FREE:
                            u = m * groups + g
                            onward = without - weight[k, m] + potential[u]
                            if onward < key[u] and not done[u]:
                                key[u] = onward
                                parent[u] = v
                                moved[u] = k
            if end < 0 or best >= far // 2:
                return wanted
            for u in range(nodes):
                if done[u]:
                    potential[u] += best - key[u]
            if dropped >= 0:
                _remove(
                    dropped, end // groups, dropped // group_size,
                    state, place, held, count, used, copies,
                )
            v = end
            while True:
                k = moved[v]
                u = parent[v]
                if k >= 0:
                    n = v // groups
                    _add(k, n, k // group_size, state, place, held, count, used, copies)
                    if u >= 0:
                        _remove(
                            k, u // groups, k // group_size,
                            state, place, held, count, used, copies,
                        )
                if u < 0:
                    break
                v = u
            work[0] += 1
    return -1
