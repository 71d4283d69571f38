"""Optima of restricted plans: what each freedom is worth, and how far best response goes.

The dynamic programme with some choices taken away gives the best plan of a class. Best response
alternates between the best experts for a table and the best table for experts, from several tables.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from prism_plan.execution_table import moved_activations
from prism_plan.instance import Instance
from prism_plan.solvers import solve
from prism_plan.solvers.paths import shortest_paths
from studies.small_instances.optimum import Measure, Parts
from studies.small_instances.program import best_choices

Bools = npt.NDArray[np.bool_]
#: Best response ends after so many rounds at the latest.
MAX_ROUNDS = 10


def class_optima(parts: Parts, measure: Measure, problem: Instance) -> dict[str, float | None]:
    """Seconds of the best plan of each class, ``None`` where there is none."""
    columns, servers = parts.columns, len(parts.slots)
    users = np.flatnonzero(measure.anywhere.has_users)
    alike = (columns[:, users] == columns[:, users[:1]]).all(axis=1)
    home = (columns == np.arange(servers)).all(axis=1)
    counts = parts.tables[0].counts(np.arange(parts.tables[0].seconds.shape[1]))
    experts = parts.tables[0].experts
    executes = (columns[:, users, None] == np.arange(servers)).any(axis=1)
    whole = ((counts[None] == experts) | ~executes[:, None]).all(axis=2)
    one_copy = np.broadcast_to(counts.sum(axis=1) == experts, whole.shape)
    anything = np.ones(whole.shape, bool)
    on_one = [
        anything & (alike & (columns[:, users[0]] == server))[:, None] for server in range(servers)
    ]
    found = {
        "every layer at home": _best(parts, anything & home[:, None]),
        "one server executes everything": _least(_best(parts, own) for own in on_one),
        "one row for all homes": _best(parts, anything & alike[:, None]),
        "one copy of each expert": _best(parts, one_copy),
        "whole layers where they execute": _best(parts, whole),
        "whole layers, one row": _best(parts, whole & alike[:, None]),
    }
    starts = list(_starts(parts, users))
    found["best response"] = _least(best_response(parts, measure, table) for table in starts)
    found["best response, experts by remote calls"] = _least(
        flow_response(problem, measure, table) for table in starts
    )
    return found


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def flow_response(problem: Instance, measure: Measure, table: npt.NDArray[np.integer]) -> float:
    """As :func:`best_response`, with the experts of fewest remote calls for a table.

    These are an exact flow on moved activations. Seconds by the measure.
    """
    least = np.inf
    for _ in range(MAX_ROUNDS):
        calls = moved_activations(problem.activations, table)
        local = solve(problem.replace(activations=calls), "exact").local
        table = shortest_paths(measure.idle_time(local))
        seconds = measure.value_s(local, table)
        if seconds >= least * (1 - 1e-9):
            return least
        least = seconds
    return least


def best_response(parts: Parts, measure: Measure, table: npt.NDArray[np.integer]) -> float | None:
    """Seconds of the plan at which neither the table nor the experts alone can be improved.

    By the programme's seconds; begins with a table int [N, L]. Slots that the
    programme leaves free stay empty. ``None`` where the slots do not hold
    what the table needs.
    """
    least: float | None = None
    for _ in range(MAX_ROUNDS):
        column = [_position(parts.columns, own) for own in table.T]
        fixed = [np.arange(len(parts.columns)) == own for own in column]
        try:
            chosen, seconds = _restricted(parts, [own[:, None] for own in fixed])
        except ValueError:
            return least
        if least is not None and seconds >= least * (1 - 1e-9):
            return least
        least = seconds
        local, _ = parts.plan(chosen)
        table = shortest_paths(measure.idle_time(local))
    return least


def _starts(parts: Parts, users: npt.NDArray[np.intp]) -> Iterator[npt.NDArray[np.int64]]:
    """Tables [N, L]: each home on one server, and one row for all with one change of servers."""
    servers, layers = len(parts.slots), len(parts.tables)
    for column in parts.columns:
        yield np.repeat(column[:, None], layers, axis=1)
    for a, b in itertools.permutations(range(servers), 2):
        for change in range(1, layers):
            table = np.repeat(np.arange(servers)[:, None], layers, axis=1)
            table[users, :change] = a
            table[users, change:] = b
            yield table


def _position(columns: npt.NDArray[np.int64], column: npt.NDArray[np.integer]) -> int:
    return int(np.flatnonzero((columns == column).all(axis=1))[0])


def _best(parts: Parts, allowed: Bools) -> float | None:
    """The best with the same choices in every layer, bool [columns, counts]."""
    try:
        return _restricted(parts, [allowed] * len(parts.tables))[1]
    except ValueError:
        return None


def _restricted(parts: Parts, allowed: list[Bools]) -> tuple[list[tuple[int, int]], float]:
    tables = [
        dataclasses.replace(table, seconds=np.where(own, table.seconds, np.inf))
        for table, own in zip(parts.tables, allowed, strict=True)
    ]
    return best_choices(tables, parts.messages, parts.slots)
