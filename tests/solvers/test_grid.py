"""One grid of cases, stamped on every solver."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prism_plan.errors import Infeasible, UnsupportedFeature
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape
from prism_plan.objective import remote_score
from prism_plan.placement_check import violations
from prism_plan.solvers import SOLVER_NAMES, Feature, Options, get_solver, solve, solvers_supporting
from tests.solvers.brute_force import SOLVER as BRUTE_FORCE
from tests.solvers.instances import random_instance

HEURISTICS = [name for name in SOLVER_NAMES if name not in ("exact", "ilp")]
OPTIMAL = {
    "exact": Options(),
    "ilp-highs": Options(backend="highs"),
    "ilp-cbc": Options(backend="cbc"),
}


def make(activations: object, slots: list[int], **more: object) -> Instance:
    """An instance with one GPU a server."""
    array = np.asarray(activations, float)
    model = ModelShape("hand", tuple(range(array.shape[1])), array.shape[2], 1, 100)
    names = tuple(f"s{n}" for n in range(array.shape[0]))
    return Instance(model, names, array, tuple((s,) for s in slots), **more)  # type: ignore[arg-type]


HAND = {
    "one server holds everything": make([[[3, 1], [2, 0]]], [4]),
    "exactly enough slots": make([[[3, 1], [2, 0]], [[1, 1], [1, 5]]], [2, 2]),
    "one slot more": make([[[3, 1], [2, 0]], [[1, 1], [1, 5]]], [3, 2]),
    "a server without slots": make([[[3, 1], [2, 0]], [[1, 1], [1, 5]]], [4, 0]),
    "everybody holds everything": make(np.ones((3, 2, 2)), [4, 4, 9]),
    "nothing is called": make(np.zeros((2, 2, 3)), [3, 4]),
    "all tied": make(np.ones((3, 2, 4)), [3, 3, 3]),
    "one server calls nothing": make([[[0, 0, 0]], [[1, 2, 3]]], [2, 2]),
    "one layer, one expert": make([[[1]], [[2]]], [1, 1]),
    "tiny and huge calls": make([[[1e-12, 1e9]], [[1e-9, 1e-3]]], [1, 1]),
    "fewer slots a server than layers": make(np.arange(40).reshape(4, 5, 2) % 7, [3, 3, 3, 3]),
}


def brute_share(instance: Instance) -> float:
    """The optimal remote share, by trying every placement."""
    answer = BRUTE_FORCE(instance, Options())
    return remote_score(instance.activations, answer.local).share


@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize("case", list(HAND))
def test_hand_made_cases(case: str, solver: str) -> None:
    """Every solver answers every hand-made case with a feasible placement and a true share."""
    instance = HAND[case]
    placement = solve(instance, solver)
    assert violations(placement, instance=instance) == []
    f = instance.activations
    share = f[~placement.local].sum() / f.sum() if f.sum() else 0.0
    assert placement.plan.remote_share == pytest.approx(share, abs=1e-12)
    assert placement.plan.solver == solver


@pytest.mark.parametrize("name", list(OPTIMAL))
@pytest.mark.parametrize("case", [c for c, i in HAND.items() if i.activations.size <= 18])
def test_optimal_on_hand_made_cases(case: str, name: str) -> None:
    """The exact solvers find what brute force finds, and prove it."""
    instance = HAND[case]
    placement = solve(instance, name.split("-")[0], OPTIMAL[name])
    assert placement.plan.remote_share == pytest.approx(brute_share(instance), abs=1e-9)
    assert placement.plan.termination == "optimal"
    assert placement.plan.bound == pytest.approx(placement.plan.remote_share, abs=1e-9)


@pytest.mark.parametrize("seed", range(300))
def test_random_instances(seed: int) -> None:
    """Brute force = exact = ilp; no heuristic beats the bound; all are feasible or none is."""
    instance = random_instance(np.random.default_rng(seed))
    slots, pairs = int(instance.slots.sum()), instance.model.num_pairs
    if slots < pairs:
        for name in ("exact", "ilp", "prism", "uniform"):
            with pytest.raises(Infeasible, match="coverage") as caught:
                solve(instance, name)
            assert caught.value.shortfall == pairs - slots
        with pytest.raises(Infeasible):
            BRUTE_FORCE(instance, Options())
        return
    best = brute_share(instance)
    for name, options in OPTIMAL.items():
        if name == "ilp-cbc" and seed % 5:
            continue  # each call starts a process
        placement = solve(instance, name.split("-")[0], options)
        assert placement.plan.remote_share == pytest.approx(best, abs=1e-9), name
        assert placement.plan.termination == "optimal"
        assert violations(placement, instance=instance) == []
    for name in HEURISTICS:
        placement = solve(instance, name, Options(seed=seed))
        assert violations(placement, instance=instance) == [], name
        assert placement.plan.remote_share is not None
        assert placement.plan.remote_share >= best - 1e-12, name


@pytest.mark.parametrize("seed", range(300))
def test_random_instances_with_rules(seed: int) -> None:
    """With replicas, pins, forbidden experts and layer caps: brute force = exact = ilp.

    Infeasible instances are called infeasible by all of them, with a constraint and a shortfall.
    """
    rng = np.random.default_rng(10_000 + seed)
    instance = random_instance(rng, rules=True)
    try:
        best = brute_share(instance)
    except Infeasible:
        for name in ("exact", "ilp"):
            with pytest.raises(Infeasible) as caught:
                solve(instance, name)
            assert caught.value.shortfall >= 1
            assert caught.value.constraint
        return
    for name, options in OPTIMAL.items():
        if name == "ilp-cbc" and seed % 5:
            continue
        placement = solve(instance, name.split("-")[0], options)
        assert violations(placement, instance=instance) == []
        assert placement.plan.remote_share == pytest.approx(best, abs=1e-9), name
        assert placement.plan.termination == "optimal"


@pytest.mark.parametrize("seed", range(100))
def test_near_an_existing_placement(seed: int) -> None:
    """With a price per newly loaded expert: brute force = exact = ilp in the priced objective."""
    rng = np.random.default_rng(20_000 + seed)
    while True:
        instance = random_instance(rng, rules=bool(seed % 2))
        try:
            old = solve(instance.replace(activations=rng.random(instance.activations.shape)))
            break
        except Infeasible:
            continue
    best = BRUTE_FORCE(instance, Options(reference=old, load_price=0.7))
    for name in ("exact", "ilp"):
        placement = solve(instance, name, Options(reference=old, load_price=0.7))
        loads = int((placement.local & ~old.local).sum())
        value = float(instance.activations[~placement.local].sum()) + 0.7 * loads
        assert value == pytest.approx(best.bound, abs=1e-9), name
        assert placement.plan.extra["loads"] == loads
        assert placement.plan.extra["priced_objective"] == pytest.approx(value, abs=1e-9)
        assert placement.plan.termination == "optimal"


@pytest.mark.parametrize("seed", range(40))
def test_near_without_a_price_loads_least(seed: int) -> None:
    """Of the optimal placements the one near the old loads the fewest experts."""
    rng = np.random.default_rng(30_000 + seed)
    instance = random_instance(rng, ties=True)
    if instance.slots.sum() < instance.model.num_pairs:
        instance = instance.replace(gpu_capacity=((instance.model.num_pairs,),) * len(
            instance.servers
        ))  # fmt: skip
    old = solve(instance.replace(activations=rng.random(instance.activations.shape)))
    best = BRUTE_FORCE(instance, Options(reference=old))
    fewest = int((best.local & ~old.local).sum())
    for name in ("exact", "ilp"):
        placement = solve(instance, name, Options(reference=old))
        assert placement.plan.remote_share == pytest.approx(brute_share(instance), abs=1e-9)
        assert int((placement.local & ~old.local).sum()) == fewest, name


@pytest.mark.parametrize("seed", range(30))
def test_unequal_sizes(seed: int) -> None:
    """Experts of unequal size on GPUs counted in bytes: ilp = brute force over the GPUs."""
    rng = np.random.default_rng(seed)
    layers, experts = 2, int(rng.integers(1, 4))
    gpus = [1] * int(rng.integers(1, 4)) if seed % 3 else [2]
    if sum(gpus) * layers * experts > 16:
        gpus = [1, 1]
    model = ModelShape("mixed", (0, 1), experts, 1, tuple(map(int, rng.integers(50, 150, 2))))
    capacity = tuple(tuple(map(int, rng.integers(0, 500, g))) for g in gpus)
    instance = Instance(
        model,
        tuple(f"s{n}" for n in range(len(gpus))),
        rng.gamma(0.5, size=(len(gpus), layers, experts)),
        capacity,
    )
    try:
        best = brute_share(instance)
    except Infeasible:
        with pytest.raises(Infeasible):
            solve(instance, "ilp")
        return
    for backend in ("highs", "cbc"):
        placement = solve(instance, "ilp", Options(backend=backend))  # type: ignore[arg-type]
        assert placement.plan.remote_share == pytest.approx(best, abs=1e-9)
        assert violations(placement, instance=instance) == []


@pytest.mark.parametrize("solver", [n for n in SOLVER_NAMES if n != "ilp"])
def test_unequal_sizes_are_refused(solver: str) -> None:
    """Solvers that count slots refuse experts of unequal size and name the one that does not."""
    model = ModelShape("mixed", (0, 1), 2, 1, (100, 50))
    instance = Instance(model, ("a",), np.ones((1, 2, 2)), ((400,),))
    with pytest.raises(UnsupportedFeature, match=r"unequal size; supported by: ilp"):
        solve(instance, solver)


@pytest.mark.parametrize("solver", HEURISTICS)
def test_heuristics_refuse_what_they_have_no_rule_for(solver: str) -> None:
    """Replicas, pins and prices are refused, naming the solvers that have a rule."""
    instance = make(np.ones((2, 1, 2)), [2, 2])
    old = solve(instance, "uniform")
    problems = [
        (instance.replace(min_replicas=2), Options()),
        (instance.replace(pinned=((0, 0, 1),)), Options()),
        (instance.replace(forbidden=((0, 0, 1),)), Options()),
        (instance.replace(layer_caps=(1, None)), Options()),
        (instance, Options(reference=old)),
    ]
    for changed, options in problems:
        with pytest.raises(UnsupportedFeature, match="supported by: ilp, exact"):
            solve(changed, solver, options)


def test_knowledge_is_declared() -> None:
    """The exact flow supports all features but unequal sizes; the ILP supports all."""
    assert get_solver("ilp").supports == frozenset(Feature)
    assert get_solver("exact").supports == frozenset(Feature) - {Feature.UNEQUAL_BYTES}
    assert solvers_supporting(frozenset({Feature.UNEQUAL_BYTES})) == ["ilp"]


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_same_seed_same_placement(solver: str) -> None:
    """Two solves with one seed agree; so do solves with the same frozen options used twice."""
    rng = np.random.default_rng(5)
    instance = make(rng.random((3, 4, 6)), [10, 12, 9])
    options = Options(seed=7)
    first, second = solve(instance, solver, options), solve(instance, solver, options)
    assert (first.on_gpu == second.on_gpu).all()
    assert first.plan.bound == second.plan.bound


def test_the_seed_matters_where_it_should() -> None:
    """Redundance draws by its seed; the deterministic solvers do not look at it."""
    rng = np.random.default_rng(5)
    instance = make(rng.random((3, 4, 6)), [16, 16, 16])
    for solver in SOLVER_NAMES:
        one, two = (solve(instance, solver, Options(seed=s)) for s in (0, 1))
        same = bool((one.on_gpu == two.on_gpu).all())
        assert same == (solver != "redundance"), solver


@pytest.mark.parametrize("seed", range(25))
def test_infeasible_rules_name_the_true_shortfall(seed: int) -> None:
    """Adding the shortfall in slots on a server free of rules makes the instance feasible.

    One slot fewer does not: the shortfall that the error states is exact.
    """
    rng = np.random.default_rng(40_000 + seed)
    shortfall = 0
    while not shortfall:
        instance = random_instance(rng, rules=True).replace(min_replicas=1)
        try:
            solve(instance, "exact")
        except Infeasible as error:
            # pins beyond a server's own slots cannot be mended elsewhere
            if "pinned experts" not in error.constraint:
                shortfall = round(error.shortfall)

    def with_helper(slots: int) -> Instance:
        zeros = np.zeros((1, *instance.activations.shape[1:]))
        return instance.replace(
            servers=(*instance.servers, "helper"),
            activations=np.concatenate([instance.activations, zeros]),
            gpu_capacity=(*instance.gpu_capacity, (slots,)),
            layer_caps=(*instance.layer_caps, None),
        )

    solve(with_helper(shortfall), "exact")
    with pytest.raises(Infeasible):
        solve(with_helper(shortfall - 1), "exact")


def test_replicas_beyond_servers() -> None:
    """More replicas than servers are infeasible, short by the servers that lack."""
    instance = make(np.ones((2, 1, 2)), [2, 2], min_replicas=4)
    with pytest.raises(Infeasible, match="min_replicas 4 on 2 servers") as caught:
        solve(instance, "exact")
    assert (caught.value.shortfall, caught.value.unit) == (2, "servers")


def test_bounds_are_finite_numbers() -> None:
    """Bounds of solvers that give one are finite, of the others None."""
    instance = HAND["one slot more"]
    for solver in SOLVER_NAMES:
        bound = solve(instance, solver).plan.bound
        assert (bound is not None and math.isfinite(bound)) == (solver in ("exact", "ilp"))
