"""Plans to choose from: those of other solvers, with and without tables, and searches."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from prism_plan.errors import Infeasible
from prism_plan.placement import Placement
from prism_plan.printable_text import quantity
from prism_plan.solvers.contract import Feature, Options
from prism_plan.solvers.execution import TablePlanner
from prism_plan.solvers.latency.problem import LatencyProblem, Table
from prism_plan.solvers.latency.windows import window_plan
from prism_plan.solvers.paths import tolled_paths
from prism_plan.solvers.pipeline import PipelineProblem, placed_groups
from prism_plan.solvers.registry import get_solver

LOG = logging.getLogger(__name__)

#: Solvers of experts whose plans are candidates, at home and with paths.
EXPERT_SOLVERS = ("exact", "layer-partition", "prism")


def candidates(
    problem: LatencyProblem, options: Options, required: frozenset[Feature], whole_layers: bool,
    effort: int,
) -> Iterator[tuple[str, Placement]]:  # fmt: skip
    """Names and plans; those that the instance rules out are left out."""
    if not whole_layers:
        for name in EXPERT_SOLVERS:
            if required <= get_solver(name).supports:
                yield from _of_experts(problem, name, options)
    yield from _of_whole_layers(problem, required, whole_layers, effort)


def _of_experts(
    problem: LatencyProblem, name: str, options: Options
) -> Iterator[tuple[str, Placement]]:
    """The plan of a solver of experts at home, and with tables of least time."""
    planner = TablePlanner(
        get_solver(name), problem.instance, problem.cluster, problem.trace, options
    )
    home = planner.with_home()
    if home is not None:
        yield from _both_packings(problem, name, home.plan)
    try:
        placed, idle = planner.with_table()
    except Infeasible:
        return
    yield from _both_packings(problem, f"{name}+paths", placed.plan)
    if problem.loaded:
        tolled = planner.if_it_fits(placed, tolled_paths(idle, problem.rates, problem.at_home))
        if tolled is not None:
            yield from _both_packings(problem, f"{name}+paths with tolls", tolled.plan)


def _both_packings(
    problem: LatencyProblem, name: str, plan: Placement
) -> Iterator[tuple[str, Placement]]:
    """A plan as its solver made it, and with experts of a layer spread over a server's GPUs."""
    yield name, plan
    if any(len(gpus) > 1 for gpus in plan.gpu_capacity):
        try:
            spread = problem.packed(plan.local, plan.execution_table, plan.gpu_capacity)
        except Infeasible:  # of experts of unequal size: dealt out in another order
            return
        yield f"{name}, spread over GPUs", spread


def _of_whole_layers(
    problem: LatencyProblem, required: frozenset[Feature], whole_layers: bool, effort: int
) -> Iterator[tuple[str, Placement]]:
    pipelines = PipelineProblem(problem.instance, problem.cluster, problem.trace, problem.seed)
    loads = [0.0, float(problem.rates.sum())] if problem.loaded else [0.0]
    partitions = {}
    for load in loads:
        for groups in pipelines.groups(load).candidates():
            partitions.setdefault(tuple(tuple(sorted(g.members)) for g in groups), groups)
            if required <= get_solver("pipeline").supports:
                name = f"pipeline, {quantity(len(groups), 'group')}" + " for the load" * (load > 0)
                yield from _both_packings(problem, name, placed_groups(pipelines, groups))
    if not problem.instance.in_slots:
        return
    for groups in partitions.values():
        found = window_plan(problem, pipelines, groups, effort)
        if found is None:
            continue
        table, whole = found
        name = f"whole layers, {quantity(len(groups), 'group')}"
        try:
            if whole_layers:
                yield name, _whole_only(problem, table, whole)
            else:
                yield name, problem.placed(table, whole)
        except Infeasible:
            continue


def _whole_only(problem: LatencyProblem, table: Table, whole: np.ndarray) -> Placement:
    local = np.repeat(whole[:, :, None], problem.model.num_experts, axis=2)
    return problem.packed(local, table, problem.capacity(table))
