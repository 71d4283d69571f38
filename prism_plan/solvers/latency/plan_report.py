"""What a placement file says of a plan of `latency` beside the plan (``plan.extra``)."""

from __future__ import annotations

from typing import Any

from prism_plan.latency.expected_latency import PlanLatency
from prism_plan.placement import Placement
from prism_plan.solvers.latency.bounds import all_plans_bound_s, whole_layers_bound_s
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.solvers.latency.reasons import busiest, limits, reason
from prism_plan.solvers.latency.selection import PlanSelection
from prism_plan.solvers.paths import shortest_paths


def plan_report(
    problem: LatencyProblem,
    plan: Placement,
    expected: PlanLatency,
    selection: PlanSelection,
    chosen: str,
) -> dict[str, Any]:
    """Expected seconds, bounds, a reason and limits of the plan ``chosen``; plain values.

    Bounds, the reason and limits are ``None`` where links have bursts: bounds would not hold, and
    what makes up a request's time is not known, for bursts are not in the formula.
    """
    extra: dict[str, Any] = {
        "expected_latency_s": expected.mean_s,
        "expected_parts_s": expected.by_part,
        **dict.fromkeys(("latency_bound_s", "whole_layers_bound_s", "reason", "limits")),
        "chosen": chosen,
        "candidates_s": {name: found.mean_s for name, found in selection.expected.items()},
    }
    if not problem.bursts:
        idle = problem.pipelines.idle
        unlimited = idle.of_table(shortest_paths(idle, problem.at_home))
        bound_s = all_plans_bound_s(problem)
        extra |= {
            "latency_bound_s": bound_s,
            # plans of whole layers are plans, too
            "whole_layers_bound_s": max(
                whole_layers_bound_s(problem, plan.execution_table), bound_s
            ),
            "reason": reason(problem, plan, expected),
            "limits": limits(expected, float(problem.weights @ unlimited)),
        }
    if problem.loaded:
        extra["busiest"], extra["busiest_share"] = busiest(
            plan, expected, places=not problem.bursts
        )
    if selection.simulated:
        extra["simulated_s"] = selection.simulated
        if chosen in selection.simulated:
            extra["simulated_latency_s"] = selection.simulated[chosen]
    return extra
