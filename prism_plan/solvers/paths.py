"""The best execution table for a placement: a shortest path over servers, home by home.

Optimal in the idle time of a request (:mod:`prism_plan.solvers.idle_time`): each layer costs what
it takes where it executes, and each change of server the messages that it needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.jit import kernel
from prism_plan.solvers.idle_time import IdleTime

Array = Any


def shortest_paths(
    idle: IdleTime, at_home: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int32]:
    """The table int32 [N, L] of least idle time, home by home; ties keep a layer where it is.

    Servers of ``at_home`` [N], and those without users, execute all layers themselves.
    """
    servers, layers, _ = idle.layer_s.shape
    table = np.repeat(np.arange(servers, dtype=np.int32)[:, None], layers, axis=1)
    before = np.zeros((layers, servers), np.int32)
    cost = np.zeros((2, servers))
    for home in range(servers):
        if idle.has_users[home] and not (at_home is not None and at_home[home]):
            _shortest_path(
                np.ascontiguousarray(idle.layer_s[home]), idle.hop_s[home], idle.start_s[home],
                idle.id_s[home], home, before, cost, table[home],
            )  # fmt: skip
    return table


@kernel
def _shortest_path(  # pragma: no cover - compiled
    layer_s: Array, hop_s: Array, start_s: Array, id_s: Array, home: int, before: Array,
    cost: Array, row: Array,
) -> None:  # fmt: skip
    """Write the path of least cost to ``row`` [L], whose first entry is the home server.

    The first span's server is tried one by one, for the ids of tokens travel back to it. ``before``
    int32 [L, N] and ``cost`` [2, N] are working memory.
    """
    layers, servers = layer_s.shape
    least = 0.0  # of all layers, wherever they execute
    for layer in range(1, layers):
        fastest = layer_s[layer, 0]
        for m in range(servers):
            fastest = min(fastest, layer_s[layer, m])
        least += fastest
    best = np.inf
    for number in range(servers):
        first = home if number == 0 else (number - 1 if number <= home else number)
        if start_s[first] + layer_s[0, first] + least >= best:
            continue
        for m in range(servers):
            cost[0, m] = np.inf
        cost[0, first] = start_s[first] + layer_s[0, first]
        now = 0
        for layer in range(1, layers):
            for m in range(servers):
                shortest = cost[now, m]
                came_from = m
                for a in range(servers):
                    there = cost[now, a] + hop_s[a, m]
                    if there < shortest:
                        shortest = there
                        came_from = a
                cost[1 - now, m] = shortest + layer_s[layer, m]
                before[layer, m] = came_from
            now = 1 - now
        for number_of_last in range(servers):
            last = first
            if number_of_last > 0:
                last = number_of_last - 1 if number_of_last <= first else number_of_last
            total = cost[now, last] + id_s[last, first]
            if total < best:
                best = total
                at = last
                for layer in range(layers - 1, -1, -1):
                    row[layer] = at
                    if layer > 0:
                        at = before[layer, at]
