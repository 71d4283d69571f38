"""The optimum over layers as an integer program in HiGHS: a second opinion on :mod:`.program`.

One binary variable for each layer, column and count of experts by server. Messages are a flow from
layer to layer along columns, a commodity for each column of the first layer, on which ids depend.
The relaxation is weak, since half a request on each of two servers sends nothing. HiGHS proves the
optimum of two servers and four layers of four experts within seconds; with three servers and five
layers of eight experts its bound was a ninth of the optimum after a minute. So the study uses the
dynamic programme.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from studies.small_instances.layer_tables import LayerTable
from studies.small_instances.program import Messages, not_dominated

#: The objective's largest weight after scaling, far above HiGHS's absolute tolerance of 1e-6.
MAX_WEIGHT = 1000.0


def solve_integer_program(
    tables: Sequence[LayerTable], messages: Messages, slots: Sequence[int], time_limit_s: float
) -> tuple[list[tuple[int, int]], float, float]:
    """The choice of each layer as (column, position of counts), its value, and the bound.

    Raises
    ------
    RuntimeError
        HiGHS found nothing within the limit.
    """
    program = _Program(tables, slots)
    program.add_messages(messages)
    return program.solve(time_limit_s)


class _Program:
    """Variables and rows are added one by one, then solved."""

    def __init__(self, tables: Sequence[LayerTable], slots: Sequence[int]) -> None:
        self._cost: list[float] = []
        self._entries: list[tuple[int, int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []
        #: For each layer, of each variable from ``_first[layer]`` on: column and counts.
        self._first: list[int] = []
        self._choices: list[list[tuple[int, int]]] = []
        room = [self._row(-np.inf, float(own)) for own in slots]
        for table in tables:
            column, index = np.nonzero(not_dominated(table))
            counts = table.counts(index)
            self._first.append(len(self._cost))
            self._choices.append(list(zip(column.tolist(), index.tolist(), strict=True)))
            one = self._row(1.0, 1.0)
            for i, seconds in enumerate(table.seconds[column, index].tolist()):
                variable = self._variable(seconds)
                self._entries.append((one, variable, 1.0))
                for m, row in enumerate(room):
                    self._entries.append((row, variable, float(counts[i, m])))
        self._binaries = len(self._cost)

    def _row(self, low: float, high: float) -> int:
        self._low.append(low)
        self._high.append(high)
        return len(self._low) - 1

    def _variable(self, cost: float) -> int:
        self._cost.append(cost)
        return len(self._cost) - 1

    def add_messages(self, messages: Messages) -> None:
        """A flow of one from the first layer's column along the columns of the others.

        A commodity for each first column: the ids at the end depend on it.
        """
        columns, layers = len(messages.start_s), len(self._choices)
        chosen = [[self._row(0.0, 0.0) for _ in range(columns)] for _ in range(layers)]
        for layer, choices in enumerate(self._choices):
            for i, (column, _) in enumerate(choices):
                self._entries.append((chosen[layer][column], self._first[layer] + i, -1.0))
        for first in range(columns):
            kept = [[self._row(0.0, 0.0) for _ in range(columns)] for _ in range(layers)]
            begin = self._variable(float(messages.start_s[first]))
            self._entries += [(chosen[0][first], begin, 1.0), (kept[0][first], begin, 1.0)]
            for layer in range(layers - 1):
                for a, b in itertools.product(range(columns), repeat=2):
                    if layer == 0 and a != first:
                        continue
                    hop = self._variable(float(messages.hop_s[a, b]))
                    self._entries += [
                        (kept[layer][a], hop, -1.0),
                        (kept[layer + 1][b], hop, 1.0),
                        (chosen[layer + 1][b], hop, 1.0),
                    ]
            for last in range(columns):
                end = self._variable(float(messages.id_s[last, first]))
                self._entries.append((kept[layers - 1][last], end, -1.0))

    def solve(self, time_limit_s: float) -> tuple[list[tuple[int, int]], float, float]:
        """Run HiGHS."""
        cost = np.array(self._cost)
        scale = MAX_WEIGHT / float(cost.max())
        rows, variables, values = (np.array(part) for part in zip(*self._entries, strict=True))
        matrix = coo_array((values, (rows, variables)), (len(self._low), len(cost)))
        integer = np.zeros(len(cost))
        integer[: self._binaries] = 1
        found = milp(
            cost * scale,
            integrality=integer,
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix.tocsr(), self._low, self._high),
            options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise RuntimeError(f"HiGHS found no plan within {time_limit_s:g} s: {found.message}")
        chosen = []
        for first, choices in zip(self._first, self._choices, strict=True):
            chosen.append(choices[int(found.x[first : first + len(choices)].argmax())])
        return chosen, float(found.fun) / scale, float(found.mip_dual_bound) / scale
