"""Partial layers: tables and experts in turn, each the best answer to the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prism_plan.errors import Infeasible
from prism_plan.placement import Placement
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.solvers.paths import shortest_paths, tolled_paths

#: Turns of table and experts.
ROUNDS = 3


def best_response(problem: LatencyProblem, plan: Placement) -> Iterator[Placement]:
    """Plans that follow from a plan, while each is faster than the one before by the formula."""
    best_s = problem.expected(plan).mean_s
    for _ in range(ROUNDS):
        idle = problem.measure.idle_time(plan.on_gpu)
        tables = [shortest_paths(idle, problem.at_home)]
        if problem.loaded:
            tables.append(tolled_paths(idle, problem.rates, problem.at_home))
        tables.append(plan.execution_table)
        found = []
        for table in tables:
            for keeps in (True, False):
                executed = np.zeros(plan.local.shape[:2], bool)
                for n in np.flatnonzero(problem.weights > 0):
                    executed[table[n], np.arange(table.shape[1])] = True
                whole = executed & plan.local.all(axis=2) if keeps else np.zeros_like(executed)
                try:
                    made = problem.placed(table, whole)
                except Infeasible:
                    continue
                found.append((problem.expected(made).mean_s, made))
            kept = problem.if_it_fits(plan.local, table)
            if kept is not None:
                found.append((problem.expected(kept).mean_s, kept))
        if not found:
            return
        now_s, made = min(found, key=lambda one: one[0])
        if now_s >= best_s * (1 - 1e-9):
            return
        best_s, plan = now_s, made
        yield plan
