"""Repairs: all replicas again by the fewest loads, or the most that there is room for."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import Infeasible, InputError, WrongModel
from prism_plan.instance import Instance
from prism_plan.io.placement import dump_placement, read_placement
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.repair import missing_text, repair_placement
from prism_plan.migration.repair_unequal import repair_unequal_sizes
from prism_plan.model_spec import ModelShape
from prism_plan.placement import Placement, SolveReport
from prism_plan.placement_check import violations
from prism_plan.solvers import solve
from tests.migration.moves_by_hand import placed, random_extension
from tests.migration.replay import check_plan
from tests.migration.replicas_by_hand import too_few_copies

SEEDS = st.integers(0, 2**32)
Score = tuple[float, ...]


def drawn(
    seed: int, *, servers: int, layers: int, experts: int, unequal: bool = False, rules: bool = True
) -> tuple[Placement, Instance, np.ndarray]:
    """What servers hold, an instance with room for about all replicas, and calls per second."""
    rng = np.random.default_rng(seed)
    num, pairs = int(rng.integers(2, servers + 1)), layers * experts
    replicas = int(rng.integers(1, 4 if num > 2 else 3))
    size: Any = 10
    if unequal:
        size = tuple(int(n) for n in rng.integers(1, 4, layers))
        if len(set(size)) == 1:
            size = (4, *size[1:])
    model = ModelShape("m", tuple(range(1, layers + 1)), experts, 1, size)
    per_pair = np.repeat(model.expert_bytes_by_layer, experts) if unequal else np.ones(pairs, int)
    held = rng.random((num, pairs)) < rng.choice([0.2, 0.5, 0.8])
    share = replicas * per_pair.sum() / num
    room = np.maximum(held @ per_pair, np.rint(share * rng.uniform(0.7, 1.3, num)).astype(int))
    names = tuple(f"s{n}" for n in range(num))
    capacity = tuple((int(n),) for n in room)
    placement = Placement(
        model, names, capacity, held.reshape(num, layers, experts), SolveReport("x", seed=3)
    )
    rule = rng.random(held.shape)
    with_rules = rules and rng.random() < 0.6
    mark = (held.shape[0], layers, experts)

    def triples(mask: np.ndarray) -> tuple[tuple[int, int, int], ...]:
        chosen = np.argwhere((mask & with_rules).reshape(mark)).tolist()
        return tuple((n, layer, e) for n, layer, e in chosen)

    caps: tuple[int | None, ...] = ()
    if with_rules and rng.random() < 0.5:
        caps = tuple(int(n) for n in rng.integers(max(experts // 2, 1), experts + 1, num))
    instance = Instance(
        model, names, np.zeros(mark), capacity, min_replicas=replicas,
        pinned=triples(rule < 0.05), forbidden=triples(rule > 0.9), layer_caps=caps,
    )  # fmt: skip
    return placement, instance, rng.integers(0, 4, mark).astype(float)


def score(held: np.ndarray, found: np.ndarray, instance: Instance, calls: np.ndarray) -> Score:
    """What a repair is judged by, in this order; bool [N, L, E] before and after."""
    copies = found.sum(axis=0)
    return (
        float((copies == 0).sum()),
        float(np.maximum(min(instance.min_replicas, len(held)) - copies, 0).sum()),
        float((found & ~held).sum()),
        float(calls[held & ~found].sum()),
    )


def every_placement(instance: Instance) -> list[np.ndarray]:
    """All that keep capacities and rules, on servers of one GPU, whatever they cover."""
    shape = instance.activations.shape
    pinned, forbidden = instance.mask(instance.pinned), instance.mask(instance.forbidden)
    room = np.array([sum(gpus) for gpus in instance.gpu_capacity])
    rows = []
    for n in range(instance.num_servers):
        own = np.array(list(itertools.product([False, True], repeat=shape[1] * shape[2])))
        own = own.reshape(-1, *shape[1:])
        fits = own.sum(axis=2) @ instance.expert_size <= room[n]
        fits &= (own | ~pinned[n]).all(axis=(1, 2)) & ~(own & forbidden[n]).any(axis=(1, 2))
        fits &= (own.sum(axis=2) <= instance.max_per_layer[n]).all(axis=1)
        rows.append(own[fits])
    return [np.stack(rows) for rows in itertools.product(*rows)]


def assert_best(held: Placement, instance: Instance, calls: np.ndarray) -> None:
    """Both modes against all placements: none is better, and it is refused where none exists."""
    before = held.local
    choices = every_placement(instance)
    full = [x for x in choices if (x.sum(axis=0) >= instance.min_replicas).all()]
    try:
        found = repair_placement(held, instance, calls)
    except Infeasible:
        assert not full
    else:
        assert violations(found, instance=instance) == []
        assert missing_text(found, instance) == ""
        best = min(score(before, x, instance, calls) for x in full)
        assert score(before, found.local, instance, calls) == best
    try:
        found = repair_placement(held, instance, calls, partly=True)
    except Infeasible:
        assert not choices
        return
    broken = {v.constraint for v in violations(found, instance=instance)}
    assert broken <= {"coverage", "min_replicas"}
    assert bool(broken) == bool(missing_text(found, instance))
    covered = before.any(axis=0)
    keeping = [x for x in choices if x.any(axis=0)[covered].all()]
    best = min(score(before, x, instance, calls) for x in keeping or choices)
    assert score(before, found.local, instance, calls) == best


@settings(max_examples=120)
@given(seed=SEEDS, layers=st.integers(1, 2))
def test_no_placement_is_better(seed: int, layers: int) -> None:
    """Every placement of four experts on two or three servers is the referee, with rules."""
    assert_best(*drawn(seed, servers=3, layers=layers, experts=4 // layers))


@settings(max_examples=60)
@given(seed=SEEDS)
def test_no_placement_is_better_where_sizes_differ(seed: int) -> None:
    """The same with layers whose experts differ in size, in bytes."""
    assert_best(*drawn(seed, servers=3, layers=2, experts=2, unequal=True))


@settings(max_examples=25)
@given(seed=SEEDS, partly=st.booleans())
def test_flow_and_integer_program_agree(seed: int, partly: bool) -> None:
    """On up to six servers and thirty experts of one size both reach the same goals."""
    held, instance, calls = drawn(seed, servers=6, layers=3, experts=10)
    try:
        found = repair_placement(held, instance, calls, partly=partly)
    except Infeasible:
        with pytest.raises(Infeasible):
            repair_unequal_sizes(held, instance, calls, partly=partly)
        return
    other = repair_unequal_sizes(held, instance, calls, partly=partly)
    assert score(held.local, found.local, instance, calls) == score(
        held.local, other, instance, calls
    )


# ----------------------------------------------------------------------------- after what happens


def two_replicas(rng: np.random.Generator, slots: int = 14) -> tuple[Instance, Placement]:
    """Four servers, one of two GPUs, with two replicas of 24 experts and some free slots."""
    model = ModelShape("m", (1, 2), 12, 1, 10)
    names = ("a", "b", "c", "d")
    capacity = ((slots,), (slots // 2, slots // 2), (slots,), (slots,))
    instance = Instance(model, names, rng.random((4, 2, 12)), capacity, min_replicas=2)
    return instance, solve(instance, "exact")


def without(instance: Instance, placement: Placement, lost: int) -> tuple[Instance, Placement]:
    """What is left when a server is lost."""
    stay = [n for n in range(instance.num_servers) if n != lost]
    fewer = instance.replace(
        servers=tuple(instance.servers[n] for n in stay),
        activations=instance.activations[stay],
        gpu_capacity=tuple(instance.gpu_capacity[n] for n in stay),
        layer_caps=(),
    )
    gpus = np.concatenate([placement.gpus_of(n) for n in stay])
    held = placement.replace(
        servers=fewer.servers, gpu_capacity=fewer.gpu_capacity, on_gpu=placement.on_gpu[gpus]
    )
    return fewer, held


@pytest.mark.parametrize("seed", range(12))
def test_a_lost_server_is_repaired_by_its_copies_alone(seed: int) -> None:
    """Each replica of the lost server is loaded once, into free slots or for third copies."""
    rng = np.random.default_rng(seed)
    instance, placement = two_replicas(rng, slots=16)
    lost = int(rng.integers(4))
    fewer, held = without(instance, placement, lost)
    missing = int(np.maximum(2 - held.local.sum(axis=0), 0).sum())
    target = repair_placement(held, fewer, fewer.activations)
    plan = migration_plan(held, target, priority=fewer.activations)
    assert missing > 0
    assert plan.loads == missing
    assert plan.extra_loads == 0
    assert plan.min_replicas == 2
    assert plan.dips == ()
    assert check_plan(plan, held, target) == []
    copies = target.local.sum(axis=0)
    assert (copies >= 2).all()
    needed = int((fewer.slots.sum() - held.on_gpu.sum()) < missing)
    assert (plan.drops > 0) == bool(needed)


@pytest.mark.parametrize("seed", range(12))
def test_a_move_that_stopped_anywhere_is_repaired(seed: int) -> None:
    """From any stage of a plan with dips: the replicas are back, and no copy is lost on the way."""
    rng = np.random.default_rng(seed)
    instance, before = two_replicas(rng, slots=12)
    after = solve(instance.replace(activations=rng.random((4, 2, 12))), "exact")
    plan = migration_plan(before, after)
    order = random_extension(plan, rng)
    on_gpu = before.on_gpu.reshape(len(before.on_gpu), -1).copy()
    for index in order[: int(rng.integers(len(order) + 1))]:
        on_gpu[plan.steps[index].gpu, plan.steps[index].pair] = plan.steps[index].kind == "load"
    held = before.replace(on_gpu=on_gpu.reshape(before.on_gpu.shape))
    target = repair_placement(held, instance)
    assert violations(target, instance=instance) == []
    repair = migration_plan(held, target)
    assert check_plan(repair, held, target) == []
    for end in range(len(repair.steps) + 1):
        assert too_few_copies(repair, frozenset(range(end)), held, target) is None


def test_what_remains_is_told() -> None:
    """Five slots for three experts of two replicas: all are covered, and one has one copy."""
    held = placed([[0, 1], []], [2, 3], pairs=3)
    model = held.model
    instance = Instance(model, held.servers, np.zeros((2, 1, 3)), ((2,), (3,)), min_replicas=2)
    with pytest.raises(Infeasible, match="short by 1 slot"):
        repair_placement(held, instance)
    found = repair_placement(held, instance, partly=True)
    assert found.local.sum(axis=0).tolist() == [[2, 2, 1]]
    assert missing_text(found, instance) == (
        "1 expert is held by fewer than 2 servers: layer 3 expert 2"
    )
    less = instance.replace(gpu_capacity=((1,), (1,)))
    poor = placed([[0], []], [1, 1], pairs=3)
    found = repair_placement(poor, less, partly=True)
    assert found.local[:, 0, 0].tolist() == [True, False]  # what somebody holds stays
    assert missing_text(found, less) == (
        "1 expert is held nowhere: layer 3 expert 2; "
        "2 experts are held by fewer than 2 servers: layer 3 expert 0, layer 3 expert 1"
    )


def test_the_least_called_copy_makes_room() -> None:
    """A full server drops of its spare copies the one that is called least there."""
    held = placed([[0, 1, 2], [0, 1, 2], [3, 0, 1]], [3, 3, 3], pairs=4)
    instance = Instance(held.model, held.servers, np.zeros((3, 1, 4)), ((3,),) * 3, min_replicas=2)
    calls = np.array([[[5, 1, 0, 0]], [[4, 3, 0, 0]], [[9, 9, 0, 9]]], float)
    found = repair_placement(held, instance, calls)
    assert (held.local & ~found.local).nonzero()[0].tolist() == [0]
    assert found.local[0, 0].tolist() == [True, False, True, True]


def test_servers_are_matched_by_name_and_experts_stay_on_their_gpus() -> None:
    """The result has the instance's order of servers, and the plan names the repair."""
    held = placed([[], [1], [0], [1]], [2, 1, 2, 1], pairs=2, gpus=[2, 2], names=["y", "x"])
    instance = Instance(
        held.model, ("x", "y"), np.zeros((2, 1, 2)), ((2, 1), (2, 1)), min_replicas=2
    )
    found = repair_placement(held, instance)
    assert found.servers == ("x", "y")
    assert found.on_gpu[:, 0].astype(int).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    report = found.plan
    assert (report.solver, report.objective, report.min_replicas) == ("repair", "loads", 2)


def test_a_repair_is_written_and_read(tmp_path: Any) -> None:
    """A placement file like any other."""
    held = placed([[0], []], [2, 2], pairs=2)
    instance = Instance(held.model, held.servers, np.zeros((2, 1, 2)), ((2,), (2,)))
    found = repair_placement(held, instance)
    (tmp_path / "p.json").write_bytes(dump_placement(found))
    again = read_placement(tmp_path / "p.json")
    assert (again.on_gpu == found.on_gpu).all()
    assert again.plan == found.plan


def test_refusals() -> None:
    """Another model, other servers, calls of another shape or below 0, pins that do not fit."""
    held = placed([[0], []], [2, 2], pairs=2)
    instance = Instance(held.model, held.servers, np.zeros((2, 1, 2)), ((2,), (2,)))
    with pytest.raises(WrongModel):
        repair_placement(placed([[0], []], [2, 2], pairs=3), instance)
    with pytest.raises(InputError, match="expected the servers and GPUs of the instance"):
        repair_placement(held.replace(servers=("s0", "t")), instance)
    with pytest.raises(InputError, match=r"priority: shape \(2, 2\); expected \(2, 1, 2\)"):
        repair_placement(held, instance, np.zeros((2, 2)))
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="priority: a number that is negative or not finite"):
            repair_placement(held, instance, np.full((2, 1, 2), wrong))
    pins = instance.replace(pinned=((0, 0, 0), (0, 0, 1)), gpu_capacity=((1,), (2,)))
    for partly in (False, True):
        with pytest.raises(Infeasible, match="2 pinned experts and 1 slots"):
            repair_placement(held, pins, partly=partly)


def test_instances_are_not_changed() -> None:
    """The plan's report keeps the seed of what was held; the held placement stays as it is."""
    held = placed([[0], []], [2, 2], pairs=2)
    held = held.replace(plan=dataclasses.replace(held.plan, seed=7))
    before = held.on_gpu.copy()
    instance = Instance(held.model, held.servers, np.zeros((2, 1, 2)), ((2,), (2,)))
    assert repair_placement(held, instance).plan.seed == 7
    assert (held.on_gpu == before).all()
