"""The flow against other people's solvers, and its certificate."""

from __future__ import annotations

import math
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import linprog
from scipy.sparse import coo_array

from prism_plan.instance import Instance
from prism_plan.jit import kernel
from prism_plan.model_spec import ModelShape
from prism_plan.placement_check import violations
from prism_plan.solvers import Options, flow, solve
from prism_plan.solvers.certificate import Prices, value_bound
from prism_plan.solvers.exact import best_experts, solve_flow


def medium(seed: int, *, tasks: int = 3, rules: bool = False, integer: bool = False) -> Instance:
    """Seven servers that share a few tasks, 5 layers of 12 experts, slots scarce to ample."""
    rng = np.random.default_rng(seed)
    servers, layers, experts = 7, 5, 12
    by_task = rng.gamma(0.5, size=(tasks, layers, experts))
    activations = by_task[np.arange(servers) % tasks] * rng.choice([1.0, 1.0, 3.0], (servers, 1, 1))
    if integer:
        activations = np.rint(activations * 100)
    slots = rng.integers(6, 22, servers)
    while slots.sum() < 2 * layers * experts + 15:
        slots[rng.integers(servers)] += 1
    model = ModelShape("medium", tuple(range(1, layers + 1)), experts, 2, 100)
    names = tuple(f"s{n}" for n in range(servers))
    instance = Instance(model, names, activations, tuple((int(s),) for s in slots))
    if not rules:
        return instance
    marks = rng.random(activations.shape)
    return instance.replace(
        pinned=tuple(tuple(map(int, t)) for t in np.argwhere(marks < 0.01)),
        forbidden=tuple(tuple(map(int, t)) for t in np.argwhere(marks > 0.95)),
        layer_caps=(7, None, 6, None, 5, None, None),
    )


def networkx_objective(instance: Instance) -> float:
    """Remote calls of the optimum by network simplex; activations must be whole numbers."""
    servers, layers, experts = instance.activations.shape
    pinned, forbidden = instance.mask(instance.pinned), instance.mask(instance.forbidden)
    graph = nx.DiGraph()
    copies = instance.min_replicas
    total = int(instance.slots.sum())
    graph.add_node("source", demand=-total)
    graph.add_node("sink", demand=total - copies * layers * experts)
    for n in range(servers):
        graph.add_edge("source", n, capacity=int(instance.slots[n]))
        graph.add_edge(n, "sink", capacity=int(instance.slots[n]))  # slots left empty
        cap = instance.layer_caps[n]
        for layer in range(layers):
            graph.add_edge(n, ("held", n, layer), capacity=experts if cap is None else cap)
    for pair in np.ndindex(layers, experts):
        # copies that coverage wants stay at the expert, further ones flow on
        graph.add_node(("expert", *pair), demand=copies)
        graph.add_edge(("expert", *pair), "sink")
        for n in range(servers):
            if forbidden[(n, *pair)]:
                continue
            weight = -int(instance.activations[(n, *pair)])
            if pinned[(n, *pair)]:
                weight -= 10**9
            graph.add_edge(("held", n, pair[0]), ("expert", *pair), capacity=1, weight=weight)
    cost, _ = nx.network_simplex(graph)
    value = cost + 10**9 * len(instance.pinned)
    return float(instance.activations.sum() + value)


def scipy_objective(instance: Instance, value: np.ndarray) -> float:
    """Σ value·x of the optimum of the LP relaxation, by HiGHS through scipy."""
    servers, layers, experts = value.shape
    pairs = layers * experts
    index = np.arange(value.size).reshape(servers, pairs)
    rows, columns, values, right = [], [], [], []

    def constraint(variables: np.ndarray, sign: float, limit: float) -> None:
        rows.extend([len(right)] * variables.size)
        columns.extend(variables.ravel().tolist())
        values.extend([sign] * variables.size)
        right.append(limit)

    for n in range(servers):
        constraint(index[n], 1, float(instance.slots[n]))
        cap = instance.layer_caps[n]
        for layer in range(layers if cap is not None else 0):
            constraint(index[n].reshape(layers, experts)[layer], 1, float(cap or 0))
    for pair in range(pairs):
        constraint(index[:, pair], -1, -float(instance.min_replicas))
    lower = instance.mask(instance.pinned).ravel().astype(float)
    upper = 1.0 - instance.mask(instance.forbidden).ravel()
    matrix = coo_array((values, (rows, columns)), shape=(len(right), value.size))
    result = linprog(
        -value.ravel(), A_ub=matrix.tocsr(), b_ub=right, bounds=np.stack([lower, upper], axis=1)
    )
    assert result.status == 0, result.message
    return float(-result.fun)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_linear_program_of_scipy(seed: int, rules: bool, replicas: int) -> None:
    """The LP relaxation is integral: scipy's optimum over fractions is the flow's."""
    instance = medium(seed, rules=rules).replace(min_replicas=replicas)
    placement = solve(instance, "exact")
    held = float(instance.activations[placement.local].sum())
    assert held == pytest.approx(scipy_objective(instance, instance.activations), rel=1e-8)
    assert violations(placement, instance=instance) == []
    assert placement.plan.termination == "optimal"


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_equals_network_simplex_of_networkx(seed: int, rules: bool) -> None:
    """On whole-number activations the objective is networkx's to the last digit."""
    instance = medium(seed, rules=rules, integer=True)
    placement = solve(instance, "exact")
    remote = float(instance.activations[~placement.local].sum())
    assert remote == networkx_objective(instance)


@pytest.mark.parametrize("seed", range(6))
def test_values_below_zero(seed: int) -> None:
    """Where holding an expert costs more than it saves it is held only for coverage."""
    instance = medium(seed)
    value = instance.activations - 0.8
    local, prices, _ = solve_flow(instance, value)
    best = math.fsum(value[local])
    assert best == pytest.approx(scipy_objective(instance, value), rel=1e-8)
    assert value_bound(instance, value, prices) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rules", [False, True])
def test_the_certificate_is_checked_without_the_solver(seed: int, rules: bool) -> None:
    """The bound from prices meets the objective, so the placement is proven optimal."""
    instance = medium(seed, rules=rules)
    local, prices, _ = solve_flow(instance, instance.activations)
    bound = value_bound(instance, instance.activations, prices)
    assert bound == pytest.approx(math.fsum(instance.activations[local]), rel=1e-11)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), scale=st.floats(0, 10), rules=st.booleans())
def test_any_prices_give_a_bound(seed: int, scale: float, rules: bool) -> None:
    """Weak duality: random prices bound the optimum from above, however bad they are."""
    rng = np.random.default_rng(seed)
    instance = medium(1, rules=rules)
    servers, layers, experts = instance.activations.shape
    prices = Prices(
        slot=rng.random(servers) * scale,
        layer_cap=rng.random((servers, layers)) * scale,
        coverage=rng.random((layers, experts)) * scale,
    )
    best = math.fsum(instance.activations[solve(instance, "exact").local])
    assert value_bound(instance, instance.activations, prices) >= best - 1e-9


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_prices_that_bound_nothing_are_refused(wrong: float) -> None:
    """A negative or infinite price proves nothing."""
    instance = medium(0)
    prices = Prices(np.full(7, wrong), np.zeros((7, 5)), np.zeros((5, 12)))
    with pytest.raises(ValueError, match="finite and not negative"):
        value_bound(instance, instance.activations, prices)


def test_without_coverage_pressure_each_server_takes_its_best() -> None:
    """With two servers that hold everything, the others hold their C[n] most used experts."""
    rng = np.random.default_rng(0)
    activations = rng.random((4, 3, 8))
    model = ModelShape("m", (0, 1, 2), 8, 2, 1)
    instance = Instance(model, ("a", "b", "c", "d"), activations, ((24,), (24,), (5,), (9,)))
    local = solve(instance, "exact").local
    for n, slots in ((2, 5), (3, 9)):
        best = np.sort(np.argsort(-activations[n].ravel())[:slots])
        assert np.flatnonzero(local[n]).tolist() == best.tolist()


def test_free_slots_are_used() -> None:
    """Slots that save nothing still hold what others call most: less far to go, no cost."""
    activations = np.array([[[5.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]])
    model = ModelShape("m", (0,), 3, 1, 1)
    instance = Instance(model, ("busy", "idle"), activations, ((2,), (2,)))
    local = solve(instance, "exact").local
    assert local[0].tolist() == [[True, True, False]]
    assert local[1].tolist() == [[True, False, True]]


def test_a_price_keeps_experts_where_they_are() -> None:
    """Load prices from nothing to beyond every saving: fewer and fewer loads, down to none."""
    rng = np.random.default_rng(3)
    instance = medium(3)
    old = solve(instance.replace(activations=rng.gamma(0.5, size=instance.activations.shape)))
    loads = []
    for price in (0.0, 0.2, 1.0, 1e3):
        placement = solve(instance, "exact", Options(reference=old, load_price=price))
        loads.append(int((placement.local & ~old.local).sum()))
    assert loads == sorted(loads, reverse=True)
    assert loads[0] > loads[-1] == 0


@pytest.mark.parametrize("seed", range(30))
def test_a_layer_cap_beyond_the_experts_bounds_nothing(seed: int) -> None:
    """Also where servers hold whole layers, the plan is proven optimal, as good as without caps."""
    rng = np.random.default_rng(seed)
    model = ModelShape("whole layers", (0, 1, 2), 4, 1, 1)
    free = Instance(model, ("a", "b"), rng.gamma(0.5, size=(2, 3, 4)), ((9,), (8,)))
    capped = solve(free.replace(layer_caps=(50, 50)), "exact").plan
    assert capped.termination == "optimal"
    assert capped.remote_share == pytest.approx(solve(free, "exact").plan.remote_share, abs=1e-12)
    assert capped.bound == pytest.approx(capped.remote_share, abs=1e-9)


def test_scale_of_activations_does_not_matter() -> None:
    """The same plan comes out when all activations are tiny or huge."""
    instance = medium(2)
    plan = solve(instance, "exact").local
    for factor in (2.0**-60, 2.0**60):
        other = solve(instance.replace(activations=instance.activations * factor), "exact")
        assert (other.local == plan).all()
        assert other.plan.termination == "optimal"


@settings(max_examples=100)
@given(
    weight=arrays.arrays(
        np.int64,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=24),
        elements=st.integers(-2, 3),
    ),
    data=st.data(),
)
def test_the_best_experts_are_those_of_a_stable_sort(
    weight: np.ndarray, data: st.DataObject
) -> None:
    """Of equal weights the lowest index is chosen, and comes first."""
    most = data.draw(st.integers(0, weight.shape[1]))
    order = np.argsort(-weight, axis=1, kind="stable")
    assert best_experts(weight, most).tolist() == order[:, :most].tolist()


@kernel
def _pop_all(key: Any, heap: Any, place: Any, lowered: Any, order: Any) -> None:
    """Put all nodes on the heap, lower some of their keys, and write down the order of popping."""
    for v in range(len(key)):
        flow._rise(heap, place, key, v, v)
    for v in range(len(key)):
        if lowered[v] < key[v]:
            key[v] = lowered[v]
            flow._rise(heap, place, key, v, place[v])
    for i in range(len(key)):
        order[i] = flow._pop(heap, place, key, len(key) - i)


@settings(max_examples=100)
@given(keys=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60))
def test_nodes_leave_the_heap_by_key_and_then_by_number(keys: list[tuple[int, int]]) -> None:
    """Ties go to the lowest node, also after keys were lowered: the order is total."""
    key, lowered = np.array(keys, np.int64).T.copy()
    heap, place, order = np.full((3, len(key)), -1, np.int64)
    _pop_all(key, heap, place, lowered, order)
    assert (
        order.tolist() == np.lexsort((np.arange(len(key)), np.minimum(*np.array(keys).T))).tolist()
    )
