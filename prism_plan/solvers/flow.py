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

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.jit import inline_kernel, kernel
from prism_plan.kernel_types import int64

FREE, HELD, FORBIDDEN, PINNED = 0, 1, 2, 3
#: Instead of an expert in `FlowState.cheapest`: not searched for yet; there is none.
UNKNOWN, NONE_FOUND = -1, -2
#: Loss where the cheapest expert is not known: lower than any, so that the search stops to find it.
UNKNOWN_LOSS = -(1 << 61)
#: More than any path costs, and the loss where there is no expert to give.
ARTIFICIAL_COST = 1 << 59
#: Length of the path to a node that was not reached.
INFINITE = 1 << 62
#: Instead of a place in the heap.
UNREACHED, SETTLED = -1, -2

Ints = npt.NDArray[Any]


class FlowState(NamedTuple):
    """State of the search over N servers and J experts in groups.

    The problem: ``weight`` int64 [J, N] the value of holding an expert; ``slots`` int64 [N];
    ``group_size`` experts of a group; ``min_replicas``; ``cap`` int64 [N, groups], from which pins
    are taken off.

    The placement: ``state`` int8 [J, N]; ``held`` int32 [N, groups, max held] the experts that a
    server may give away, ``position`` int32 [J, N] of an expert in it, ``num_held`` int64
    [N, groups]; ``used`` int64 [N] slots; ``num_replicas`` int64 [J]; ``potential`` int64
    [N·(groups + 1)].

    A cache: ``cheapest`` int32 and ``loss`` int64 [N, groups, N + 1], the expert that a server
    hands to each other server at the least loss, and in the last column the one that it drops, of
    those with replicas to spare. Entries are filled on first use and updated with every change.

    One search: ``key`` int64 [nodes] length of the shortest path to a node found so far plus the
    node's potential; ``parent`` int64 the node before it, or -1 at the source; ``moved`` int64 the
    expert that the arc from there moves, or -1; ``heap`` int64 [nodes] the open nodes, and
    ``place`` int64 where each node is in it, or `UNREACHED` or `SETTLED`.

    ``counters`` int64 [2]: augmentations and expanded nodes.
    """

    weight: Ints
    slots: Ints
    group_size: int
    min_replicas: int
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
    key: Ints
    parent: Ints
    moved: Ints
    heap: Ints
    place: Ints
    counters: Ints

    @classmethod
    def build(
        cls, weight: Ints, slots: Ints, cap: Ints, state: Ints, group_size: int, min_replicas: int
    ) -> FlowState:
        """The state before the search; ``cap`` and ``state`` become its own."""
        pairs, servers = weight.shape
        groups = cap.shape[1]
        nodes = servers * (groups + 1)
        max_held = int(max(1, min(int(slots.max()), group_size))) + 1
        return cls(
            weight=weight,
            slots=slots,
            group_size=group_size,
            min_replicas=min_replicas,
            cap=cap,
            state=state,
            held=np.empty((servers, groups, max_held), np.int32),
            position=np.empty((pairs, servers), np.int32),
            num_held=np.zeros((servers, groups), np.int64),
            used=np.zeros(servers, np.int64),
            num_replicas=np.zeros(pairs, np.int64),
            potential=np.zeros(nodes, np.int64),
            cheapest=np.full((servers, groups, servers + 1), UNKNOWN, np.int32),
            loss=np.full((servers, groups, servers + 1), UNKNOWN_LOSS, np.int64),
            key=np.empty(nodes, np.int64),
            parent=np.empty(nodes, np.int64),
            moved=np.empty(nodes, np.int64),
            heap=np.empty(nodes, np.int64),
            place=np.empty(nodes, np.int64),
            counters=np.zeros(2, np.int64),
        )


@inline_kernel
def _offer(s: FlowState, k: int, n: int, g: int, to: int, loss: int) -> None:  # pragma: no cover
    """Cache that n can hand expert k to server ``to`` if nothing cheaper is cached."""
    if loss < s.loss[n, g, to]:  # not where the cheapest is unknown
        s.cheapest[n, g, to] = k
        s.loss[n, g, to] = loss


@inline_kernel
def _forget(s: FlowState, k: int, n: int, g: int, to: int) -> None:  # pragma: no cover - compiled
    """Take expert k out of the cache of what n hands to ``to``."""
    if s.cheapest[n, g, to] == k:
        s.cheapest[n, g, to] = UNKNOWN
        s.loss[n, g, to] = UNKNOWN_LOSS


@inline_kernel
def _hold(s: FlowState, k: int, n: int, g: int) -> None:  # pragma: no cover - compiled
    """Give expert k of group g to server n."""
    at = s.num_held[n, g]
    s.held[n, g, at] = k
    s.position[k, n] = at
    s.num_held[n, g] = at + 1
    s.state[k, n] = HELD
    s.used[n] += 1
    s.num_replicas[k] += 1


@inline_kernel
def _add(s: FlowState, k: int, n: int) -> None:  # pragma: no cover - compiled
    """Give expert k to server n, and update the cache."""
    g = k // s.group_size
    servers = len(s.slots)  # also the column of drops
    _hold(s, k, n, g)
    spare = s.num_replicas[k] - s.min_replicas
    for m in range(servers):
        if s.state[k, m] == FREE:
            _offer(s, k, n, g, m, s.weight[k, n] - s.weight[k, m])
            continue
        _forget(s, k, m, g, n)
        if s.state[k, m] == HELD and (spare == 1 or (spare > 1 and m == n)):
            _offer(s, k, m, g, servers, s.weight[k, m])


@inline_kernel
def _remove(s: FlowState, k: int, n: int) -> None:  # pragma: no cover - compiled
    """Take expert k from server n, and update the cache."""
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
        _forget(s, k, n, g, m)
        if s.state[k, m] == HELD:
            _offer(s, k, m, g, n, s.weight[k, m] - s.weight[k, n])
        if none_to_spare or m == n:
            _forget(s, k, m, g, servers)


@inline_kernel
def _find_cheapest(s: FlowState, n: int, g: int, to: int) -> None:  # pragma: no cover - compiled
    """Cache the expert of group g that n hands to ``to``, or drops, at the least loss."""
    drop = to == len(s.slots)
    found = int64(NONE_FOUND)
    least = int64(ARTIFICIAL_COST)
    for i in range(s.num_held[n, g]):
        k = int64(s.held[n, g, i])
        if drop:
            if s.num_replicas[k] <= s.min_replicas:
                continue
            loss = s.weight[k, n]
        else:
            if s.state[k, to] != FREE:
                continue
            loss = s.weight[k, n] - s.weight[k, to]
        if loss < least:
            found = k
            least = loss
    s.cheapest[n, g, to] = found
    s.loss[n, g, to] = least


@inline_kernel
def _comes_before(key: Ints, u: int, v: int) -> bool:  # pragma: no cover - compiled
    """Whether node u is expanded before v: by key, then by number."""
    return bool(key[u] < key[v] or (key[u] == key[v] and u < v))


@inline_kernel
def _rise(heap: Ints, place: Ints, key: Ints, v: int, at: int) -> None:  # pragma: no cover
    """Put node v at ``at`` of the heap, or above, after its key was lowered."""
    while at > 0:
        above = (at - 1) >> 2
        u = heap[above]
        if not _comes_before(key, v, u):
            break
        heap[at] = u
        place[u] = at
        at = above
    heap[at] = v
    place[v] = at


@inline_kernel
def _pop(heap: Ints, place: Ints, key: Ints, size: int) -> int:  # pragma: no cover - compiled
    """Take the first of ``size`` nodes from the heap, each of which has four children."""
    first: int = heap[0]
    size -= 1
    v = heap[size]
    at = 0
    while True:
        child = 4 * at + 1
        if child >= size:
            break
        least = heap[child]
        for other in range(child + 1, child + 4):
            if other < size and _comes_before(key, heap[other], least):
                child = other
                least = heap[other]
        if not _comes_before(key, least, v):
            break
        heap[at] = least
        place[least] = at
        at = child
    heap[at] = v
    place[v] = at
    return first


@inline_kernel
def _reach(
    s: FlowState, size: int, v: int, key: int, parent: int, moved: int
) -> int:  # pragma: no cover - compiled
    """Note a shorter path to node v that ends with ``parent``; returns the size of the heap."""
    at = s.place[v]
    if at == SETTLED:  # never: potentials make sure that nodes are expanded in order of length
        return size
    s.key[v] = key
    s.parent[v] = parent
    s.moved[v] = moved
    if at == UNREACHED:
        at = size
        size += 1
    _rise(s.heap, s.place, s.key, v, at)
    return size


@kernel
def initialise(s: FlowState, by_weight: Ints) -> None:  # pragma: no cover - compiled
    """Give each server its pins and then its best experts; set the potentials to match.

    ``by_weight`` int32 [N, any] lists experts of each server by falling weight, of equal ones the
    lowest first: all that it could take.
    """
    pairs, servers = s.weight.shape
    groups = s.cap.shape[1]
    for n in range(servers):
        for g in range(groups):
            s.cheapest[n, g, n] = NONE_FOUND
            s.loss[n, g, n] = ARTIFICIAL_COST
    for k in range(pairs):
        for n in range(servers):
            if s.state[k, n] == PINNED:
                s.used[n] += 1
                s.cap[n, k // s.group_size] -= 1
                s.num_replicas[k] += 1
    for n in range(servers):
        price = ARTIFICIAL_COST if s.used[n] >= s.slots[n] else 0
        for g in range(groups):  # the least weight that the server holds of each group
            s.key[n * groups + g] = ARTIFICIAL_COST
        for i in range(by_weight.shape[1]):
            k = int64(by_weight[n, i])
            if s.used[n] >= s.slots[n] or s.weight[k, n] <= 0:
                break
            g = k // s.group_size
            if s.state[k, n] != FREE or s.num_held[n, g] >= s.cap[n, g]:
                continue
            _hold(s, k, n, g)  # nothing is in the cache yet
            s.key[n * groups + g] = s.weight[k, n]
            if s.used[n] >= s.slots[n]:
                price = s.weight[k, n]
        s.potential[servers * groups + n] = price
        for g in range(groups):
            full = s.num_held[n, g] >= s.cap[n, g]
            lowest = s.key[n * groups + g]
            s.potential[n * groups + g] = lowest if full and lowest > price else price


@kernel
def augment(s: FlowState) -> int:  # pragma: no cover - compiled
    """Augment until all experts have their replicas; -1, or the first that cannot have them."""
    pairs, servers = s.weight.shape
    groups = s.cap.shape[1]
    hub = servers * groups
    nodes = hub + servers
    key, potential, place, loss = s.key, s.potential, s.place, s.loss
    for target in range(pairs):
        while s.num_replicas[target] < s.min_replicas:
            for v in range(nodes):
                key[v] = INFINITE
                place[v] = UNREACHED
            size = int64(0)  # of the heap
            for n in range(servers):
                if s.state[target, n] == FREE:
                    v = n * groups + target // s.group_size
                    reduced = potential[v] - s.weight[target, n]
                    size = _reach(s, size, v, reduced, int64(-1), target)
            best = INFINITE  # length of the shortest complete path so far
            end = -1
            dropped = -1
            while size > 0 and key[s.heap[0]] < best:
                v = _pop(s.heap, place, key, size)
                size -= 1
                place[v] = SETTLED
                s.counters[1] += 1
                length = key[v] - potential[v]
                # artificial arc to the end: infeasible unless no real path exists
                if length + ARTIFICIAL_COST < best:
                    best, end, dropped = length + ARTIFICIAL_COST, v, -1
                if v >= hub:
                    n = v - hub
                    if s.used[n] < s.slots[n]:
                        if length < best:
                            best, end, dropped = length, v, -1
                        continue
                    for g in range(groups):
                        u = n * groups + g
                        onward = length + potential[u]
                        if s.num_held[n, g] > 0 and onward < key[u]:
                            size = _reach(s, size, u, onward, v, int64(-1))
                    continue
                n, g = v // groups, v % groups
                u = hub + n
                onward = length + potential[u]
                if s.num_held[n, g] < s.cap[n, g] and onward < key[u]:
                    size = _reach(s, size, u, onward, v, int64(-1))
                if s.cheapest[n, g, servers] == UNKNOWN:
                    _find_cheapest(s, n, g, servers)
                if s.cheapest[n, g, servers] >= 0 and length + loss[n, g, servers] < best:
                    best = length + loss[n, g, servers]
                    end = v
                    dropped = int64(s.cheapest[n, g, servers])
                for m in range(servers):
                    u = m * groups + g
                    onward = length + loss[n, g, m] + potential[u]
                    if onward >= key[u] or onward >= best or place[u] == SETTLED:
                        continue  # it is on no shortest path
                    if s.cheapest[n, g, m] == UNKNOWN:
                        _find_cheapest(s, n, g, m)
                        onward = length + loss[n, g, m] + potential[u]
                        if onward >= key[u] or onward >= best:
                            continue
                    size = _reach(s, size, u, onward, v, int64(s.cheapest[n, g, m]))
            if end < 0 or best >= ARTIFICIAL_COST // 2:
                return target
            for u in range(nodes):
                if place[u] == SETTLED:
                    potential[u] += best - key[u]
            if dropped >= 0:
                _remove(s, dropped, end // groups)
            v = end
            while True:
                k = s.moved[v]
                u = s.parent[v]
                if k >= 0:  # v may be a hub, but arcs to hubs move no expert
                    _add(s, k, v // groups)
                    if u >= 0:
                        _remove(s, k, u // groups)
                if u < 0:
                    break
                v = u
            s.counters[0] += 1
    return -1
