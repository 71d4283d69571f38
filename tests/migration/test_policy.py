"""Migration policies against every placement there is, against each other, and over time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError, UnsupportedFeature
from prism_plan.instance import MIN_CALLS, Instance
from prism_plan.migration.cost import communication_s, migration_s
from prism_plan.migration.policy import Policy, Review, review
from prism_plan.migration.statistics import Cumulative, StatisticsOptions, Window
from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement, SolveReport, server_of_gpu
from prism_plan.placement_check import violations
from prism_plan.solvers import solve
from tests.solvers.instances import random_instance

BITS = 13
HORIZON_S = 10.0


# -------------------------------------------------------------------------------------- instances


def placed(instance: Instance, on_gpu: np.ndarray) -> Placement:
    """A placement by hand."""
    return Placement(
        instance.model, instance.servers, instance.gpu_capacity, on_gpu, SolveReport("by hand")
    )


def gpus_of(instance: Instance) -> int:
    """G, the GPUs of all servers."""
    return sum(len(gpus) for gpus in instance.gpu_capacity)


def every_placement(instance: Instance) -> np.ndarray:
    """All feasible placements, bool [P, G, L, E], no expert twice on a server."""
    servers, layers, experts = instance.activations.shape
    owner = server_of_gpu(instance.gpu_capacity)
    gpus, pairs = len(owner), layers * experts
    codes = np.arange(2 ** (gpus * pairs))[:, None]
    on = ((codes >> np.arange(gpus * pairs)) & 1).astype(bool).reshape(-1, gpus, layers, experts)
    room = [slots for server in instance.gpu_capacity for slots in server]
    copies = np.stack([on[:, owner == n].sum(axis=1) for n in range(servers)], axis=1)
    local = copies > 0
    good = (on.sum(axis=(2, 3)) <= room).all(axis=1) & (copies <= 1).all(axis=(1, 2, 3))
    good &= (local.sum(axis=1) >= instance.min_replicas).all(axis=(1, 2))
    good &= local[:, instance.mask(instance.pinned)].all(axis=1)
    good &= ~local[:, instance.mask(instance.forbidden)].any(axis=1)
    for n, cap in enumerate(instance.layer_caps):
        if cap is not None:
            good &= (local[:, n].sum(axis=2) <= cap).all(axis=1)
    return on[good]


def tiny(seed: int, *, rules: bool = False) -> tuple[Instance, np.ndarray]:
    """A feasible instance of at most BITS (GPU, expert) pairs, and all of its placements."""
    rng = np.random.default_rng(seed)
    while True:
        instance = random_instance(rng, 9, rules=rules)
        if gpus_of(instance) * instance.model.num_pairs > BITS:
            continue
        every = every_placement(instance)
        if len(every) > 1:
            return instance, every


def medium(rng: np.random.Generator, *, rules: bool = False) -> tuple[Instance, Placement]:
    """Four servers, two of them of two GPUs, and where their experts stood for other calls."""
    shape = (4, 3, 8)
    rates = rng.gamma(0.4, size=(2, *shape)) * (rng.random((2, *shape)) < 0.8)
    model = ModelShape("medium", (1, 2, 5), 8, 2, 100)
    capacity = ((9,), (4, 5), (3, 8), (7,))
    instance = Instance(model, ("a", "b", "c", "d"), rates[0], capacity)
    if rules:
        instance = instance.replace(
            pinned=((0, 0, 3), (2, 1, 1)), forbidden=((1, 2, 2),), layer_caps=(None, 5, None, 4)
        )
    standing = solve(instance.replace(activations=rates[1]), "exact")
    return instance, standing


def costs(rng: np.random.Generator, instance: Instance, *, equal: bool) -> tuple[Any, Any]:
    """Seconds of a call of each server, and load bandwidths at which 100 bytes take a while."""
    call_s = rng.uniform(0.01, 0.3, instance.num_servers)
    owner = server_of_gpu(instance.gpu_capacity)
    seconds = 10.0 ** rng.uniform(-2, 1, instance.num_servers if equal else len(owner))
    return call_s, 1e-7 / (seconds[owner] if equal else seconds)


def total_s(
    policy: Policy, standing: Placement, target: Placement, rates: Any, call_s: Any, load_gbs: Any
) -> float:
    """C(P') + T_mig, from the placements."""
    loads = target.on_gpu & ~standing.on_gpu
    sizes = target.model.expert_bytes_by_layer
    return communication_s(rates, target.local, call_s, policy.horizon_s) + migration_s(
        loads, sizes, load_gbs, policy.cost
    )


def adopted_s(found: Review) -> float:
    """The seconds that a review's decision costs."""
    return found.after_s + found.cost_s if found.decision == "move" else found.before_s


# -------------------------------------------------------------------------------- partial is best


def least_total_s(
    policy: Policy, every: np.ndarray, standing: np.ndarray, case: tuple[Instance, Any, Any]
) -> float:
    """The least C(P') + T_mig of all placements, staying included."""
    instance, call_s, load_gbs = case
    owner = server_of_gpu(instance.gpu_capacity)
    local = np.stack(
        [every[:, owner == n].any(axis=1) for n in range(instance.num_servers)], axis=1
    )
    remote = (~local * instance.activations).sum(axis=(2, 3)) @ call_s * policy.horizon_s
    each = (every & ~standing).sum(axis=(2, 3)) * 100 / (load_gbs * 1e9)
    return float((remote + (each.sum(axis=1) if policy.cost == "sum" else each.max(axis=1))).min())


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_partial_is_the_best_of_all_placements(seed: int, rules: bool) -> None:
    """Where T_mig is linear, no placement that the instance allows has a smaller total."""
    instance, every = tiny(seed, rules=rules)
    rng = np.random.default_rng(seed)
    policy = Policy("partial", HORIZON_S)
    for _ in range(5):
        standing = every[rng.integers(len(every))]
        call_s, load_gbs = costs(rng, instance, equal=True)
        found = review(
            policy, placed(instance, standing), instance.activations, instance, call_s, load_gbs
        )
        least = least_total_s(policy, every, standing, (instance, call_s, load_gbs))
        assert adopted_s(found) == pytest.approx(least, rel=1e-9)
        if found.target is not None:
            assert found.target.plan.termination == "optimal"


@pytest.mark.parametrize("cost", ["sum", "max"])
@pytest.mark.parametrize("seed", range(20))
def test_partial_is_near_the_best_where_costs_are_not_linear(seed: int, cost: Any) -> None:
    """With unequal GPUs or loads side by side: never above staying, and near the best."""
    instance, every = tiny(seed)
    rng = np.random.default_rng(seed)
    policy = Policy("partial", HORIZON_S, cost)
    for _ in range(5):
        standing = every[rng.integers(len(every))]
        call_s, load_gbs = costs(rng, instance, equal=False)
        found = review(
            policy, placed(instance, standing), instance.activations, instance, call_s, load_gbs
        )
        least = least_total_s(policy, every, standing, (instance, call_s, load_gbs))
        assert least <= adopted_s(found) * (1 + 1e-9)
        assert adopted_s(found) <= min(found.before_s, least + 0.2 * found.before_s)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    cost=st.sampled_from(["sum", "max"]),
    equal=st.booleans(),
    solver=st.sampled_from(["prism", "exact", "redundance", "layer-partition"]),
)
def test_partial_is_never_worse_than_prism_or_staying(
    seed: int, cost: Any, equal: bool, solver: str
) -> None:
    """Under the same cost, for both forms of it, whatever solver plans for `prism`."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng)
    call_s, load_gbs = costs(rng, instance, equal=equal)
    rates = instance.activations
    policy = Policy("partial", HORIZON_S, cost, solver, seed=seed)
    partial = review(policy, standing, rates, instance, call_s, load_gbs)
    whole = dataclasses.replace(policy, kind="prism")
    prism = review(whole, standing, rates, instance, call_s, load_gbs)
    assert adopted_s(partial) <= adopted_s(prism) * (1 + 1e-9)
    assert adopted_s(partial) <= partial.before_s == prism.before_s


@pytest.mark.parametrize("price", ["dear", "free"])
@pytest.mark.parametrize("seed", range(5))
def test_the_ends_of_the_price_of_a_load(seed: int, price: str) -> None:
    """Loads that cost more than all calls keep everything; free ones reach the optimum."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng)
    call_s = np.full(4, 0.1)
    load_gbs = np.full(6, 1e-15 if price == "dear" else 1e15)
    found = review(
        Policy("partial", HORIZON_S), standing, instance.activations, instance, call_s, load_gbs
    )
    if price == "dear":
        assert (found.decision, found.target, found.moved_experts) == ("stay", None, 0)
        return
    assert found.target is not None
    best = solve(instance, "exact").plan.remote_share
    assert found.target.plan.remote_share == pytest.approx(best, rel=1e-9)


def test_part_of_a_plan_may_pay_where_all_of_it_does_not() -> None:
    """One load saves much, the rest little: all of it is too dear, the one is not."""
    experts = 12
    rates = np.zeros((2, 1, experts))
    rates[0, 0, 6] = 5.0  # stands on b alone
    rates[0, 0, 7:] = 0.02
    rates[0, 0, :6] = 0.01
    rates[1, 0, :6] = 0.02
    rates[1, 0, 6:] = 0.01
    model = ModelShape("m", (0,), experts, 2, 100)
    instance = Instance(model, ("a", "b"), rates, ((6,), (7,)))
    on_gpu = np.zeros((2, 1, experts), bool)
    on_gpu[0, 0, :6] = on_gpu[1, 0, 6:] = True
    on_gpu[1, 0, 0] = True
    standing = placed(instance, on_gpu)
    call_s, load_gbs = np.full(2, 0.1), np.full(2, 1e-7)  # a load takes a second
    arguments = (standing, rates, instance, call_s, load_gbs)
    whole = review(Policy("prism", HORIZON_S), *arguments)
    part = review(Policy("partial", HORIZON_S), *arguments)
    assert whole.decision == "stay"
    assert whole.cost_s > whole.saving_s > 0
    assert part.decision == "move"
    assert part.target is not None
    assert np.argwhere(part.target.local & ~standing.local).tolist() == [[0, 0, 6]]
    assert np.argwhere(standing.local & ~part.target.local).tolist() == [[0, 0, 0]]
    assert (part.moved_experts, part.moved_bytes) == (1, 100)
    assert (part.cost_s, part.saving_s) == pytest.approx((1.0, (5.0 - 0.01) * 0.1 * HORIZON_S))


@pytest.mark.parametrize(("slow_gbs", "loaded_on"), [(1e-9, 1), (0.5e-7, 0)])
def test_loads_go_to_the_faster_gpu_if_that_pays(slow_gbs: float, loaded_on: int) -> None:
    """A free slot on a GPU that loads very slowly is left, and one on a fast GPU is made."""
    rates = np.array([[[5.0, 6.0, 9.0]], [[9.0, 9.0, 9.0]]])
    instance = Instance(ModelShape("m", (0,), 3, 1, 100), ("a", "b"), rates, ((2, 1), (3,)))
    on_gpu = np.zeros((3, 1, 3), bool)
    on_gpu[0, 0, 0] = on_gpu[1, 0, 1] = on_gpu[2] = True
    found = review(
        Policy("partial", HORIZON_S),
        placed(instance, on_gpu),
        rates,
        instance,
        np.full(2, 0.1),
        np.array([slow_gbs, 1e-7, 1e-7]),
    )
    assert found.target is not None
    assert found.moved_experts == 1
    assert found.target.on_gpu[loaded_on, 0, 2]
    assert found.cost_s == pytest.approx((2.0, 1.0)[loaded_on])


def test_experts_without_calls_stay_where_there_is_room() -> None:
    """A move drops only what must make room: what nobody calls stands on in free slots."""
    rates = np.zeros((2, 1, 6))
    rates[0, 0, 5] = 9.0
    model = ModelShape("m", (0,), 6, 2, 100)
    instance = Instance(model, ("a", "b"), rates, ((6,), (6,)))
    on_gpu = np.zeros((2, 1, 6), bool)
    on_gpu[0, 0, :5] = on_gpu[1] = True
    found = review(
        Policy("partial", HORIZON_S),
        placed(instance, on_gpu),
        rates,
        instance,
        np.full(2, 0.1),
        np.full(2, 1e-7),
    )
    assert found.target is not None
    assert found.target.on_gpu.all()
    assert found.moved_experts == 1


@pytest.mark.parametrize("cost", ["sum", "max"])
@pytest.mark.parametrize("seed", range(15))
def test_drops_make_room(seed: int, cost: Any) -> None:
    """No server drops an expert and is left with a free slot for it."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng)
    rates = instance.activations * (rng.random(instance.activations.shape) < 0.3)
    call_s, load_gbs = costs(rng, instance, equal=True)
    found = review(Policy("partial", HORIZON_S, cost), standing, rates, instance, call_s, load_gbs)
    target = found.target or standing
    dropped = (standing.local & ~target.local).any(axis=(1, 2))
    free = instance.slots - target.local.sum(axis=(1, 2))
    assert not (dropped & (free > 0)).any()


# ------------------------------------------------------------------------------- the other policies


@pytest.mark.parametrize("cost", ["sum", "max"])
@pytest.mark.parametrize("horizon_s", [0.01, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("seed", range(5))
def test_prism_adopts_by_its_inequality(seed: int, horizon_s: float, cost: Any) -> None:
    """It moves iff C(P') + T_mig < C(P), all three computed anew from the solver's candidate."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng)
    call_s, load_gbs = costs(rng, instance, equal=False)
    policy = Policy("prism", horizon_s, cost)
    rates = instance.activations
    found = review(policy, standing, rates, instance, call_s, load_gbs)
    before_s = communication_s(rates, standing.local, call_s, horizon_s)
    local = solve(instance, "prism").local
    assert found.before_s == before_s
    assert found.after_s == communication_s(rates, local, call_s, horizon_s)
    assert found.saving_s == before_s - found.after_s
    assert (found.decision == "move") == (found.after_s + found.cost_s < before_s)
    if found.target is not None:
        assert (found.target.local == local).all()
        assert total_s(policy, standing, found.target, rates, call_s, load_gbs) == (
            found.after_s + found.cost_s
        )


def test_prism_moves_and_stays_among_those_cases() -> None:
    """The inequality above was seen from both sides."""
    decisions = set()
    for horizon_s in (0.01, 1000.0):
        rng = np.random.default_rng(0)
        instance, standing = medium(rng)
        found = review(
            Policy("prism", horizon_s),
            standing,
            instance.activations,
            instance,
            *costs(rng, instance, equal=False),
        )
        decisions.add(found.decision)
    assert decisions == {"move", "stay"}


@pytest.mark.parametrize("kind", ["prism", "partial"])
@pytest.mark.parametrize("seed", range(10))
def test_nothing_shifts_between_the_gpus_of_a_server(seed: int, kind: Any) -> None:
    """An expert that stays on its server stays on its GPU, so it is neither paid nor loaded."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng)
    call_s = np.full(4, 1.0)
    found = review(
        Policy(kind, 1e3), standing, instance.activations, instance, call_s, np.full(6, 1e-6)
    )
    assert found.target is not None
    kept = (standing.local & found.target.local)[standing.server_of_gpu]
    assert (standing.on_gpu & kept == found.target.on_gpu & kept).all()


@pytest.mark.parametrize("kind", ["prism", "partial"])
def test_moved_bytes_on_two_gpus(kind: Any) -> None:
    """Two experts newly on a server, one on each of its GPUs: two loads of 100 bytes."""
    rates = np.array([[[1.0, 1.0, 9.0, 9.0]], [[9.0, 9.0, 1.0, 1.0]]])
    model = ModelShape("m", (3,), 4, 1, 100)
    instance = Instance(model, ("a", "b"), rates, ((1, 1), (2,)))
    on_gpu = np.zeros((3, 1, 4), bool)
    on_gpu[0, 0, 0] = on_gpu[1, 0, 1] = on_gpu[2, 0, 2:] = True
    load_gbs = np.array([1e-7, 1e-7, 0.5e-7])
    arguments = (placed(instance, on_gpu), rates, instance, np.full(2, 0.1), load_gbs)
    found = review(Policy(kind, 100.0), *arguments)
    assert found.decision == "move"
    assert (found.moved_experts, found.moved_bytes) == (4, 400)
    assert found.cost_s == pytest.approx(1 + 1 + 2 + 2)
    assert found.saving_s == pytest.approx((36 - 4) * 0.1 * 100)
    slowest = review(Policy(kind, 100.0, "max"), *arguments)
    assert slowest.cost_s == pytest.approx(2 + 2)


@pytest.mark.parametrize(
    ("kind", "rules"), [("prism", False), ("partial", False), ("partial", True)]
)
@pytest.mark.parametrize("seed", range(8))
def test_targets_cover_and_fit(seed: int, rules: bool, kind: Any) -> None:
    """A target keeps coverage, memory, pins, forbidden experts, caps and replicas."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng, rules=rules)
    found = review(
        Policy(kind, 1e3), standing, instance.activations, instance, np.ones(4), np.full(6, 1e-6)
    )
    assert found.decision == "move"
    assert found.target is not None
    assert violations(found.target, instance=instance) == []
    assert found.target.inputs == standing.inputs


@pytest.mark.parametrize("seed", range(5))
def test_never_stays(seed: int) -> None:
    """However much a move would save; the seconds of staying are told."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng)
    rates = instance.activations
    found = review(Policy("never", 1e6), standing, rates, instance, np.ones(4), np.full(6, 1e3))
    before_s = communication_s(rates, standing.local, np.ones(4), 1e6)
    assert found == Review("stay", None, 0, 0, 0.0, 0.0, before_s, before_s)


# --------------------------------------------------------------------------------------- over time


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["prism", "partial"]))
def test_a_stable_workload_stays_after_a_move(seed: int, kind: Any) -> None:
    """The same rates again after a move: nothing more to gain, no flapping."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng)
    call_s, load_gbs = costs(rng, instance, equal=True)
    arguments = (instance.activations, instance, call_s, load_gbs)
    first = review(Policy(kind, 100.0), standing, *arguments)
    assume(first.target is not None)
    assert first.target is not None
    second = review(Policy(kind, 100.0), first.target, *arguments)
    assert second.decision == "stay"


@pytest.mark.parametrize("seed", range(10))
def test_moves_end_where_costs_are_not_linear(seed: int) -> None:
    """Every move lowers the seconds of remote calls, so under constant rates moves end."""
    rng = np.random.default_rng(seed)
    instance, standing = medium(rng)
    call_s, load_gbs = costs(rng, instance, equal=False)
    policy = Policy("partial", 100.0, "max")
    seen = []
    for _ in range(10):
        found = review(policy, standing, instance.activations, instance, call_s, load_gbs)
        seen.append(found.before_s)
        if found.target is None:
            break
        standing = found.target
    assert found.decision == "stay"
    assert seen == sorted(set(seen), reverse=True)


def after_a_shift(
    counting: StatisticsOptions, policy: Policy, seed: int
) -> tuple[float, list[int]]:
    """Two servers swap tasks after 20 periods: seconds paid in the next 30, reviews that move."""
    old = np.random.default_rng(seed).gamma(0.4, size=(2, 3, 8)).round(3)
    new = old[::-1].copy()
    model = ModelShape("m", (1, 2, 5), 8, 2, 100)
    instance = Instance(model, ("a", "b"), old, ((15,), (15,)))
    standing = solve(instance, "prism")
    call_s, load_gbs = np.full(2, 0.01), np.full(2, 2e-7)
    statistics = counting.start((2, 3, 8))
    for _ in range(20):
        statistics.add(np.rint(old * 300).astype(int), 300.0)
    paid_s, moves = 0.0, []
    for number in range(1, 31):
        statistics.add(np.rint(new * 300).astype(int), 300.0)
        found = review(policy, standing, statistics.rates(), instance, call_s, load_gbs)
        if found.target is not None:
            standing = found.target
            statistics.moved()
            paid_s += found.cost_s
            moves.append(number)
        paid_s += communication_s(new, standing.local, call_s, 300.0)
    return paid_s, moves


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_old_data_delays_moves(seed: int) -> None:
    """After one shift the paper's policy needs more reviews, and seconds, with lingering data."""
    policy = Policy("prism", 300.0)
    window_s, window = after_a_shift(Window(150.0), policy, seed)
    cumulative_s, cumulative = after_a_shift(Cumulative(), policy, seed)
    assert window[0] == 1
    assert cumulative[0] > window[-1]
    assert cumulative[-1] >= 2 * window[-1]
    assert cumulative_s > 1.5 * window_s


@pytest.mark.parametrize("counting", [Window(150.0), Cumulative()])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_partial_moves_sooner_than_prism(seed: int, counting: StatisticsOptions) -> None:
    """It needs not wait until a whole new plan pays: over a shift it pays fewer seconds."""
    prism_s, _ = after_a_shift(counting, Policy("prism", 300.0), seed)
    partial_s, _ = after_a_shift(counting, Policy("partial", 300.0), seed)
    assert partial_s < prism_s


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", ["never", "prism", "partial"])
def test_no_calls_yet(kind: Any) -> None:
    """Rates of zero are no reason to move, whatever a solver would make of them."""
    instance, standing = medium(np.random.default_rng(0))
    rates = np.zeros((4, 3, 8))
    found = review(Policy(kind, 10.0), standing, rates, instance, np.ones(4), np.ones(6))
    assert found == Review("stay", None, 0, 0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", ["never", "prism", "partial"])
def test_one_server_has_nothing_to_move(kind: Any) -> None:
    """Where everything is local nothing can be saved."""
    model = ModelShape("m", (0,), 4, 1, 100)
    instance = Instance(model, ("a",), np.ones((1, 1, 4)), ((2, 3),))
    on_gpu = np.zeros((2, 1, 4), bool)
    on_gpu[0, 0, :2] = on_gpu[1, 0, 2:] = True
    found = review(
        Policy(kind, 10.0),
        placed(instance, on_gpu),
        instance.activations,
        instance,
        np.zeros(1),
        np.ones(2),
    )
    assert (found.decision, found.before_s) == ("stay", 0.0)


@pytest.mark.parametrize("kind", ["prism", "partial"])
def test_faded_rates_are_planned_with(kind: Any) -> None:
    """Counts that a window has nearly forgotten count as none, rather than being refused."""
    instance, standing = medium(np.random.default_rng(1))
    rates = instance.activations.copy()
    rates[:, 0] = 0.0
    arguments = (instance, np.ones(4), np.full(6, 1e-6))
    clean = review(Policy(kind, 100.0), standing, rates, *arguments)
    rates[:, 0] = MIN_CALLS / 1e10
    faded = review(Policy(kind, 100.0), standing, rates, *arguments)
    assert clean.target is not None
    assert faded.target is not None
    assert (clean.target.on_gpu == faded.target.on_gpu).all()


@pytest.mark.parametrize("wrong", [-1.0, -1e-200, math.nan, math.inf])
def test_rates_that_are_none(wrong: float) -> None:
    """A negative or endless rate is an error, not a plan."""
    instance, standing = medium(np.random.default_rng(1))
    rates = instance.activations.copy()
    rates[1, 2, 3] = wrong
    with pytest.raises(InputError, match="server 'b' layer 5 expert 3"):
        review(Policy("partial", 9.0), standing, rates, instance, np.ones(4), np.ones(6))


@pytest.mark.parametrize("kind", ["never", "prism", "partial"])
def test_a_standing_placement_over_its_memory(kind: Any) -> None:
    """It is refused with what is wrong, and where."""
    instance, standing = medium(np.random.default_rng(1))
    small = instance.replace(gpu_capacity=((9,), (4, 5), (3, 8), (2,)))
    with pytest.raises(InputError, match=r"current placement: server 'd' gpu\[0\] holds 7 slots"):
        review(Policy(kind, 9.0), standing, instance.activations, small, np.ones(4), np.ones(6))


def test_prism_refuses_what_its_solver_has_no_rule_for() -> None:
    """The refusal names solvers that know; with such a solver the policy works."""
    instance, standing = medium(np.random.default_rng(2), rules=True)
    arguments = (standing, instance.activations, instance, np.ones(4), np.full(6, 1e-6))
    with pytest.raises(UnsupportedFeature, match=r"solver 'prism' does not support .*exact"):
        review(Policy("prism", 100.0), *arguments)
    found = review(Policy("prism", 100.0, solver="exact"), *arguments)
    assert found.target is not None
    assert violations(found.target, instance=instance) == []


@pytest.mark.parametrize("cost", ["sum", "max"])
def test_partial_knows_replicas_and_pins(cost: Any) -> None:
    """Rules stop the solver of `prism`, yet `partial` moves and keeps them."""
    rng = np.random.default_rng(3)
    instance, standing = medium(rng, rules=True)
    found = review(
        Policy("partial", 100.0, cost),
        standing,
        instance.activations,
        instance,
        np.ones(4),
        np.full(6, 1e-6),
    )
    assert found.target is not None
    assert violations(found.target, instance=instance) == []


def test_experts_of_unequal_size() -> None:
    """`partial` refuses and says what can; `prism` with that solver moves, bytes by layer."""
    rates = np.array([[[9.0, 0.0], [9.0, 0.0]], [[0.0, 9.0], [0.0, 9.0]]])
    model = ModelShape("m", (0, 4), 2, 1, (10, 1000))
    instance = Instance(model, ("a", "b"), rates, ((1010,), (1010,)))
    on_gpu = np.zeros((2, 2, 2), bool)
    on_gpu[0, :, 1] = on_gpu[1, :, 0] = True
    arguments = (placed(instance, on_gpu), rates, instance, np.ones(2), np.full(2, 1.0))
    with pytest.raises(
        UnsupportedFeature, match=r"unequal size.*'prism' with a solver that has: ilp"
    ):
        review(Policy("partial", 10.0), *arguments)
    found = review(Policy("prism", 10.0, solver="ilp"), *arguments)
    assert (found.moved_experts, found.moved_bytes) == (4, 2020)
    assert found.cost_s == pytest.approx(2020e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "partail"}, "did you mean 'partial'"),
        ({"cost": "mean"}, "cost: 'mean'; expected one of sum, max"),
        ({"solver": "exakt"}, "did you mean 'exact'"),
        ({"horizon_s": 0.0}, "horizon_s: 0.0; expected seconds above 0"),
        ({"horizon_s": math.nan}, "horizon_s: nan"),
        ({"horizon_s": math.inf}, "horizon_s: inf"),
        ({"seed": -1}, "seed"),
    ],
)
def test_policies_that_are_none(wrong: dict[str, Any], message: str) -> None:
    """A value out of range is refused when the policy is made."""
    values: dict[str, Any] = {"kind": "partial", "horizon_s": 300.0} | wrong
    with pytest.raises(InputError, match=message):
        Policy(**values)
