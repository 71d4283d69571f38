"""Reviews of plans with execution tables: moved activations, messages in C, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from prism_plan.errors import InputError, UnsupportedFeature
from prism_plan.execution_table import home_execution, moved_activations
from prism_plan.instance import Instance
from prism_plan.migration.cost import call_seconds, communication_s, gpu_load_gbs
from prism_plan.migration.policy import Policy, Review, review
from prism_plan.migration.recent_requests import requests_behind
from prism_plan.placement import Placement
from prism_plan.placement_check import violations
from prism_plan.solvers import solve
from prism_plan.solvers.latency.problem import LatencyProblem
from tests.evaluate.simulation_material import SPEC, small_cluster, small_trace
from tests.migration.test_policy import HORIZON_S, adopted_s, costs, medium, placed, tiny


def remote_s(
    rates: np.ndarray, local: np.ndarray, table: np.ndarray, call_s: np.ndarray, horizon_s: float
) -> float:
    """Seconds of remote calls, call by call: each from the server that executes the layer."""
    total = 0.0
    for n, layer, e in np.argwhere(rates > 0):
        m = table[n, layer]
        if not local[m, layer, e]:
            total += rates[n, layer, e] * call_s[m] * horizon_s
    return float(total)


def a_table(rng: np.random.Generator, instance: Instance) -> np.ndarray:
    shape = (instance.num_servers, instance.model.num_layers)
    return rng.integers(0, instance.num_servers, shape).astype(np.int32)


@pytest.mark.parametrize("seed", range(10))
def test_communication_is_seen_from_where_layers_execute(seed: int) -> None:
    """Against a sum over calls; with every layer at home it is that of plans without a table."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng)
    call_s, table = rng.random(4), a_table(rng, instance)
    moved = standing.replace(execution=table)
    rates = instance.activations
    found = communication_s(rates, moved.local_to_execution, call_s, 7.0, moved.execution)
    assert found == pytest.approx(remote_s(rates, standing.local, table, call_s, 7.0))
    home = home_execution(4, instance.model.num_layers)
    at_home = communication_s(rates, standing.local, call_s, 7.0, home)
    assert at_home == pytest.approx(communication_s(rates, standing.local, call_s, 7.0), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_moved_activations(seed: int) -> None:
    """Calls move to the server that executes the layer; at home nothing moves, to the bit."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng)
    rates, table = instance.activations, a_table(rng, instance)
    by_hand = np.zeros_like(rates)
    for n, layer in np.ndindex(*table.shape):
        by_hand[table[n, layer], layer] += rates[n, layer]
    moved = moved_activations(rates, table)
    assert moved == pytest.approx(by_hand)
    assert (moved_activations(rates, home_execution(*table.shape)) == rates).all()
    # what is remote of the one is remote of the other
    executed = standing.replace(execution=table).local_to_execution
    assert (rates * ~executed).sum() == pytest.approx((moved * ~standing.local).sum())


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_partial_is_the_best_of_all_placements_for_its_table(seed: int, rules: bool) -> None:
    """With a table that it keeps, no placement of experts has a smaller total; it says optimal."""
    instance, every = tiny(seed, rules=rules)
    rng = np.random.default_rng(seed)
    servers = instance.num_servers
    owner = placed(instance, every[0]).server_of_gpu
    for _ in range(3):
        table = a_table(rng, instance)
        standing = placed(instance, every[rng.integers(len(every))]).replace(execution=table)
        call_s, load_gbs = costs(rng, instance, equal=True)
        rates = instance.activations
        found = review(Policy("partial", HORIZON_S), standing, rates, instance, call_s, load_gbs)
        least = np.inf
        for on_gpu in every:
            local = np.stack([on_gpu[owner == n].any(axis=0) for n in range(servers)])
            loads_s = (on_gpu & ~standing.on_gpu).sum(axis=(1, 2)) * 100 / (load_gbs * 1e9)
            total = remote_s(rates, local, table, call_s, HORIZON_S) + loads_s.sum()
            least = min(least, total)
        assert adopted_s(found) == pytest.approx(least, rel=1e-9)
        if found.target is not None:
            assert found.target.plan.termination == "optimal"
            assert (found.target.execution_table == table).all()


@pytest.mark.parametrize("cost", ["sum", "max"])
@pytest.mark.parametrize("solver", ["prism", "exact+paths"])
def test_partial_keeps_the_table_where_costs_are_not_linear(solver: str, cost: Any) -> None:
    """Whatever candidates it compares: the table stays, and the total is never above staying."""
    rng = np.random.default_rng(5)
    instance, standing = medium(rng)
    standing = standing.replace(execution=a_table(rng, instance), execute_at_home=())
    call_s, load_gbs = costs(rng, instance, equal=False)
    policy = Policy("partial", 1e3, cost, solver)
    found = review(policy, standing, instance.activations, instance, call_s, load_gbs)
    assert found.target is not None
    assert (found.target.execution_table == standing.execution_table).all()
    assert adopted_s(found) < found.before_s
    assert violations(found.target, instance=instance) == []


def reviewed(
    policy: Policy, plan: str, **changes: Any
) -> tuple[Review, Placement, Instance, np.ndarray]:
    """A review of a plan for the small cluster after tasks x and y have changed places."""
    trace = small_trace()
    cluster = small_cluster(('name = "small"', 'name = "c"'))
    cluster = dataclasses.replace(
        cluster, servers=tuple(dataclasses.replace(s, **changes) for s in cluster.servers)
    )
    instance = Instance.build(trace, cluster)
    current = solve(instance, plan)
    rates = instance.activations[[1, 0, 2]]
    found = review(
        policy, current, rates, instance, call_seconds(cluster, SPEC), gpu_load_gbs(cluster)
    )
    return found, current, instance, rates


@pytest.mark.parametrize("plan", ["exact", "layer-partition+paths"])
@pytest.mark.parametrize("solver", ["exact", "prism+paths", "layer-partition+paths"])
def test_prism_counts_calls_and_messages(plan: str, solver: str) -> None:
    """C of both placements: calls from where layers execute, plus messages of the arrivals."""
    found, current, instance, rates = reviewed(Policy("prism", 30.0, solver=solver), plan)
    assert instance.cluster is not None
    assert instance.trace is not None
    call_s = call_seconds(instance.cluster, SPEC)
    behind = requests_behind(rates, instance.cluster, instance.trace, current.on_gpu)
    recent = instance.replace(activations=rates, cluster=behind.cluster)
    candidate = solve(recent, solver)

    def seconds(placement: Placement) -> float:
        calls = remote_s(rates, placement.local, placement.execution_table, call_s, 30.0)
        return calls + behind.messages_s(placement.execution, 30.0)

    assert found.before_s == pytest.approx(seconds(current), rel=1e-9)
    assert found.after_s == pytest.approx(seconds(candidate), rel=1e-9)
    moves = found.after_s + found.cost_s < found.before_s
    assert (found.decision == "move") == moves
    if found.target is not None:
        assert (found.target.execution_table == candidate.execution_table).all()


def test_tables_come_and_go() -> None:
    """Among those cases are moves to a table and from one; a table for what is asked for now.

    The same solver at the old rates finds its own plan again, and stays.
    """
    to_table, *_ = reviewed(Policy("prism", 30.0, solver="layer-partition+paths"), "exact")
    assert to_table.target is not None
    assert to_table.target.execution is not None
    assert to_table.target.plan.solver == "layer-partition+paths"
    from_table, current, *_ = reviewed(
        Policy("prism", 1e5, solver="exact"), "prism+paths", concurrency=1
    )
    assert (from_table.target or current).plan.solver in ("exact", "prism+paths")
    trace, cluster = small_trace(), small_cluster()
    instance = Instance.build(trace, cluster)
    standing = solve(instance, "layer-partition+paths")
    again = review(
        Policy("prism", 30.0, solver="layer-partition+paths"), standing, instance.activations,
        instance, call_seconds(cluster, SPEC), gpu_load_gbs(cluster),
    )  # fmt: skip
    assert again.decision == "stay"


def test_reviews_that_count_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """C is the requests of the horizon times their expected latency, table included.

    Against the measure of a problem that is made here; a move pays for its loads, and the price of
    loads decides how much is loaded.
    """
    monkeypatch.setattr("prism_plan.solvers.execution.queues_matter", lambda *_: False)
    policy = Policy("prism", 100.0, solver="latency")
    found, current, instance, rates = reviewed(policy, "layer-partition+paths")
    assert current.execution is not None
    assert found.target is not None
    assert found.target.plan.solver == "latency"
    assert instance.cluster is not None
    assert instance.trace is not None
    recent = requests_behind(rates, instance.cluster, instance.trace, current.on_gpu)
    problem = LatencyProblem(instance, recent.cluster, instance.trace, 0)
    by_home = recent.arrivals * 100.0
    for plan, counted_s in ((current, found.before_s), (found.target, found.after_s)):
        assert counted_s == pytest.approx(float(by_home @ problem.expected(plan).of_home))
    assert found.saving_s > found.cost_s > 0
    # hardly a request comes before the next review: no load pays
    short, *_ = reviewed(dataclasses.replace(policy, horizon_s=1e-3), "layer-partition+paths")
    assert (short.target or current).on_gpu.tolist() == current.on_gpu.tolist()
    costs = (call_seconds(instance.cluster, SPEC), gpu_load_gbs(instance.cluster))
    moved = [
        review(policy, current, rates, instance, costs[0], costs[1] * speed).moved_experts
        for speed in (1e-6, 1e-4, 1.0)
    ]
    assert moved[0] == 0 < moved[2]
    assert moved == sorted(moved)


def test_calls_that_no_task_makes() -> None:
    """There is nothing to plan a table for: the review stays."""
    trace, cluster = small_trace(), small_cluster()
    counts = trace.counts.copy()
    counts[:, 0, 5] = 0
    instance = Instance.build(dataclasses.replace(trace, counts=counts), cluster)
    current = solve(instance, "exact")
    rates = np.zeros_like(instance.activations)
    rates[:, 0, 5] = 9.0
    found = review(
        Policy("prism", 1e9, solver="exact+paths"), current, rates, instance,
        call_seconds(cluster, SPEC), gpu_load_gbs(cluster),
    )  # fmt: skip
    assert found.before_s > 0
    assert (found.decision, found.target) == ("stay", None)


def test_capacities_are_those_of_each_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The running placement is checked beside its own table's caches, the target beside its own."""
    monkeypatch.setattr("prism_plan.solvers.execution.queues_matter", lambda *_: False)
    spec = dataclasses.replace(SPEC, kv_bytes_per_token=100_000)
    trace = dataclasses.replace(small_trace(), model=spec)
    text = ("slots = 11", "memory_gb = 0.018"), ("slots = 8", "memory_gb = 0.015"), (
        "slots = 3", "memory_gb = 0.003",
    )  # fmt: skip
    cluster = small_cluster(*text)
    servers = tuple(dataclasses.replace(s, kv_tokens=20) for s in cluster.servers)
    cluster = dataclasses.replace(cluster, servers=servers)
    instance = Instance.build(trace, cluster)
    current = solve(instance, "layer-partition+paths")
    assert current.execution is not None
    for policy in (Policy("partial", 30.0), Policy("prism", 30.0, solver="prism+paths")):
        found = review(
            policy, current, instance.activations[[1, 0, 2]], instance,
            call_seconds(cluster, spec), gpu_load_gbs(cluster),
        )  # fmt: skip
        target = found.target or current
        limits = instance.with_execution(target.execution, spec)
        assert violations(target, instance=limits) == []
    # more than its caches leave
    full = current.replace(
        on_gpu=np.ones_like(current.on_gpu), gpu_capacity=((99,), (99, 99), (99,))
    )
    with pytest.raises(InputError, match="current placement: server 'a'"):
        review(
            Policy("partial", 30.0), full, instance.activations, instance,
            call_seconds(cluster, spec), gpu_load_gbs(cluster),
        )  # fmt: skip


def test_what_is_refused() -> None:
    """A solver of whole layers, with the reason; an instance without links for a table."""
    with pytest.raises(InputError, match="'latency\\+paths' plans by itself"):
        Policy("prism", 10.0, solver="latency+paths")
    for name in ("pipeline", "pipeline+paths"):
        with pytest.raises(InputError, match="whichever of their experts are called"):
            Policy("prism", 10.0, solver=name)
    with pytest.raises(InputError, match=r"solver: 'exakt\+paths', did you mean 'exact'"):
        Policy("prism", 10.0, solver="exakt+paths")
    rng = np.random.default_rng(1)
    instance, standing = medium(rng)
    with pytest.raises(UnsupportedFeature, match="links of a cluster"):
        review(
            Policy("prism", 10.0, solver="exact+paths"), standing, instance.activations, instance,
            np.ones(4), np.ones(6),
        )  # fmt: skip
