"""Minimum-cost flow of the placement problem by shortest augmenting paths over servers.

Without coverage each server's best experts are optimal, so the search starts there. Then, for each
copy that coverage still lacks, one shortest path decides which server takes it: a server frees a
slot by handing an expert to another server that lacks it, and so on, until one drops an expert that
has replicas to spare or has a free slot. Potentials (distances to the end of a path) direct the
search as in A*, and are the dual prices of the certificate. Costs are integers, so nothing depends
on rounding.

Nodes are (server, group) pairs, numbered ``n * groups + g``, and one hub for each server: a group
is a layer where layer caps are given, else all experts. A unit of flow at node (n, g) is one expert
of group g too many on server n; at hub n one expert too many on n, of any group.
"""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.jit import jit

FREE, HELD, FORBIDDEN, PINNED = 0, 1, 2, 3
#: Instead of an expert in `FlowState.cheapest`: not searched for yet; there is none.
UNKNOWN, NONE_FOUND = -1, -2

Ints = npt.NDArray[Any]


class FlowState(NamedTuple):
    """State of the search over N servers and J experts in groups.

    The problem: ``weight`` int64 [J, N] the value of holding an expert; ``slots`` int64 [N];
    ``group_size`` experts of a group; ``min_replicas``; ``artificial_cost`` more than any path
    costs; ``by_weight`` int32 [N, J] experts by falling weight; ``cap`` int64 [N, groups], from
    which pins are taken off.

    The placement: ``state`` int8 [J, N]; ``held`` int32 [N, groups, max held] the experts that a
    server may give away, ``position`` int32 [J, N] of an expert in it, ``num_held`` int64
    [N, groups]; ``used`` int64 [N] slots; ``num_replicas`` int64 [J]; ``potential`` int64
    [N·(groups + 1)].

    A cache: ``cheapest`` int32 and ``loss`` int64 [N, groups, N + 1], the expert that a server
    hands to each other server at the least loss, and in the last column the one that it drops, of
    those with replicas to spare. Entries are filled on first use and updated with every change.

    ``counters`` int64 [2]: augmentations and expanded nodes.
    """

    weight: Ints
    slots: Ints
    group_size: int
    min_replicas: int
    artificial_cost: int
    by_weight: Ints
    cap: Ints
    state: Ints
    held: Ints
    position: Ints
    num_held: Ints
    used: Ints
    num_replicas: Ints
    potential: Ints
    cheapest: Ints
    loss: Ints
    counters: Ints


@jit
def _offer(s: FlowState, k: int, n: int, g: int, to: int, loss: int) -> None:  # pragma: no cover
    """Cache that n can hand expert k to server ``to`` if nothing cheaper is cached."""
    known = s.cheapest[n, g, to]
    if known == NONE_FOUND or (known >= 0 and loss < s.loss[n, g, to]):
        s.cheapest[n, g, to] = k
        s.loss[n, g, to] = loss


@jit
def _add(s: FlowState, k: int, n: int) -> None:  # pragma: no cover - compiled
    g = k // s.group_size
    servers = len(s.slots)  # also the column of drops
    s.state[k, n] = HELD
    s.position[k, n] = s.num_held[n, g]
    s.held[n, g, s.num_held[n, g]] = k
    s.num_held[n, g] += 1
    s.used[n] += 1
    s.num_replicas[k] += 1
    spare = s.num_replicas[k] - s.min_replicas
    for m in range(servers):
        if s.state[k, m] == FREE:
            _offer(s, k, n, g, m, s.weight[k, n] - s.weight[k, m])
            continue
        if s.cheapest[m, g, n] == k:
            s.cheapest[m, g, n] = UNKNOWN
        if s.state[k, m] == HELD and (spare == 1 or (spare > 1 and m == n)):
            _offer(s, k, m, g, servers, s.weight[k, m])


@jit
def _remove(s: FlowState, k: int, n: int) -> None:  # pragma: no cover - compiled
    g = k // s.group_size
    servers = len(s.slots)
    s.state[k, n] = FREE
    s.num_held[n, g] -= 1
    last = s.held[n, g, s.num_held[n, g]]
    s.held[n, g, s.position[k, n]] = last
    s.position[last, n] = s.position[k, n]
    s.used[n] -= 1
    s.num_replicas[k] -= 1
    none_to_spare = s.num_replicas[k] == s.min_replicas
    for m in range(servers):
        if s.cheapest[n, g, m] == k:
            s.cheapest[n, g, m] = UNKNOWN
        if s.state[k, m] == HELD:
            _offer(s, k, m, g, n, s.weight[k, m] - s.weight[k, n])
        if (none_to_spare or m == n) and s.cheapest[m, g, servers] == k:
            s.cheapest[m, g, servers] = UNKNOWN


@jit
def _find_cheapest(s: FlowState, n: int, g: int, to: int) -> None:  # pragma: no cover - compiled
    """Cache the expert of group g that n hands to ``to``, or drops, at the least loss."""
    weight, state, held, num_replicas = s.weight, s.state, s.held, s.num_replicas
    drop = to == len(s.slots)
    found = NONE_FOUND
    least = s.artificial_cost
    for i in range(s.num_held[n, g]):
        k = held[n, g, i]
        if drop:
            if num_replicas[k] <= s.min_replicas:
                continue
            loss = weight[k, n]
        else:
            if state[k, to] != FREE:
                continue
            loss = weight[k, n] - weight[k, to]
        if loss < least:
            found = k
            least = loss
    s.cheapest[n, g, to] = found
    s.loss[n, g, to] = least


@jit
def initialise(s: FlowState) -> None:  # pragma: no cover - compiled
    """Give each server its pins and then its best experts; set the potentials to match."""
    pairs, servers = s.weight.shape
    groups = s.cap.shape[1]
    for n in range(servers):
        for k in range(pairs):
            if s.state[k, n] == PINNED:
                s.used[n] += 1
                s.cap[n, k // s.group_size] -= 1
                s.num_replicas[k] += 1
    for n in range(servers):
        lowest = np.full(groups, s.artificial_cost, np.int64)
        price = s.artificial_cost if s.used[n] >= s.slots[n] else 0
        for i in range(pairs):
            k = s.by_weight[n, i]
            if s.used[n] >= s.slots[n] or s.weight[k, n] <= 0:
                break
            g = k // s.group_size
            if s.state[k, n] != FREE or s.num_held[n, g] >= s.cap[n, g]:
                continue
            _add(s, k, n)
            lowest[g] = s.weight[k, n]
            if s.used[n] >= s.slots[n]:
                price = s.weight[k, n]
        s.potential[servers * groups + n] = price
        for g in range(groups):
            full = s.num_held[n, g] >= s.cap[n, g]
            s.potential[n * groups + g] = max(price, lowest[g]) if full else price


@jit
def augment(s: FlowState) -> int:  # pragma: no cover - compiled
    """Augment until every expert has its replicas; -1, or the first expert that cannot have them.

    Fields of the tuple are bound to local names: looked up inside the loops, arrays cost three
    times as much.
    """
    weight, slots, cap, num_held = s.weight, s.slots, s.cap, s.num_held
    state, used, num_replicas, potential = s.state, s.used, s.num_replicas, s.potential
    cheapest, loss, group_size, min_replicas = s.cheapest, s.loss, s.group_size, s.min_replicas
    artificial_cost = s.artificial_cost
    pairs, servers = weight.shape
    groups = cap.shape[1]
    hub = servers * groups
    nodes = hub + servers
    infinite = np.int64(1) << 62
    key = np.empty(nodes, np.int64)  # length from the source plus potential
    settled = np.empty(nodes, np.bool_)
    parent = np.empty(nodes, np.int64)  # previous node, or -1 at the source
    moved = np.empty(nodes, np.int64)  # expert that the arc from the previous node moves, or -1
    for target in range(pairs):
        while num_replicas[target] < min_replicas:
            key[:] = infinite
            settled[:] = False
            queue = [(infinite, np.int64(-1))]
            for n in range(servers):
                if state[target, n] == FREE:
                    v = n * groups + target // group_size
                    key[v] = potential[v] - weight[target, n]
                    parent[v] = -1
                    moved[v] = target
                    heapq.heappush(queue, (key[v], np.int64(v)))
            best: Any = infinite  # length of the shortest complete path so far
            end: Any = -1
            dropped: Any = np.int64(-1)
            while True:
                least, v = heapq.heappop(queue)
                if least >= best:
                    break
                if settled[v]:
                    continue
                settled[v] = True
                s.counters[1] += 1
                length = key[v] - potential[v]
                # artificial arc to the end: infeasible unless no real path exists
                if length + artificial_cost < best:
                    best, end, dropped = length + artificial_cost, v, np.int64(-1)
                if v >= hub:
                    n = v - hub
                    if used[n] < slots[n]:
                        if length < best:
                            best, end, dropped = length, v, np.int64(-1)
                        continue
                    for g in range(groups):
                        u = n * groups + g
                        onward = length + potential[u]
                        if num_held[n, g] > 0 and onward < key[u]:
                            key[u] = onward
                            parent[u] = v
                            moved[u] = -1
                            heapq.heappush(queue, (onward, np.int64(u)))
                    continue
                n, g = v // groups, v % groups
                u = hub + n
                onward = length + potential[u]
                if num_held[n, g] < cap[n, g] and onward < key[u]:
                    key[u] = onward
                    parent[u] = v
                    moved[u] = -1
                    heapq.heappush(queue, (onward, np.int64(u)))
                if cheapest[n, g, servers] == UNKNOWN:
                    _find_cheapest(s, n, g, servers)
                if cheapest[n, g, servers] >= 0 and length + loss[n, g, servers] < best:
                    best = length + loss[n, g, servers]
                    end = v
                    dropped = np.int64(cheapest[n, g, servers])
                for m in range(servers):
                    u = m * groups + g
                    if m == n or settled[u]:
                        continue
                    if cheapest[n, g, m] == UNKNOWN:
                        _find_cheapest(s, n, g, m)
                    if cheapest[n, g, m] == NONE_FOUND:
                        continue
                    onward = length + loss[n, g, m] + potential[u]
                    if onward < key[u] and onward < best:  # else it is on no shortest path
                        key[u] = onward
                        parent[u] = v
                        moved[u] = cheapest[n, g, m]
                        heapq.heappush(queue, (onward, np.int64(u)))
            if end < 0 or best >= artificial_cost // 2:
                return target
            for u in range(nodes):
                if settled[u]:
                    potential[u] += best - key[u]
            if dropped >= 0:
                _remove(s, dropped, end // groups)
            v = end
            while True:
                k = moved[v]
                u = parent[v]
                if k >= 0:  # v may be a hub, but arcs to hubs move no expert
                    _add(s, k, v // groups)
                    if u >= 0:
                        _remove(s, k, u // groups)
                if u < 0:
                    break
                v = u
            s.counters[0] += 1
    return -1
