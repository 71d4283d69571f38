"""The optimum over layers by a dynamic programme: columns of the table, and slots used so far.

A layer's choice is a column (the server that executes it for each home) and how many experts each
server holds; :mod:`.layer_tables` has the least seconds of that. Messages join the columns of
neighbouring layers, and the last with the first; slots are shared by all layers. So the programme
runs once for each column of the first layer, over (column, slots used by each server). Nothing is
rounded or relaxed: the result is the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_plan.compiled_loops import as_constant
from prism_plan.jit import kernel
from studies.small_instances.layer_tables import LayerTable

Array = Any
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Messages:
    """Seconds of the messages of all homes by columns: ``start_s`` [C], ``hop_s`` [C, C].

    ``id_s`` [C, C] are the ids of tokens from the last layer's column to the first's.
    """

    start_s: Floats
    hop_s: Floats
    id_s: Floats


class _Choices(NamedTuple):
    """Choices of one layer: of column c those from ``begin[c]`` to ``begin[c + 1]``.

    ``counts`` [choices, N] are the experts that each server holds, ``states`` [choices] what they
    add to the number of a state, ``index`` their position in the layer's table.
    """

    begin: Array
    counts: Array
    states: Array
    seconds: Array
    index: Array


def best_choices(
    tables: Sequence[LayerTable], messages: Messages, slots: Sequence[int]
) -> tuple[list[tuple[int, int]], float]:
    """The best (column, position of counts) of each layer, and the seconds in all.

    Raises
    ------
    ValueError
        The slots do not hold every expert.
    """
    layers, columns = len(tables), len(messages.start_s)
    size = np.array(slots, np.int64) + 1
    states = int(size.prod())
    stride = np.cumprod([1, *size[:-1]])
    choices = [_choices(table, stride) for table in tables]
    least, found = np.inf, None
    before = np.empty((columns, states))
    reached = np.empty((columns, states))
    free = np.empty(len(size), np.int64)
    least_of_fewer = np.empty(states)
    from_column = np.empty((layers, columns, states), np.int8)
    from_choice = np.empty((layers, columns, states), np.int32)
    # what is good soon leaves less to look at: a column without messages to itself begins
    for first in np.argsort(messages.id_s.diagonal(), kind="stable").tolist():
        one = choices[0]
        own = slice(one.begin[first], one.begin[first + 1])
        if own.start == own.stop:
            continue
        before[:] = np.inf
        room = (one.counts[own] < size).all(axis=1)
        state = one.counts[own][room] @ stride
        before[first, state] = one.seconds[own][room] + messages.start_s[first]
        from_choice[0, first, state] = np.arange(own.start, own.stop)[room]
        for layer in range(1, layers):
            _hop(before, as_constant(messages.hop_s), least, reached, from_column[layer])
            _drop_dominated(reached, as_constant(size), as_constant(stride), least_of_fewer)
            _choose(
                reached, choices[layer], as_constant(size), as_constant(stride), free, least,
                before, from_choice[layer],
            )  # fmt: skip
        ended = before + messages.id_s[:, first][:, None]
        if ended.min() < least:
            least = float(ended.min())
            column, state = np.unravel_index(int(ended.argmin()), ended.shape)
            found = _traced(choices, from_column, from_choice, int(column), int(state))
    if found is None:
        raise ValueError("the slots do not hold every expert")
    return found, least


def _choices(table: LayerTable, stride: npt.NDArray[np.int64]) -> _Choices:
    column, index = np.nonzero(not_dominated(table))
    return _Choices(
        as_constant(np.searchsorted(column, np.arange(len(table.seconds) + 1))),
        as_constant(table.counts(index)),
        as_constant(table.counts(index) @ stride),
        as_constant(table.seconds[column, index]),
        as_constant(index),
    )


def not_dominated(table: LayerTable) -> npt.NDArray[np.bool_]:
    """Which entries are below those of all fewer or equal counts, [columns, (E + 1)^N]."""
    size = table.experts + 1
    seconds = table.seconds.reshape(-1, *[size] * table.servers)
    least = seconds
    axes = range(1, table.servers + 1)
    for axis in axes:
        least = np.minimum.accumulate(least, axis=axis)
    fewer = np.full_like(seconds, np.inf)
    for axis in axes:
        shifted = np.roll(least, 1, axis=axis)
        shifted[(slice(None),) * axis + (0,)] = np.inf
        fewer = np.minimum(fewer, shifted)
    kept: npt.NDArray[np.bool_] = (seconds < fewer).reshape(table.seconds.shape)
    return kept


def _traced(
    choices: Sequence[_Choices], from_column: Array, from_choice: Array, column: int, state: int,
) -> list[tuple[int, int]]:  # fmt: skip
    """The choices that lead to a last column and state."""
    found = []
    for layer in range(len(choices) - 1, -1, -1):
        choice = int(from_choice[layer, column, state])
        found.append((column, int(choices[layer].index[choice])))
        state -= int(choices[layer].states[choice])
        if layer > 0:
            column = int(from_column[layer, column, state])
    return found[::-1]


@kernel
def _hop(before: Array, hop_s: Array, least: float, reached: Array, from_column: Array) -> None:
    """``reached`` [C, states]: the next layer's column, with the messages to it."""
    columns, states = before.shape
    for to in range(columns):
        for state in range(states):
            reached[to, state] = np.inf
    for of in range(columns):
        for state in range(states):
            if before[of, state] >= least:
                continue
            for to in range(columns):
                seconds = before[of, state] + hop_s[of, to]
                if seconds < reached[to, state]:
                    reached[to, state] = seconds
                    from_column[to, state] = of


@kernel
def _drop_dominated(seconds: Array, size: Array, stride: Array, least: Array) -> None:
    """Make infinite what is no faster than a state of fewer or equal slots of each server.

    ``least`` [states] is working memory: the least seconds of all states of no more slots.
    """
    columns, states = seconds.shape
    for column in range(columns):
        for state in range(states):
            fewer = np.inf
            for m in range(len(size)):
                if state // stride[m] % size[m] > 0:
                    fewer = min(fewer, least[state - stride[m]])
            least[state] = min(fewer, seconds[column, state])
            if fewer <= seconds[column, state]:
                seconds[column, state] = np.inf


@kernel
def _choose(
    reached: Array, choices: _Choices, size: Array, stride: Array, free: Array, least: float,
    after: Array, from_choice: Array,
) -> None:  # fmt: skip
    """``after`` [C, states]: with the layer itself, its experts in the slots.

    ``free`` [N] is working memory.
    """
    columns, states = reached.shape
    servers = len(size)
    for column in range(columns):
        for state in range(states):
            after[column, state] = np.inf
        for state in range(states):
            if reached[column, state] >= least:
                continue
            begun = reached[column, state]
            for m in range(servers):
                free[m] = size[m] - 1 - state // stride[m] % size[m]
            for i in range(choices.begin[column], choices.begin[column + 1]):
                fits = True
                for m in range(servers):
                    fits &= choices.counts[i, m] <= free[m]
                if not fits:
                    continue
                seconds = begun + choices.seconds[i]
                to = state + choices.states[i]
                if seconds < least and seconds < after[column, to]:
                    after[column, to] = seconds
                    from_choice[column, to] = i
