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

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.jit import jit

FREE, HELD, FORBIDDEN, PINNED = 0, 1, 2, 3
#: Instead of an expert in the table of cheapest hand-overs: to be searched for; none can go.
UNKNOWN, NOTHING = -1, -2

Ints = npt.NDArray[Any]


@jit
def _add(
    k: int,
    n: int,
    g: int,
    weight: Ints,
    state: Ints,
    place: Ints,
    held: Ints,
    count: Ints,
    used: Ints,
    copies: Ints,
    cheapest: Ints,
    cost: Ints,
) -> None:  # pragma: no cover - compiled
    state[k, n] = HELD
    place[k, n] = count[n, g]
    held[n, g, count[n, g]] = k
    count[n, g] += 1
    used[n] += 1
    copies[k] += 1
    for m in range(state.shape[1]):
        if state[k, m] == FREE:
            _offer(k, n, g, m, weight, cheapest, cost)
        elif cheapest[m, g, n] == k:
            cheapest[m, g, n] = UNKNOWN


@jit
def _remove(
    k: int,
    n: int,
    g: int,
    weight: Ints,
    state: Ints,
    place: Ints,
    held: Ints,
    count: Ints,
    used: Ints,
    copies: Ints,
    cheapest: Ints,
    cost: Ints,
) -> None:  # pragma: no cover - compiled
    state[k, n] = FREE
    count[n, g] -= 1
    last = held[n, g, count[n, g]]
    held[n, g, place[k, n]] = last
    place[last, n] = place[k, n]
    used[n] -= 1
    copies[k] -= 1
    for m in range(state.shape[1]):
        if cheapest[n, g, m] == k:
            cheapest[n, g, m] = UNKNOWN
        if state[k, m] == HELD:
            _offer(k, m, g, n, weight, cheapest, cost)


@jit
def _offer(
    k: int, n: int, g: int, m: int, weight: Ints, cheapest: Ints, cost: Ints
) -> None:  # pragma: no cover - compiled
    """Expert k can now go from n to m: keep it if it is the cheapest that can."""
    if cheapest[n, g, m] != UNKNOWN:
        loss = weight[k, n] - weight[k, m]
        if cheapest[n, g, m] == NOTHING or loss < cost[n, g, m]:
            cheapest[n, g, m] = k
            cost[n, g, m] = loss


@jit
def _search(
    n: int,
    g: int,
    m: int,
    weight: Ints,
    state: Ints,
    held: Ints,
    count: Ints,
    cheapest: Ints,
    cost: Ints,
) -> None:  # pragma: no cover - compiled
    """The expert of group g that n hands to m at the least loss."""
    cheapest[n, g, m] = NOTHING
    for i in range(count[n, g]):
        k = held[n, g, i]
        if state[k, m] == FREE:
            _offer(k, n, g, m, weight, cheapest, cost)


@jit
def start(
    weight: Ints,
    order: Ints,
    state: Ints,
    slots: Ints,
    cap: Ints,
    group_size: int,
    far: int,
    place: Ints,
    held: Ints,
    count: Ints,
    used: Ints,
    copies: Ints,
    potential: Ints,
    cheapest: Ints,
    cost: Ints,
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
            _add(k, n, g, weight, state, place, held, count, used, copies, cheapest, cost)
            lowest[g] = weight[k, n]
            if used[n] >= slots[n]:
                price = weight[k, n]
        potential[servers * groups + n] = price
        for g in range(groups):
            full = count[n, g] >= cap[n, g]
            potential[n * groups + g] = max(price, lowest[g]) if full else price


@jit
def cover(
    weight: Ints,
    state: Ints,
    slots: Ints,
    cap: Ints,
    group_size: int,
    min_replicas: int,
    far: int,
    place: Ints,
    held: Ints,
    count: Ints,
    used: Ints,
    copies: Ints,
    potential: Ints,
    cheapest: Ints,
    cost: Ints,
    work: Ints,
) -> int:  # pragma: no cover - compiled
    """Augment until every expert has ``min_replicas`` copies; -1, or an expert that cannot.

    ``cheapest`` int32 and ``cost`` int64 [N, groups, N] remember, from server to server, the
    expert that is handed over at the least loss; they are searched for when first wanted and kept
    up to date by every move. ``work`` int64 [2] counts augmentations and expanded nodes.
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
            queue = [(infinite, np.int64(-1))]
            own = wanted // group_size
            for n in range(servers):
                if state[wanted, n] == FREE:
                    v = n * groups + own
                    key[v] = potential[v] - weight[wanted, n]
                    parent[v] = -1
                    moved[v] = wanted
                    heapq.heappush(queue, (key[v], np.int64(v)))
            best: Any = infinite  # length of the shortest complete path so far
            end: Any = -1
            dropped: Any = np.int64(-1)
            while True:
                least, v = heapq.heappop(queue)
                if least >= best:
                    break
                if done[v]:
                    continue
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
                            heapq.heappush(queue, (key[u], np.int64(u)))
                    continue
                n, g = v // groups, v % groups
                u = hub + n
                if count[n, g] < cap[n, g] and not done[u] and length + potential[u] < key[u]:
                    key[u] = length + potential[u]
                    parent[u] = v
                    moved[u] = -1
                    heapq.heappush(queue, (key[u], np.int64(u)))
                for i in range(count[n, g]):
                    k = held[n, g, i]
                    if copies[k] > min_replicas and length + weight[k, n] < best:
                        best, end, dropped = length + weight[k, n], v, k
                for m in range(servers):
                    u = m * groups + g
                    if m == n or done[u]:
                        continue
                    if cheapest[n, g, m] == UNKNOWN:
                        _search(n, g, m, weight, state, held, count, cheapest, cost)
                    if cheapest[n, g, m] >= 0:
                        onward = length + cost[n, g, m] + potential[u]
                        if onward < key[u]:
                            key[u] = onward
                            parent[u] = v
                            moved[u] = cheapest[n, g, m]
                            heapq.heappush(queue, (onward, np.int64(u)))
            if end < 0 or best >= far // 2:
                return wanted
            for u in range(nodes):
                if done[u]:
                    potential[u] += best - key[u]
            if dropped >= 0:
                _remove(
                    dropped,
                    end // groups,
                    dropped // group_size,
                    weight,
                    state,
                    place,
                    held,
                    count,
                    used,
                    copies,
                    cheapest,
                    cost,
                )
            v = end
            while True:
                k = moved[v]
                u = parent[v]
                if k >= 0:
                    n = v // groups
                    _add(
                        k,
                        n,
                        k // group_size,
                        weight,
                        state,
                        place,
                        held,
                        count,
                        used,
                        copies,
                        cheapest,
                        cost,
                    )
                    if u >= 0:
                        _remove(
                            k,
                            u // groups,
                            k // group_size,
                            weight,
                            state,
                            place,
                            held,
                            count,
                            used,
                            copies,
                            cheapest,
                            cost,
                        )
                if u < 0:
                    break
                v = u
            work[0] += 1
    return -1
