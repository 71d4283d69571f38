"""The best pipeline over some servers: their order, and how many layers each executes.

A pipeline is one row of an execution table: contiguous runs of layers, each server at most one run.
For a given order of servers the lengths of their runs are a dynamic programme; every order is tried
up to :data:`MAX_EXACT` servers, by one such programme over sets of servers, and beyond that a local
search over orders replaces, inserts, removes, moves and swaps servers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import spans
from prism_plan.jit import inline_kernel, jit
from prism_plan.kernel_types import int64
from prism_plan.latency.idle_time import MeanRequest
from prism_plan.solvers.paths import BUSIEST

Array = Any

#: Every order of at most so many servers is tried.
MAX_EXACT = 6
#: The local search starts from the best of the greedy orders, and from so many of them.
STARTS = 8
#: The search stops after so many steps of the dynamic programme.
MAX_STEPS = 20_000_000


def best_pipeline(
    request: MeanRequest, fits_until: npt.NDArray[np.integer], load: float = 0.0
) -> npt.NDArray[np.int32] | None:
    """The row int32 [L] of least :func:`pipeline_s`; ``None`` where no pipeline was found.

    ``fits_until`` [N, L] is the end of the longest run that begins at a layer and fits a server,
    the layer itself where none does. The least of all pipelines up to :data:`MAX_EXACT` servers
    that a run fits; ties are broken by index. ``load`` as in :func:`pipeline_s`.
    """
    layers = len(request.layer_s)
    usable = np.flatnonzero((fits_until > np.arange(layers)).any(axis=1))
    if not len(usable):
        return None
    prefix_s = np.zeros((len(usable), layers + 1))
    np.cumsum(request.layer_s[:, usable].T, axis=1, out=prefix_s[:, 1:])
    arrays = (
        prefix_s,
        np.ascontiguousarray(request.hop_s[np.ix_(usable, usable)]),
        np.ascontiguousarray(request.start_s[usable]),
        np.ascontiguousarray(request.id_s[np.ix_(usable, usable)]),
        np.ascontiguousarray(fits_until[usable], np.int64),
    )
    row = np.full(layers, -1, np.int32)
    if len(usable) <= MAX_EXACT:
        _every_order(*arrays, float(load), row)
    else:
        _search_orders(*arrays, float(load), row)
    return None if row[0] < 0 else usable[row].astype(np.int32)


def pipeline_s(request: MeanRequest, row: npt.NDArray[np.integer], load: float = 0.0) -> float:
    """Seconds of a request with a row [L], with the waiting for the requests of others.

    ``load``: a server with a run of w seconds is busy for a share ρ = load · w of its time, and a
    layer waits there for ρ / (2 (1 - ρ)) of its own time on average, as in an M/D/1 queue; up to
    ρ = :data:`BUSIEST`, and in proportion to ρ beyond. 0 is an idle cluster.
    """
    total = request.of_row(row)
    for run in spans(row):
        seconds = float(request.layer_s[run.first : run.last + 1, run.server].sum())
        total += with_waiting(seconds, load) - seconds
    return total


def with_waiting(seconds: float, load: float) -> float:
    """The seconds of a run with its waiting; see :func:`pipeline_s`."""
    share = load * seconds
    if share <= BUSIEST:
        return seconds * (1 + share / (2 * (1 - share)))
    return seconds * (1 + BUSIEST / (2 * (1 - BUSIEST))) * share / BUSIEST


#: The same for kernels.
_with_waiting = inline_kernel(with_waiting)


@jit
def _every_order(  # pragma: no cover - compiled
    prefix_s: Array, hop_s: Array, start_s: Array, id_s: Array, fits_until: Array, load: float,
    row: Array,
) -> None:  # fmt: skip
    """Write the best pipeline over N servers to ``row`` [L], left alone where there is none.

    ``cost[used, last, l]``: layers up to l executed by the servers of the set ``used``, the last
    run by ``last``; the first server is tried one by one, for token ids travel back to it.
    """
    servers, layers = fits_until.shape
    sets = 1 << servers
    cost = np.empty((sets, servers, layers + 1))
    came_from = np.zeros((sets, servers, layers + 1, 2), np.int64)  # server and layer before
    best = np.inf
    for first in range(servers):
        cost[:] = np.inf
        for end in range(1, fits_until[first, 0] + 1):
            run_s = _with_waiting(prefix_s[first, end], load)
            cost[1 << first, first, end] = start_s[first] + run_s
        for used in range(sets):
            if (used >> first) & 1 == 0:
                continue
            for last in range(servers):
                for begin in range(1, layers):
                    now = cost[used, last, begin]
                    if now >= best:  # infinite where the state is not reached
                        continue
                    for m in range(servers):
                        if (used >> m) & 1:
                            continue
                        to = used | (1 << m)
                        base = now + hop_s[last, m]
                        for end in range(begin + 1, fits_until[m, begin] + 1):
                            run_s = prefix_s[m, end] - prefix_s[m, begin]
                            there = base + _with_waiting(run_s, load)
                            if there < cost[to, m, end]:
                                cost[to, m, end] = there
                                came_from[to, m, end, 0] = last
                                came_from[to, m, end, 1] = begin
        for used in range(sets):
            for last in range(servers):
                total = cost[used, last, layers] + id_s[last, first]
                if total < best:
                    best = total
                    at, end, left = last, layers, used
                    while True:
                        begin = came_from[left, at, end, 1] if left != 1 << first else 0
                        for layer in range(begin, end):
                            row[layer] = at
                        if begin == 0:
                            break
                        before = came_from[left, at, end, 0]
                        left, at, end = left & ~(1 << at), before, begin


@inline_kernel
def _run_lengths(  # pragma: no cover - compiled
    order: Array, number: int, prefix_s: Array, hop_s: Array, start_s: Array, id_s: Array,
    fits_until: Array, load: float, cost: Array, begin_of: Array,
) -> float:  # fmt: skip
    """Least seconds with the first ``number`` servers of ``order``, each with a layer at least.

    ``cost`` [2, L + 1] is working memory; ``begin_of`` [number, L + 1] tells where the run of the
    i-th server begins that ends before a layer.
    """
    layers = fits_until.shape[1]
    cost[0, :] = np.inf
    cost[0, 0] = start_s[order[0]]
    now = 0
    for i in range(number):
        m = order[i]
        cost[1 - now, :] = np.inf
        hop = hop_s[order[i - 1], m] if i > 0 else 0.0
        for begin in range(i, layers - (number - 1 - i)):
            if cost[now, begin] == np.inf:
                continue
            base = cost[now, begin] + hop
            last_end = min(fits_until[m, begin], layers - (number - 1 - i))
            for end in range(begin + 1, last_end + 1):
                there = base + _with_waiting(prefix_s[m, end] - prefix_s[m, begin], load)
                if there < cost[1 - now, end]:
                    cost[1 - now, end] = there
                    begin_of[i, end] = begin
        now = 1 - now
    total: float = cost[now, layers] + id_s[order[number - 1], order[0]]
    return total


@inline_kernel
def _greedy_order(  # pragma: no cover - compiled
    first: int, prefix_s: Array, hop_s: Array, fits_until: Array, load: float, order: Array,
    in_use: Array,
) -> int:  # fmt: skip
    """Fill servers from ``first`` on, each time the one of least seconds a layer; 0: none fits."""
    servers, layers = fits_until.shape
    in_use[:] = False
    number, at, covered = 0, first, 0
    while True:
        order[number] = at
        in_use[at] = True
        number += 1
        covered = fits_until[at, covered]
        if covered == layers:
            return number
        best, nearest = np.inf, -1
        for m in range(servers):
            end = fits_until[m, covered]
            if in_use[m] or end == covered:
                continue
            run_s = prefix_s[m, end] - prefix_s[m, covered]
            seconds = hop_s[at, m] + _with_waiting(run_s, load)
            if seconds / (end - covered) < best:
                best, nearest = seconds / (end - covered), m
        if nearest < 0:
            return 0
        at = nearest


@inline_kernel
def _neighbour(  # pragma: no cover - compiled
    order: Array, number: int, in_use: Array, longest: int, kind: int, i: int, j: int, made: Array
) -> int:
    """Write a neighbour of an order to ``made``; returns its length, 0 where there is none.

    0: the i-th becomes server j. 1: server j comes before the i-th, or last. 2: the i-th goes.
    3: the i-th moves to place j. 4: the i-th and j-th change places.
    """
    last = number if kind == 1 else number - 1
    if i > last or (kind < 2 and in_use[j]) or (kind == 1 and number == longest):
        return 0
    if kind == 2 and (j > 0 or number == 1):
        return 0
    if kind > 2 and (j >= number or i == j or (kind == 4 and j < i)):
        return 0
    for k in range(number):
        made[k] = order[k]
    if kind == 0:
        made[i] = j
    elif kind == 1:
        for k in range(number, i, -1):
            made[k] = made[k - 1]
        made[i] = j
        return number + 1
    elif kind == 2:
        for k in range(i, number - 1):
            made[k] = made[k + 1]
        return number - 1
    elif kind == 3:
        step = 1 if i < j else -1
        for k in range(i, j, step):
            made[k] = made[k + step]
        made[j] = order[i]
    else:
        made[i], made[j] = order[j], order[i]
    return number


@jit
def _search_orders(  # pragma: no cover - compiled
    prefix_s: Array, hop_s: Array, start_s: Array, id_s: Array, fits_until: Array, load: float,
    row: Array,
) -> None:  # fmt: skip
    """As :func:`_every_order`, by local search from the best of the greedy orders."""
    servers, layers = fits_until.shape
    longest = int64(min(servers, layers))
    order, made = np.zeros(longest + 1, np.int64), np.zeros(longest + 1, np.int64)
    in_use = np.zeros(servers, np.bool_)
    cost, begin_of = np.empty((2, layers + 1)), np.zeros((longest + 1, layers + 1), np.int64)
    greedy_s = np.full(servers, np.inf)
    for first in range(servers):
        if fits_until[first, 0] > 0:
            number = _greedy_order(int64(first), prefix_s, hop_s, fits_until, load, order, in_use)
            if number > 0:
                greedy_s[first] = _run_lengths(
                    order, number, prefix_s, hop_s, start_s, id_s, fits_until, load, cost, begin_of
                )
    best, steps = np.inf, 0
    for first in np.argsort(greedy_s, kind="mergesort")[:STARTS]:
        now = greedy_s[first]
        if now == np.inf:
            break
        number = _greedy_order(first, prefix_s, hop_s, fits_until, load, order, in_use)
        improved = True
        while improved:
            improved = False
            for kind in range(5):
                for i in range(longest + 1):
                    for j in range(servers):
                        length = _neighbour(
                            order, number, in_use, longest, int64(kind), int64(i), int64(j), made
                        )
                        if length == 0 or steps > MAX_STEPS:
                            continue
                        there = _run_lengths(
                            made, length, prefix_s, hop_s, start_s, id_s, fits_until, load,
                            cost, begin_of,
                        )  # fmt: skip
                        steps += length * layers * layers // (2 * length)
                        if there < now - 1e-12 * abs(now):
                            now, number, improved = there, length, True
                            in_use[:] = False
                            for k in range(number):
                                order[k] = made[k]
                                in_use[made[k]] = True
        if now < best:
            best = now
            _run_lengths(
                order, number, prefix_s, hop_s, start_s, id_s, fits_until, load, cost, begin_of
            )
            end = layers
            for place in range(number - 1, -1, -1):
                begin = begin_of[place, end]
                for layer in range(begin, end):
                    row[layer] = order[place]
                end = begin
