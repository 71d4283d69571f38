"""Planning near an existing placement: what is loaded, what it costs, and what may be kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from prism_plan.cluster import Cluster
from prism_plan.instance import Instance
from prism_plan.placement import Placement
from prism_plan.placement_check import violations
from prism_plan.solvers import solve
from prism_plan.solvers.contract import Options
from prism_plan.solvers.latency.problem import LatencyProblem
from prism_plan.trace import Trace
from tests.solvers.latency.drawn import in_bytes, with_unequal_sizes
from tests.solvers.latency.test_solver import busy_case, busy_plan
from tests.solvers.test_paths import a_model, a_trace
from tests.solvers.test_pipeline import single_gpus


def near(
    trace: Trace, cluster: Cluster, old: Placement, price: float, *, whole_layers: bool = False,
    min_replicas: int = 1,
) -> Placement:  # fmt: skip
    instance = Instance.build(trace, cluster, min_replicas=min_replicas)
    options = Options(reference=old, load_price=price, whole_layers=whole_layers)
    return solve(instance, "latency", options)


def loads(plan: Placement, old: Placement) -> int:
    return int((plan.local & ~old.local).sum())


@pytest.mark.parametrize("interval_s", [None, pytest.param(1e4, marks=pytest.mark.long), 0.4])
@pytest.mark.parametrize(
    "solver", ["uniform", pytest.param("exact", marks=pytest.mark.long), "pipeline", "latency"]
)
def test_nothing_is_worth_a_price_without_end(solver: str, interval_s: float | None) -> None:
    """Nothing is loaded at 1e9 s a GiB, and experts stay on their GPUs; the table may change."""
    trace, cluster = busy_case(interval_s)
    old = busy_plan(solver, interval_s)
    plan = near(trace, cluster, old, 1e9)
    assert loads(plan, old) == plan.plan.extra["loads"] == 0
    assert plan.plan.extra["load_price"] == 1e9
    assert (plan.on_gpu == old.on_gpu).all()
    problem = LatencyProblem(Instance.build(trace, cluster), cluster, trace, seed=0)
    if interval_s is None:
        before_s = problem.expected(old).mean_s
        assert plan.plan.extra["expected_latency_s"] <= before_s * (1 + 1e-9)


def test_loads_fall_as_the_price_rises() -> None:
    """From all that is gained to nothing; each plan pays for itself beside the one before."""
    trace, cluster = busy_case(None)
    old = solve(Instance.build(trace, cluster), "uniform")
    gib = trace.model.expert_bytes_by_layer[0] / 2**30
    plans = [near(trace, cluster, old, price) for price in (0.0, 0.1, 10.0, 1e9)]
    numbers = [loads(plan, old) for plan in plans]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > numbers[-1] == 0
    for chosen, price in ((1, 0.1), (2, 10.0)):
        costs = [
            plan.plan.extra["expected_latency_s"] + price * gib * loads(plan, old) for plan in plans
        ]
        assert costs[chosen] <= min(costs) * (1 + 1e-9)


def test_gib_that_are_loaded() -> None:
    """Two experts of 2**20 bytes and one of 2**21, on servers that did not hold them."""
    model = dataclasses.replace(a_model(2, experts=4), expert_bytes=(2**20, 2**21))
    rng = np.random.default_rng(0)
    cluster = in_bytes(single_gpus(busy_case(None)[1], [8, 8, 8]), model)
    trace = a_trace(model)
    instance = Instance.build(trace, cluster)
    held = np.zeros((3, 2, 4), bool)
    held[0] = True
    base = solve(instance, "pipeline")
    old = base.replace(on_gpu=held, execution=None)
    problem = LatencyProblem(instance, cluster, trace, 0, old)
    held = held.copy()
    held[1, 0, :2] = True
    held[2, 1, 3] = True
    held[0, 0, int(rng.integers(4))] = False  # what is dropped costs nothing
    assert problem.loaded_gib(old.replace(on_gpu=held)) == (2 * 2**20 + 2**21) / 2**30
    assert LatencyProblem(instance, cluster, trace, 0).loaded_gib(old) == 0.0


def test_without_a_price_an_old_placement_does_no_harm() -> None:
    """The plan is no slower than the one that knows nothing of it, by the formula, within 1 %."""
    trace, cluster = busy_case(None)
    instance = Instance.build(trace, cluster)
    free = solve(instance, "latency").plan.extra["expected_latency_s"]
    for solver in ("uniform", "exact", "pipeline"):
        plan = near(trace, cluster, solve(instance, solver), 0.0)
        assert plan.plan.extra["expected_latency_s"] <= free * 1.01


def test_the_file_tells_the_unit_of_the_price() -> None:
    """Seconds a GiB, and the objective stays latency; those of calls are told of ``exact``."""
    trace, cluster = busy_case(None)
    instance = Instance.build(trace, cluster)
    old = solve(instance, "uniform")
    report = near(trace, cluster, old, 0.5).plan
    assert report.objective == "latency"
    assert report.extra["load_price_unit"] == "seconds of a mean request a GiB"
    assert not {"priced_objective", "priced_bound"} & set(report.extra)
    calls = solve(instance, "exact", Options(reference=old, load_price=0.5)).plan
    assert calls.objective == "remote + load_price·loads"
    assert "priced_bound" in calls.extra


def test_what_breaks_the_rules_is_not_kept() -> None:
    """Replicas, pins, forbidden experts, whole layers and homes that the old placement ignores."""
    trace, cluster = busy_case(None)
    roomy = single_gpus(cluster, [24, 24, 24])
    partial, table = busy_plan("exact", None), busy_plan("latency", None)
    first = dataclasses.replace(
        cluster.servers[0], pin=((1, 0), (2, 0)), forbid=((3, 0), (4, 5)), layer_cap=3
    )
    ruled = dataclasses.replace(cluster, servers=(first, *cluster.servers[1:]))
    homes = tuple(dataclasses.replace(s, execute_at_home=True) for s in cluster.servers)
    for old in (partial, table):
        plan = near(trace, ruled, old, 1e9)
        assert violations(plan, instance=Instance.build(trace, ruled)) == []
        kept = near(trace, dataclasses.replace(cluster, servers=homes), old, 1e9)
        assert kept.execution is None
        doubled = near(trace, roomy, old, 1e9, min_replicas=2)
        assert (doubled.local.sum(axis=0) >= 2).all()
        whole = near(trace, roomy, old, 1e9, whole_layers=True)
        assert (whole.local.any(axis=2) == whole.local.all(axis=2)).all()


def test_experts_of_unequal_size_stay_on_their_gpus() -> None:
    """On several GPUs, too, where they might not fit in another order."""
    rng = np.random.default_rng(2)
    model = with_unequal_sizes(rng, a_model(3, experts=4))
    _, cluster = busy_case(None)
    servers = tuple(dataclasses.replace(server, gpus=server.gpus * 2) for server in cluster.servers)
    cluster = in_bytes(dataclasses.replace(cluster, servers=servers), model)
    trace = a_trace(model)
    old = solve(Instance.build(trace, cluster), "pipeline")
    plan = near(trace, cluster, old, 1e9)
    assert loads(plan, old) == 0
    assert (plan.on_gpu == old.on_gpu).all()


def test_servers_that_are_gone_or_new() -> None:
    """The old placement has other servers: those of the same name keep what they have."""
    trace, cluster = busy_case(None)
    old = solve(Instance.build(trace, cluster), "latency")
    renamed = dataclasses.replace(cluster.servers[2], name="new")
    other = dataclasses.replace(cluster, servers=(*cluster.servers[:2], renamed))
    plan = near(trace, other, old, 0.0)
    assert violations(plan, instance=Instance.build(trace, other)) == []
    more = near(trace, dataclasses.replace(cluster, servers=(*cluster.servers, renamed)), old, 1e9)
    assert more.plan.extra["loads"] == 0
