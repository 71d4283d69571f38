"""Search over which servers hold which whole layers, and where homes execute theirs, under load.

Local search by the queued objective: a request's own seconds where its layers are held, with the
waiting at servers by mean value analysis of processor sharing, and at places as in M/G/c. Homes
choose paths one after the other and pay for the waiting that they cause to others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_plan.compiled_loops import as_constant
from prism_plan.jit import inline_kernel, jit
from prism_plan.kernel_types import int64
from prism_plan.latency.queueing import waiting_for_places
from prism_plan.solvers.paths import path_of_least_time

Array = Any
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Table = npt.NDArray[np.int32]

#: How often each home chooses its path, given those of the others, for one set of holdings.
ROUNDS = 2
#: Rounds in which waiting times of servers are made to agree with each other.
AGREEING = 8
#: A move is taken where it gains more than this share.
GAIN = 1e-7


@dataclass(frozen=True, eq=False)
class GroupProblem:
    """Servers that hold layers for their own homes; H homes, M servers, both of the same group.

    ``layer_s`` [H, L, M] seconds of a layer that a server holds whole, for a mean request of a
    home; ``called_s`` [H, L] of a layer that a home without a table calls elsewhere; ``hop_s`` and
    ``id_s`` [H, M, M], ``start_s`` [H, M] as in a ``MeanRequest``. ``home`` int64 [H] is the home's
    own server, ``fixed`` bool [H] whether it executes everything. ``rates`` [H] are requests per
    second, ``weights`` [H] shares of requests, ``places`` [H], ``variation`` [H] the squared
    coefficient of variation of a request's seconds. ``room`` int64 [M] and ``size`` int64 [L] are
    in the same unit. ``fairness`` is the share of the slowest home's seconds in the objective, the
    rest is that of the mean.
    """

    layer_s: Floats
    called_s: Floats
    hop_s: Floats
    id_s: Floats
    start_s: Floats
    home: npt.NDArray[np.int64]
    fixed: Bools
    rates: Floats
    weights: Floats
    places: Floats
    variation: Floats
    room: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    fairness: float = 0.0


def improve(problem: GroupProblem, held: Bools, most_steps: int) -> tuple[Bools, Table, float, int]:
    """Improve holdings bool [M, L] by local search; the table int32 [H, L] and its seconds.

    The seconds are infinite where some layer cannot be executed. ``most_steps`` bounds the
    holdings that are tried; how many were tried comes last.
    """
    held = held.copy()
    table = np.repeat(problem.home[:, None], held.shape[1], axis=1).astype(np.int64)
    seconds, tried = _improve(*(*_arrays(problem), held, table, int(most_steps)))
    return held, table.astype(np.int32), float(seconds), int(tried)


def respond(problem: GroupProblem, held: Bools) -> tuple[Table, float]:
    """The paths that homes choose where servers hold these layers, and the seconds."""
    table = np.repeat(problem.home[:, None], held.shape[1], axis=1).astype(np.int64)
    seconds = _respond(*(*_arrays(problem), held, table, np.zeros_like(table)))
    return table.astype(np.int32), float(seconds)


def _arrays(problem: GroupProblem) -> tuple[Array, ...]:
    return tuple(
        as_constant(value) if isinstance(value, np.ndarray) else value
        for value in vars(problem).values()
    )


@inline_kernel
def _seconds(  # pragma: no cover - compiled
    layer_s: Array, called_s: Array, hop_s: Array, id_s: Array, start_s: Array, home: Array,
    fixed: Array, rates: Array, weights: Array, places: Array, variation: Array, fairness: float,
    held: Array, table: Array, work_s: Array, at_s: Array,
) -> float:  # fmt: skip
    """Mean seconds of a request with a table [H, L]; fills ``work_s`` and ``at_s`` [H, M]."""
    homes, layers, servers = layer_s.shape
    total, all_weights, slowest = 0.0, 0.0, 0.0
    for h in range(homes):
        for m in range(servers):
            work_s[h, m] = 0.0
        for layer in range(layers):
            m = table[h, layer]
            if held[m, layer]:
                work_s[h, m] += layer_s[h, layer, m]
            elif fixed[h]:
                work_s[h, m] += called_s[h, layer]
            else:
                return np.inf
        for m in range(servers):
            at_s[h, m] = work_s[h, m]
    for _ in range(AGREEING):
        for h in range(homes):
            own_s = 0.0
            for m in range(servers):
                own_s += at_s[h, m]
            present = rates[h] * own_s
            counted = 1.0
            if present > 0.0:
                counted = min(1.0, (places[h] - 1.0) / present)
            for m in range(servers):
                if work_s[h, m] == 0.0:
                    continue
                others = 0.0
                for k in range(homes):
                    there = rates[k] * at_s[k, m]
                    others += counted * there if k == h else there
                at_s[h, m] = work_s[h, m] * (1.0 + min(others, 1e6))
    for h in range(homes):
        first, last = table[h, 0], table[h, layers - 1]
        seconds = start_s[h, first] + id_s[h, last, first]
        for layer in range(1, layers):
            seconds += hop_s[h, table[h, layer - 1], table[h, layer]]
        for m in range(servers):
            seconds += at_s[h, m]
        squared = (1.0 + variation[h]) * seconds**2
        seconds += waiting_for_places(int64(places[h]), rates[h], seconds, squared)
        total += weights[h] * seconds
        all_weights += weights[h]
        if weights[h] > 0.0:
            slowest = max(slowest, seconds)
    return total + fairness * (all_weights * slowest - total)


@inline_kernel
def _path(  # pragma: no cover - compiled
    layer_s: Array, hop_s: Array, id_s: Array, start_s: Array, home: int, factor: Array,
    held: Array, priced: Array, cost: Array, before: Array, row: Array,
) -> None:  # fmt: skip
    """Write the path of least cost over servers that hold layers to ``row`` [L].

    A second at server m costs ``factor[m]``; ``priced`` [L, M], ``cost`` [2, M] and ``before``
    [L, M] are working memory. The row is left alone where there is no path.
    """
    layers, servers = layer_s.shape
    for layer in range(layers):
        for m in range(servers):
            priced[layer, m] = layer_s[layer, m] * factor[m] if held[m, layer] else np.inf
    path_of_least_time(priced, hop_s, start_s, id_s, home, before, cost, row)


@jit
def _respond(  # pragma: no cover - compiled
    layer_s: Array, called_s: Array, hop_s: Array, id_s: Array, start_s: Array, home: Array,
    fixed: Array, rates: Array, weights: Array, places: Array, variation: Array, room: Array,
    size: Array, fairness: float, held: Array, table: Array, best_table: Array,
) -> float:  # fmt: skip
    """Let homes choose paths from those of ``table`` on; leaves the best table there."""
    homes, layers, servers = layer_s.shape
    work_s, at_s = np.zeros((homes, servers)), np.zeros((homes, servers))
    cost, before = np.zeros((2, servers)), np.zeros((layers, servers), np.int64)
    factor, priced = np.ones(servers), np.zeros((layers, servers))
    best = np.inf
    for h in range(homes):  # a path for a request on its own, to begin with
        if not fixed[h]:
            _path(
                layer_s[h], hop_s[h], id_s[h], start_s[h], home[h], factor, held, priced, cost,
                before, table[h],
            )  # fmt: skip
    best = _seconds(
        layer_s, called_s, hop_s, id_s, start_s, home, fixed, rates, weights, places, variation,
        fairness, held, table, work_s, at_s,
    )  # fmt: skip
    best_table[:] = table
    if best == np.inf or rates.sum() == 0.0:
        return best
    for _ in range(ROUNDS):
        for h in range(homes):
            if fixed[h] or weights[h] == 0.0:
                continue
            for m in range(servers):
                waiting, caused = 0.0, 0.0
                for k in range(homes):
                    if k != h:
                        waiting += rates[k] * at_s[k, m]
                        caused += rates[k] * work_s[k, m]
                factor[m] = 1.0 + waiting + caused
            _path(
                layer_s[h], hop_s[h], id_s[h], start_s[h], home[h], factor, held, priced, cost,
                before, table[h],
            )  # fmt: skip
            now = _seconds(
                layer_s, called_s, hop_s, id_s, start_s, home, fixed, rates, weights, places,
                variation, fairness, held, table, work_s, at_s,
            )  # fmt: skip
            if now < best:
                best = now
                best_table[:] = table
    table[:] = best_table
    return best


@jit
def _improve(  # pragma: no cover - compiled
    layer_s: Array, called_s: Array, hop_s: Array, id_s: Array, start_s: Array, home: Array,
    fixed: Array, rates: Array, weights: Array, places: Array, variation: Array, room: Array,
    size: Array, fairness: float, held: Array, table: Array, most_steps: int,
) -> tuple[float, int]:  # fmt: skip
    """Local search: runs of layers of each server, then single layers in exchange for others."""
    _, layers, servers = layer_s.shape
    best_table, made = np.zeros_like(table), np.zeros_like(table)
    trial = held.copy()
    best = _respond(
        layer_s, called_s, hop_s, id_s, start_s, home, fixed, rates, weights, places, variation,
        room, size, fairness, held, table, best_table,
    )  # fmt: skip
    tried, improved = 1, True
    while improved and tried < most_steps:
        improved = False
        for m in range(servers):
            for kind in range(2):
                for first in range(layers):
                    for other in range(layers + 1 if kind == 1 else 1):
                        if tried >= most_steps:
                            break
                        trial[:] = held
                        if kind == 0:  # a run from this layer on, as long as memory goes
                            trial[m] = False
                            left = room[m]
                            for layer in range(first, layers):
                                if size[layer] > left:
                                    break
                                trial[m, layer] = True
                                left -= size[layer]
                        else:  # one layer more, in exchange for another one or for none
                            if held[m, first] or (other < layers and not held[m, other]):
                                continue
                            trial[m, first] = True
                            if other < layers:
                                trial[m, other] = False
                            used = int64(0)
                            for layer in range(layers):
                                if trial[m, layer]:
                                    used += size[layer]
                            if used > room[m]:
                                continue
                        made[:] = table
                        now = _respond(
                            layer_s, called_s, hop_s, id_s, start_s, home, fixed, rates, weights,
                            places, variation, room, size, fairness, trial, made, best_table,
                        )  # fmt: skip
                        tried += 1
                        # of a start that lacks layers the seconds are infinite
                        if now < (best if best == np.inf else best - GAIN * abs(best)):
                            best, improved = now, True
                            held[:] = trial
                            table[:] = made
    return best, tried
