"""Plans to choose from: those of other solvers, with and without tables, and searches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prism_plan.errors import Infeasible
from prism_plan.execution_table import home_execution
from prism_plan.placement import Placement
from prism_plan.printable_text import quantity
from prism_plan.solvers.contract import Feature, Options
from prism_plan.solvers.execution import TablePlanner
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.solvers.latency.whole_layer_search import whole_layer_plans
from prism_plan.solvers.packing import reference_local
from prism_plan.solvers.paths import shortest_paths, tolled_paths
from prism_plan.solvers.pipeline import placed_groups
from prism_plan.solvers.pipeline_groups import Partition
from prism_plan.solvers.registry import get_solver

#: Solvers of experts whose plans are candidates, at home and with paths.
EXPERT_SOLVERS = ("exact", "layer-partition", "prism")
#: How names of plans of this solver's own begin; all others are plans of other solvers.
OWN = "whole layers"


def candidates(
    problem: LatencyProblem, options: Options, required: frozenset[Feature], effort: int = 1
) -> Iterator[tuple[str, Placement]]:
    """Names and plans; those that the instance or the options rule out are left out.

    Several plans may have one name.
    """
    if options.reference is not None:
        yield from _of_reference(problem, options.reference)
    if not options.whole_layers:
        for name in EXPERT_SOLVERS:
            if required <= get_solver(name).supports:
                yield from _of_experts(problem, name, options)
    yield from _of_whole_layers(problem, required, options, effort)


def _of_reference(problem: LatencyProblem, reference: Placement) -> Iterator[tuple[str, Placement]]:
    """The existing placement, with its own table, at home, and with the table of least time."""
    instance = problem.instance
    local = reference_local(instance, reference)
    if not local.any(axis=0).all():
        return  # servers are gone
    tables = {"at home": home_execution(*local.shape[:2])}
    if reference.servers == instance.servers and reference.execution is not None:
        tables["as it is"] = reference.execution_table
    for name, table in tables.items():
        plan = problem.if_it_fits(local, table)
        if plan is None:
            continue
        yield f"existing placement {name}", plan
        if name == "at home":
            paths = shortest_paths(problem.measure.idle_time(plan.on_gpu), problem.at_home)
            plan = problem.if_it_fits(local, paths)
            if plan is not None:
                yield "existing placement with paths", plan


def _of_experts(
    problem: LatencyProblem, name: str, options: Options
) -> Iterator[tuple[str, Placement]]:
    """The plan of a solver of experts at home, and with tables of least time."""
    own = dataclasses.replace(options, load_price=0.0)
    if Feature.LOAD_PRICE not in get_solver(name).supports:
        own = dataclasses.replace(own, reference=None)
    planner = TablePlanner(get_solver(name), problem.instance, problem.cluster, problem.trace, own)
    home = planner.with_home()
    if home is not None:
        yield name, home.plan
    try:
        placed, idle = planner.with_table()
    except Infeasible:
        return
    yield f"{name}+paths", placed.plan
    if problem.loaded:
        tolled = planner.if_it_fits(placed, tolled_paths(idle, problem.rates, problem.at_home))
        if tolled is not None:
            yield f"{name}+paths with tolls", tolled.plan


def spread_over_gpus(problem: LatencyProblem, plan: Placement) -> Placement | None:
    """A plan with the experts of each layer spread over a server's GPUs; ``None``: no change."""
    if all(len(gpus) == 1 for gpus in plan.gpu_capacity):
        return None
    try:
        return problem.packed(plan.local, plan.execution_table, plan.gpu_capacity)
    except Infeasible:  # of experts of unequal size: distributed in another order
        return None


def _of_whole_layers(
    problem: LatencyProblem, required: frozenset[Feature], options: Options, effort: int
) -> Iterator[tuple[str, Placement]]:
    loads = [0.0, float(problem.rates.sum())] if problem.loaded else [0.0]
    partitions: dict[tuple[tuple[int, ...], ...], Partition] = {}
    for load in loads:
        for groups in problem.pipelines.groups(load).candidates():
            partitions.setdefault(tuple(tuple(sorted(g.members)) for g in groups), groups)
            if required <= get_solver("pipeline").supports:
                name = f"pipeline, {quantity(len(groups), 'group')}" + " for the load" * (load > 0)
                yield name, placed_groups(problem.pipelines, groups)
    if not problem.instance.in_slots:
        return
    for groups in partitions.values():
        for table, whole in whole_layer_plans(problem, groups, effort):
            try:
                plan = problem.placed(table, whole, fill=not options.whole_layers)
            except Infeasible:
                continue
            yield f"{OWN}, {quantity(len(groups), 'group')}", plan
