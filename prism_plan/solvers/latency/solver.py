"""The solver ``latency``: candidates, search, and the choice by formula and simulation."""

from __future__ import annotations

from typing import Any

from prism_plan.errors import Infeasible
from prism_plan.instance import Instance
from prism_plan.placement import Placement
from prism_plan.solvers.contract import Feature, Options, Solver, SolverResult, cluster_and_trace
from prism_plan.solvers.latency.candidates import candidates
from prism_plan.solvers.latency.judge import Judge
from prism_plan.solvers.latency.problem import LatencyProblem


def _solve(instance: Instance, options: Options) -> SolverResult:
    cluster, trace = cluster_and_trace(instance, "latency")
    problem = LatencyProblem(instance, cluster, trace, options.seed)
    plans: dict[str, Placement] = {}
    required = frozenset(
        feature
        for feature, needed in (
            (Feature.MIN_REPLICAS, instance.min_replicas > 1),
            (Feature.RULES, instance.has_rules),
            (Feature.UNEQUAL_BYTES, not instance.in_slots),
        )
        if needed
    )
    for name, plan in candidates(problem, options, required, False, 1):
        plans[name] = plan
    if not plans:
        raise Infeasible("no plan", shortfall=1, unit="slots", remedy="add memory")
    expected = {name: problem.expected(plan) for name, plan in plans.items()}
    chosen, simulated = Judge(problem).best(plans, expected)
    plan = plans[chosen]
    extra: dict[str, Any] = {
        "expected_latency_s": expected[chosen].mean_s,
        "candidates": {name: value.mean_s for name, value in expected.items()},
        "chosen": chosen,
        "parts_s": expected[chosen].by_part,
    }
    if simulated:
        extra |= {"simulated_s": simulated, "simulated_latency_s": simulated[chosen]}
    return SolverResult(
        plan.local,
        on_gpu=plan.on_gpu,
        execution=plan.execution_table,
        gpu_capacity=plan.gpu_capacity,
        objective="latency",
        extra=extra,
    )


SOLVER = Solver(
    name="latency",
    summary="experts and where layers execute, planned together for the least mean latency",
    guarantee="never worse than its candidates by its own measure: prism, exact, layer-partition",
    function=_solve,
    supports=frozenset({Feature.MIN_REPLICAS, Feature.RULES, Feature.UNEQUAL_BYTES}),
)
