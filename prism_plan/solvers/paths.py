"""The best execution table for a placement: a shortest path over servers, home by home.

Optimal in the idle time of a request (:mod:`prism_plan.latency.idle_time`): each layer costs what
it takes where it executes, and each change of server the messages that it needs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import home_execution
from prism_plan.jit import kernel
from prism_plan.latency.idle_time import IdleTime, MeanRequest

Array = Any

#: How often homes choose again where they pay tolls.
ROUNDS = 3
#: Tolls grow with the share of time up to here, and in proportion to the work beyond.
BUSIEST = 0.95


def shortest_paths(
    idle: IdleTime, at_home: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int32]:
    """The table int32 [N, L] of least idle time, home by home; ties keep a layer where it is.

    Servers of ``at_home`` [N], and those without users, execute all layers themselves.
    """
    _, layers, servers = idle.layer_s.shape
    table = home_execution(servers, layers)
    for home in np.flatnonzero(idle.has_users).tolist():
        if at_home is None or not at_home[home]:
            table[home] = shortest_path(idle.of_home(home), home)
    return table


def tolled_paths(
    idle: IdleTime, rates: npt.NDArray[np.float64], at_home: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int32]:
    """A table int32 [N, L] in which homes pay for the waiting that they cause to others.

    ``rates`` [N] are requests per second of each home. A server that is busy for a share ρ of its
    time lets ρ² / (2 (1 - ρ)) layers wait on average, as an M/D/1 queue does; each second of work
    there is charged with the derivative of that. Homes choose one after the other, given the
    choices of the others, :data:`ROUNDS` times: a heuristic, which is not optimal.
    """
    _, layers, servers = idle.layer_s.shape
    table = home_execution(servers, layers)
    busy = np.zeros(servers)
    own = np.zeros((servers, servers))  # of it, work for each home
    for n in np.flatnonzero(idle.has_users & at_home).tolist():
        own[n, n] = rates[n] * idle.of_home(n).layer_s[:, n].sum()
        busy[n] += own[n, n]
    for _ in range(ROUNDS):
        for home in np.flatnonzero(idle.has_users & ~at_home).tolist():
            request = idle.of_home(home)
            busy -= own[home]
            tolled = request.layer_s * (1 + _toll(busy))
            table[home] = shortest_path(dataclasses.replace(request, layer_s=tolled), home)
            seconds = request.layer_s[np.arange(layers), table[home]]
            own[home] = rates[home] * np.bincount(table[home], seconds, minlength=servers)
            busy += own[home]
    return table


def _toll(busy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The price of a second of work where others are busy for these shares of the time, [N]."""
    share = np.clip(busy, 0.0, BUSIEST)
    toll: npt.NDArray[np.float64] = (2 * share - share**2) / (2 * (1 - share) ** 2)
    return toll * np.maximum(busy / BUSIEST, 1.0)


def shortest_path(request: MeanRequest, home: int) -> npt.NDArray[np.int32]:
    """The row int32 [L] of least time for a mean request of a home; ties keep a layer there."""
    layers, servers = request.layer_s.shape
    row = np.full(layers, home, np.int32)
    before, cost = np.zeros((layers, servers), np.int32), np.zeros((2, servers))
    path_of_least_time(
        request.layer_s, request.hop_s, request.start_s, request.id_s, home, before, cost, row
    )
    return row


@kernel
def path_of_least_time(  # pragma: no cover - compiled
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
