"""Tables and experts in turn: each plan is better than the one before, and is allowed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prism_plan.solvers.latency.best_response import best_response

from prism_plan.errors import Infeasible
from prism_plan.instance import Instance
from prism_plan.placement_check import violations
from prism_plan.solvers import solve
from prism_plan.solvers.paths import shortest_paths
from tests.solvers.latency.drawn import drawn_cluster, drawn_model, drawn_trace, problem_of
from tests.solvers.latency.test_solver import changed, drawn_case
from tests.solvers.test_pipeline import single_gpus

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    kind=st.sampled_from(["slots", "counts", "caches", "rules"]),
    start=st.sampled_from(["exact", "exact+paths"]),
)
def test_each_plan_is_faster_than_the_one_before(seed: int, kind: str, start: str) -> None:
    """By the formula; from any start, which stays as it is. All keep to memory, rules and homes."""
    rng = np.random.default_rng(seed)
    trace, cluster = drawn_case(rng, kind)
    try:
        plan = solve(Instance.build(trace, cluster), start)
    except Infeasible:
        return
    problem = problem_of(trace, cluster)
    before = plan.on_gpu.copy()
    seconds = [problem.expected(plan).mean_s]
    for made in itertools.islice(best_response(problem, plan), 50):
        counted = Instance.build(trace, cluster, execution=made.execution_table)
        assert violations(made, instance=counted) == []
        seconds.append(problem.expected(made).mean_s)
    assert len(seconds) <= 50  # it ends
    assert (np.diff(seconds) < 0).all()
    assert (plan.on_gpu == before).all()


def test_plans_are_close_to_the_optimum() -> None:
    """Two servers, 2 layers of 3 experts: optimal in the median, none 6 % above.

    The optimum is that over all placements, each with its table of least idle time.
    """
    gaps = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        trace = drawn_trace(rng, drawn_model(rng, 2, 3))
        cluster = changed(
            drawn_cluster(rng, 2, 6, weight=1.0), arrival_interval_s=None, execute_at_home=False
        )
        room = [sum(gpu.slots or 0 for gpu in server.gpus) for server in cluster.servers]
        cluster = single_gpus(cluster, room)
        problem = problem_of(trace, cluster)
        best = np.inf
        for owners in itertools.product((1, 2, 3), repeat=6):  # on the first, the second, or both
            held = np.array([[bool(o & 1) for o in owners], [bool(o & 2) for o in owners]])
            if (held.sum(axis=1) <= room).all():
                idle = problem.measure.idle_time(held.reshape(2, 2, 3))
                table = shortest_paths(idle, problem.at_home)
                best = min(best, float(problem.weights @ idle.of_table(table)))
        found = solve(Instance.build(trace, cluster), "latency").plan.extra
        assert found["latency_bound_s"] <= best * (1 + 1e-9)
        gaps.append(found["expected_latency_s"] / best - 1)
    assert min(gaps) >= -1e-9
    assert np.median(gaps) == pytest.approx(0, abs=1e-9)
    assert max(gaps) <= 0.06
