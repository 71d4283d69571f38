"""Where calls go, compiled: the hash of `spread` and the search of `cover`."""

from __future__ import annotations

from typing import Any

import numpy as np

from prism_plan.jit import jit

Array = Any

#: Positions in `routes.ROUTES`; the third is `spread`.
COVER, NEAREST = 0, 1


@jit
def mix(request: Any, pair: Any) -> Any:  # pragma: no cover - compiled
    """See :func:`prism_plan.simulate.routing_policies.mix`."""
    x = np.uint64(request) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(pair) + np.uint64(1)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def cover(  # pragma: no cover - compiled
    few: Array, missing: int, holder: Array, copies: Array, sent: Array, mask: Array,
    goals: Array, best: Array,
) -> None:  # fmt: skip
    """Servers ``few[1, :missing]`` for the pairs ``few[0, :missing]``, as `routes.cover` does.

    Of servers that hold the same of the missing experts only the best counts. The least cost of
    covering each subset of the experts follows from smaller subsets: some server must hold its
    first expert. Cost: servers, then tokens sent, in one number.
    """
    if missing == 1:
        pair = few[0, 0]
        chosen = holder[pair, 0]
        for i in range(1, copies[pair]):
            if sent[holder[pair, i]] < sent[chosen]:
                chosen = holder[pair, i]
        few[1, 0] = chosen
        return
    candidates = 0
    for k in range(missing):
        pair = few[0, k]
        for i in range(copies[pair]):
            m = holder[pair, i]
            if mask[m] == 0:
                goals[candidates] = m
                candidates += 1
            mask[m] |= 1 << k
    full = (1 << missing) - 1
    server, cost, kinds = best[0], best[1], best[2]
    for u in range(full + 1):
        server[u] = -1
    number = 0
    for i in range(candidates):
        m = goals[i]
        own = mask[m]
        mask[m] = 0
        known = server[own]
        if known < 0:
            kinds[number] = own
            number += 1
        if known < 0 or sent[m] < sent[known] or (sent[m] == sent[known] and m < known):
            server[own] = m
    cost[0] = 0
    one = np.int64(1) << 48
    for u in range(1, full + 1):
        low = u & -u
        least = np.int64(1) << 62
        for i in range(number):
            own = kinds[i]
            if own & low:
                total = one + sent[server[own]] + cost[u & ~own]
                if total < least:
                    least = total
        cost[u] = least
    u = full
    while u:
        low = u & -u
        chosen = -1
        taken = 0
        for i in range(number):
            own = kinds[i]
            on_best = own & low and one + sent[server[own]] + cost[u & ~own] == cost[u]
            if on_best and (chosen < 0 or server[own] < chosen):
                chosen = server[own]
                taken = own
        for k in range(missing):
            if u & taken & (1 << k):
                few[1, k] = chosen
        u &= ~taken
