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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.jit import jit

FREE, HELD, FORBIDDEN, PINNED = 0, 1, 2, 3
#: Instead of an expert in `Tables.cheapest`: to be searched for; there is none.
UNKNOWN, NOTHING = -1, -2

Ints = npt.NDArray[Any]


class Tables(NamedTuple):
    """The search's state, over N servers, J experts and their groups; all but the first five vary.

    ``weight`` int64 [J, N] what holding an expert is worth; ``slots`` int64 [N]; ``sizes`` int64
    [2]: experts of a group, copies wanted of each; ``far`` int64: more than any path costs;
    ``order`` int32 [N, J] experts by falling weight. ``cap`` int64 [N, groups], from which pins
    are taken off. ``state`` int8 [J, N]; ``held`` int32 [N, groups, most] the experts that may
    leave, ``place`` int32 [J, N] where in it; ``number`` int64 [N, groups] how many; ``used`` int64
    [N] slots; ``copies`` int64 [J]; ``potential`` int64 [N·(groups + 1)].

    ``cheapest`` int32 and ``cost`` int64 [N, groups, N + 1] remember the expert that a server
    hands to each other server at the least loss, and in the last column the one that it drops: of
    those that have copies to spare. They are searched for when first wanted and kept up to date by
    every move. ``work`` int64 [2] counts augmentations and expanded nodes.
    """

    weight: Ints
    slots: Ints
    sizes: Ints
    far: int
    order: Ints
    cap: Ints
    state: Ints
    held: Ints
    place: Ints
    number: Ints
    used: Ints
    copies: Ints
    potential: Ints
    cheapest: Ints
    cost: Ints
    work: Ints


@jit
def _offer(t: Tables, k: int, n: int, g: int, to: int, loss: int) -> None:  # pragma: no cover
    """Expert k can now go from n to server ``to``: keep it if it is the cheapest that can."""
    known = t.cheapest[n, g, to]
    if known == NOTHING or (known >= 0 and loss < t.cost[n, g, to]):
        t.cheapest[n, g, to] = k
        t.cost[n, g, to] = loss


@jit
def _add(t: Tables, k: int, n: int) -> None:  # pragma: no cover - compiled
    g = k // t.sizes[0]
    away = len(t.slots)
    t.state[k, n] = HELD
    t.place[k, n] = t.number[n, g]
    t.held[n, g, t.number[n, g]] = k
    t.number[n, g] += 1
    t.used[n] += 1
    t.copies[k] += 1
    spare = t.copies[k] - t.sizes[1]
    for m in range(away):
        if t.state[k, m] == FREE:
            _offer(t, k, n, g, m, t.weight[k, n] - t.weight[k, m])
            continue
        if t.cheapest[m, g, n] == k:
            t.cheapest[m, g, n] = UNKNOWN
        if t.state[k, m] == HELD and (spare == 1 or (spare > 1 and m == n)):
            _offer(t, k, m, g, away, t.weight[k, m])


@jit
def _remove(t: Tables, k: int, n: int) -> None:  # pragma: no cover - compiled
    g = k // t.sizes[0]
    away = len(t.slots)
    t.state[k, n] = FREE
    t.number[n, g] -= 1
    last = t.held[n, g, t.number[n, g]]
    t.held[n, g, t.place[k, n]] = last
    t.place[last, n] = t.place[k, n]
    t.used[n] -= 1
    t.copies[k] -= 1
    none_to_spare = t.copies[k] == t.sizes[1]
    for m in range(away):
        if t.cheapest[n, g, m] == k:
            t.cheapest[n, g, m] = UNKNOWN
        if t.state[k, m] == HELD:
            _offer(t, k, m, g, n, t.weight[k, m] - t.weight[k, n])
        if (none_to_spare or m == n) and t.cheapest[m, g, away] == k:
            t.cheapest[m, g, away] = UNKNOWN


@jit
def _search(t: Tables, n: int, g: int, to: int) -> None:  # pragma: no cover - compiled
    """Find the expert of group g that n hands to ``to``, or drops, at the least loss."""
    weight, state, held, copies, min_replicas = t.weight, t.state, t.held, t.copies, t.sizes[1]
    away = len(t.slots)
    found = NOTHING
    least = t.far
    for i in range(t.number[n, g]):
        k = held[n, g, i]
        if to == away:
            if copies[k] <= min_replicas:
                continue
            loss = weight[k, n]
        else:
            if state[k, to] != FREE:
                continue
            loss = weight[k, n] - weight[k, to]
        if loss < least:
            found = k
            least = loss
    t.cheapest[n, g, to] = found
    t.cost[n, g, to] = least


@jit
def start(t: Tables) -> None:  # pragma: no cover - compiled
    """Give each server its pins and then its best experts; set the potentials to match."""
    pairs, servers = t.weight.shape
    groups = t.cap.shape[1]
    for n in range(servers):
        for k in range(pairs):
            if t.state[k, n] == PINNED:
                t.used[n] += 1
                t.cap[n, k // t.sizes[0]] -= 1
                t.copies[k] += 1
    for n in range(servers):
        lowest = np.full(groups, t.far, np.int64)
        price = t.far if t.used[n] >= t.slots[n] else 0
        for i in range(pairs):
            k = t.order[n, i]
            if t.used[n] >= t.slots[n] or t.weight[k, n] <= 0:
                break
            g = k // t.sizes[0]
            if t.state[k, n] != FREE or t.number[n, g] >= t.cap[n, g]:
                continue
            _add(t, k, n)
            lowest[g] = t.weight[k, n]
            if t.used[n] >= t.slots[n]:
                price = t.weight[k, n]
        t.potential[servers * groups + n] = price
        for g in range(groups):
            full = t.number[n, g] >= t.cap[n, g]
            t.potential[n * groups + g] = max(price, lowest[g]) if full else price


@jit
def cover(t: Tables) -> int:  # pragma: no cover - compiled
    """Augment until every expert has the copies wanted; -1, or an expert that cannot have them."""
    # by local names: looked up in the tuple inside the loops, arrays cost three times as much
    weight, slots, cap, number = t.weight, t.slots, t.cap, t.number
    state, used, copies, potential = t.state, t.used, t.copies, t.potential
    cheapest, cost, far, group_size, min_replicas = (
        t.cheapest,
        t.cost,
        t.far,
        t.sizes[0],
        t.sizes[1],
    )
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
            for n in range(servers):
                if state[wanted, n] == FREE:
                    v = n * groups + wanted // group_size
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
                t.work[1] += 1
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
                        onward = length + potential[u]
                        if number[n, g] > 0 and onward < key[u]:
                            key[u] = onward
                            parent[u] = v
                            moved[u] = -1
                            heapq.heappush(queue, (onward, np.int64(u)))
                    continue
                n, g = v // groups, v % groups
                u = hub + n
                onward = length + potential[u]
                if number[n, g] < cap[n, g] and onward < key[u]:
                    key[u] = onward
                    parent[u] = v
                    moved[u] = -1
                    heapq.heappush(queue, (onward, np.int64(u)))
                if cheapest[n, g, servers] == UNKNOWN:
                    _search(t, n, g, servers)
                if cheapest[n, g, servers] >= 0 and length + cost[n, g, servers] < best:
                    best = length + cost[n, g, servers]
                    end = v
                    dropped = np.int64(cheapest[n, g, servers])
                for m in range(servers):
                    u = m * groups + g
                    if m == n or done[u]:
                        continue
                    if cheapest[n, g, m] == UNKNOWN:
                        _search(t, n, g, m)
                    if cheapest[n, g, m] == NOTHING:
                        continue
                    onward = length + cost[n, g, m] + potential[u]
                    if onward < key[u] and onward < best:  # else it is on no shortest path
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
                _remove(t, dropped, end // groups)
            v = end
            while True:
                k = moved[v]
                u = parent[v]
                if k >= 0:  # v may be a hub, but no expert is handed over on the way to one
                    _add(t, k, v // groups)
                    if u >= 0:
                        _remove(t, k, u // groups)
                if u < 0:
                    break
                v = u
            t.work[0] += 1
    return -1
