"""Replicas during migrations: kept wherever a slot can be had, and what is not kept is said."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import Infeasible, InputError
from prism_plan.migration.endpoints import match_placements
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.plan import MigrationPlan
from prism_plan.migration.replica_dips import dips_text, with_dips
from prism_plan.migration_step import MigrationStep, ReplicaDip
from prism_plan.placement import Placement
from tests.migration.moves_by_hand import (
    every_stage,
    flat,
    placed,
    random_extension,
    trouble_at,
)
from tests.migration.replay import check_plan
from tests.migration.replicas_by_hand import Case, drawn_case, fewest_dips, too_few_copies
from tests.migration.test_find_order import story

#: More stages than the small plans have; larger ones have too many to see all.
EVERY = 5000
SEEDS = st.integers(0, 2**32)


def assert_kept(plan: MigrationPlan, a: Placement, b: Placement, most: int) -> None:
    """At every stage that the needs allow, up to ``most`` of them, copies are as promised."""
    assert check_plan(plan, a, b) == []
    for done in every_stage(plan, most):
        assert trouble_at(plan.steps, done, a, b) is None
        assert too_few_copies(plan, done, a, b) is None
    for dip in plan.dips:  # in the order of the steps the copies are as few as is said
        before = plan.replace(dips=tuple(d for d in plan.dips if d is not dip))
        assert too_few_copies(before, frozenset(range(dip.drop + 1)), a, b) is not None


def depth(plan: MigrationPlan) -> int:
    """By how many copies in all experts fall below what is wanted."""
    deepest: collections.Counter[int] = collections.Counter()
    for dip in plan.dips:
        deepest[dip.pair] = max(deepest[dip.pair], dip.wanted - dip.copies)
    return deepest.total()


def planned(case: Case) -> MigrationPlan | None:
    """The case's plan; ``None`` where there is none, not even one that keeps single copies."""
    try:
        return case.plan()
    except Infeasible:
        with pytest.raises(Infeasible):
            migration_plan(case.a, case.b, min_replicas=1)
        return None


@settings(max_examples=150)
@given(seed=SEEDS, several_gpus=st.booleans())
def test_there_are_dips_only_where_no_order_does_without(seed: int, several_gpus: bool) -> None:
    """Search over all states is the referee; all orders of the steps keep what the plan says.

    The number of copies that are missing is never below the least, and is the least where the GPUs
    that wait for each other are one group.
    """
    size = {"servers": 3, "pairs": 4} if several_gpus else {"servers": 4, "pairs": 5}
    case = drawn_case(seed, **size, several_gpus=several_gpus)
    plan = planned(case)
    least = fewest_dips(case.a, case.b, case.min_replicas)
    assert (plan is None) == (least is None)
    if plan is None or least is None:
        return
    assert_kept(plan, case.a, case.b, most=EVERY)
    assert (depth(plan) == 0) == (least == 0)
    assert depth(plan) >= least


@settings(max_examples=60)
@given(seed=SEEDS, kind=st.sampled_from(["forbidden", "unequal", "uncovered"]))
def test_harder_cases_are_sound(seed: int, kind: str) -> None:
    """Forbidden places, unequal sizes, experts that nobody holds: what is said holds.

    Not claimed there: that dips are as few as can be. No load goes to a forbidden place.
    """
    case = drawn_case(seed, servers=3, pairs=4, **{kind: True})
    forbidden = case.forbidden_on_gpus
    try:
        plan = case.plan()
    except Infeasible:
        return
    least = fewest_dips(case.a, case.b, case.min_replicas, forbidden)
    assert least is not None
    assert_kept(plan, case.a, case.b, most=EVERY)
    assert depth(plan) >= least
    for step in plan.steps:
        if step.kind == "load" and not flat(case.b)[step.gpu, step.pair]:
            assert not forbidden[step.gpu, step.pair]


@settings(max_examples=40)
@given(seed=SEEDS, several_gpus=st.booleans(), unequal=st.booleans(), uncovered=st.booleans())
def test_larger_moves_in_random_orders(
    seed: int, several_gpus: bool, unequal: bool, uncovered: bool
) -> None:
    """Up to eight servers and thirty experts: random orders of the steps keep what is said."""
    case = drawn_case(
        seed, servers=8, pairs=30, several_gpus=several_gpus, unequal=unequal, uncovered=uncovered
    )
    plan = planned(case)
    if plan is None:
        return
    assert_kept(plan, case.a, case.b, most=50)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        order = random_extension(plan, rng)
        assert len(order) == len(plan.steps)
        for end in range(len(order) + 1):
            done = frozenset(order[:end])
            assert trouble_at(plan.steps, done, case.a, case.b) is None
            assert too_few_copies(plan, done, case.a, case.b) is None


@settings(max_examples=60)
@given(seed=SEEDS)
def test_extra_loads_are_bounded(seed: int) -> None:
    """A group of GPUs that wait for each other costs no more extra loads than there are GPUs."""
    case = drawn_case(seed, servers=8, pairs=30)
    plan = planned(case)
    if plan is None:
        return
    gpus = len(flat(case.a))
    assert plan.extra_loads <= gpus * (gpus // 2)
    assert plan.loads == (flat(case.b) & ~flat(case.a)).sum() + plan.extra_loads
    assert plan.extra_bytes == 10 * plan.extra_loads


# ------------------------------------------------------------------------------------- by hand


def test_a_free_slot_anywhere_saves_the_second_copy() -> None:
    """Two servers exchange experts of two copies each over a slot of a fourth server."""
    a = placed([[0], [1], [0, 1], []], [1, 1, 2, 1], pairs=2)
    b = placed([[1], [0], [0, 1], []], [1, 1, 2, 1], pairs=2)
    plan = migration_plan(a, b, min_replicas=2)
    assert story(plan) == [
        "load 0@3 []*",
        "drop 0@0 [0]",
        "load 1@0 [1]",
        "drop 1@1 [2]",
        "load 0@1 [3]",
        "drop 0@3 [0, 1, 4]*",
    ]
    assert plan.dips == ()
    assert (plan.extra_loads, plan.extra_bytes) == (1, 10)
    assert_kept(plan, a, b, most=EVERY)


def test_without_a_slot_one_expert_dips_and_the_plan_says_when() -> None:
    """No slot is free: the less called expert is dropped first and loaded last, at no extra load.

    With ``min_replicas`` 1 both are dropped before they are loaded, and nothing is said.
    """
    a = placed([[0], [1], [0, 1]], [1, 1, 2], pairs=2)
    b = placed([[1], [0], [0, 1]], [1, 1, 2], pairs=2)
    calls = np.array([[[5.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    plan = migration_plan(a, b, min_replicas=2, priority=calls)
    assert story(plan) == ["drop 1@1 []", "load 0@1 [0]", "drop 0@0 [1]", "load 1@0 [2]"]
    assert plan.dips == (ReplicaDip(pair=1, wanted=2, copies=1, drop=0, load=3),)
    assert dips_text(plan) == (
        "1 expert has fewer than 2 copies for a while, for no order was found that loads before it "
        "drops: layer 3 expert 1 (1 copy left)"
    )
    assert_kept(plan, a, b, most=EVERY)
    careless = migration_plan(a, b, min_replicas=1)
    assert [step.kind for step in careless.steps[:2]] == ["drop", "load"]
    assert (careless.dips, dips_text(careless)) == ((), "")


def test_a_copy_beyond_the_replicas_lends_its_slot() -> None:
    """No slot is free, but an expert has three copies where two are kept: it lends one."""
    a = placed([[0, 2], [1, 2], [0, 1, 2]], [2, 2, 3], pairs=3)
    b = placed([[1, 2], [0, 2], [0, 1, 2]], [2, 2, 3], pairs=3)
    plan = migration_plan(a, b, min_replicas=2)
    assert plan.dips == ()
    assert story(plan)[0] == "drop 2@0 []*"
    assert plan.extra_loads == 1
    assert migration_plan(a, b, min_replicas=3).dips != ()
    assert_kept(plan, a, b, most=EVERY)


def test_two_gpus_of_one_server_are_one_copy() -> None:
    """A copy on another GPU of the same server does not count: what is kept are servers."""
    a = placed([[0], [0], [1], [1]], [1] * 4, pairs=2, gpus=[2, 1, 1])
    b = placed([[1], [0], [0], [1]], [1] * 4, pairs=2, gpus=[2, 1, 1])
    plan = migration_plan(a, b, min_replicas=2)
    # expert 0 is held by one server at first, so one is what is kept; expert 1 stays on two
    assert plan.dips == ()
    assert_kept(plan, a, b, most=EVERY)


def test_groups_that_share_an_expert_are_one() -> None:
    """Two exchanges of the same expert, on full GPUs, go around one circuit.

    Without a slot one expert dips, the one called least; a slot is brought to them once.
    """
    a = [[0], [1], [0], [2], [1, 2], []]
    b = [[1], [0], [2], [0], [1, 2], []]
    calls = np.full((6, 3), [9.0, 2.0, 1.0])
    ends = [placed(held[:5], [1, 1, 1, 1, 2], pairs=3) for held in (a, b)]
    plan = migration_plan(*ends, min_replicas=2, priority=calls[:5])
    assert [dip.pair for dip in plan.dips] == [2]
    assert plan.extra_loads == 0
    assert fewest_dips(*ends, 2) == 1
    assert_kept(plan, *ends, most=EVERY)
    ends = [placed(held, [1, 1, 1, 1, 2, 1], pairs=3) for held in (a, b)]
    plan = migration_plan(*ends, min_replicas=2, priority=calls)
    assert plan.dips == ()
    assert plan.extra_loads == 1
    assert_kept(plan, *ends, most=EVERY)


def test_a_slot_beside_a_copy_takes_another_expert() -> None:
    """A server with a free slot has both experts that are exchanged: a third one makes room."""
    a = placed([[0, 2], [1, 3], [0, 1], [], [2, 3]], [2, 2, 2, 1, 2], pairs=4, gpus=[1, 1, 2, 1])
    b = placed([[1, 2], [0, 3], [0, 1], [], [2, 3]], [2, 2, 2, 1, 2], pairs=4, gpus=[1, 1, 2, 1])
    plan = migration_plan(a, b, min_replicas=2)
    assert plan.dips == ()
    assert story(plan)[:3] == ["load 2@3 []*", "drop 2@0 [0]*", "load 1@0 [1]"]
    assert plan.extra_loads == 2
    assert_kept(plan, a, b, most=EVERY)


def test_a_shift_is_not_taken_for_a_move_to_another_server() -> None:
    """One copy changes its GPU while the other changes its server: both servers keep theirs."""
    a = placed([[1], [2], [0], [2], []], [1] * 5, pairs=3, gpus=[1, 2, 1, 1])
    b = placed([[2], [0], [2], [1], []], [1] * 5, pairs=3, gpus=[1, 2, 1, 1])
    plan = migration_plan(a, b, min_replicas=2)
    assert plan.dips == ()
    assert_kept(plan, a, b, most=EVERY)


def test_a_slot_on_a_server_that_waits_takes_the_copy_that_comes_there() -> None:
    """Of two copies that move the one goes to the free slot whose server is its own target."""
    a = placed([[0], [0], [2], [1], []], [1] * 5, pairs=3, gpus=[1, 1, 1, 2])
    b = placed([[1], [2], [0], [0], []], [1] * 5, pairs=3, gpus=[1, 1, 1, 2])
    plan = migration_plan(a, b, min_replicas=2)
    assert plan.dips == ()
    assert plan.extra_loads == 1
    assert_kept(plan, a, b, most=EVERY)


def test_the_load_that_ends_a_deep_dip_waits_for_the_others() -> None:
    """Two copies short at once: both dips end with the second load, which waits for the first.

    Else it could be complete before the first one, and a copy be missing after the end of the dips.
    """
    a = placed([[0], [0], [0], [], []], [1] * 5, pairs=1)
    b = placed([[], [], [0], [0], [0]], [1] * 5, pairs=1)
    steps = [MigrationStep("drop", g, 0) for g in (0, 1)]
    steps += [MigrationStep("load", g, 0, (0, 1)) for g in (3, 4)]
    ends = match_placements(a, b)
    plan = with_dips(
        MigrationPlan(ends.model, ends.servers, ends.gpus, tuple(steps), min_replicas=3), ends
    )
    assert plan.dips == (ReplicaDip(0, 3, 2, drop=0, load=3), ReplicaDip(0, 3, 1, drop=1, load=3))
    assert [step.needs for step in plan.steps] == [(), (), (0, 1), (0, 1, 2)]
    relying = plan.replace(  # as drops that are planned do
        steps=(plan.steps[0], dataclasses.replace(plan.steps[1], needs=(0,)), *plan.steps[2:])
    )
    assert_kept(relying, a, b, most=EVERY)


def test_the_number_of_replicas_is_that_of_the_target() -> None:
    """Without ``min_replicas`` the plan of the second placement says how many are kept."""
    a = placed([[0], [1], [0, 1]], [1, 1, 2], pairs=2)
    b = placed([[1], [0], [0, 1]], [1, 1, 2], pairs=2)
    assert (migration_plan(a, b).min_replicas, migration_plan(a, b).dips) == (1, ())
    two = b.replace(plan=dataclasses.replace(b.plan, min_replicas=2))
    assert migration_plan(a, two).min_replicas == 2
    assert len(migration_plan(a, two).dips) == 1
    with pytest.raises(InputError, match="min_replicas: 0; expected a whole number from 1"):
        migration_plan(a, b, min_replicas=0)


def test_more_replicas_than_servers_are_as_many_as_there_are() -> None:
    """A number that no cluster has is kept as far as the placements go."""
    a = placed([[0, 1], [0, 1]], [3, 3], pairs=3)
    b = placed([[0, 2], [0, 1]], [3, 3], pairs=3)
    plan = migration_plan(a, b, min_replicas=2**31)
    assert plan.dips == ()
    assert_kept(plan, a, b, most=EVERY)


def test_what_was_lost_is_loaded_first() -> None:
    """After a loss: experts without a holder, then those with one of two copies, then the rest."""
    a = placed([[0, 1], [0, 3]], [6, 6], pairs=5)
    b = placed([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]], [6, 6], pairs=5)
    more = placed([[0, 1, 2, 3, 4], [0, 1, 2, 3]], [6, 6], pairs=5)
    calls = np.array([[[0, 0, 1, 9, 5]], [[0, 8, 2, 0, 4]]], float)

    def loads_in_order(target: Placement) -> list[str]:
        plan = migration_plan(a, target, min_replicas=2, priority=calls)
        return [f"{step.pair}@{step.gpu}" for step in plan.steps]

    assert loads_in_order(b) == ["4@0", "4@1", "2@1", "2@0", "3@0", "1@1"]
    # one copy of expert 4 is all that the target has: nothing of it is missing once it is loaded
    assert loads_in_order(more) == ["4@0", "2@1", "2@0", "3@0", "1@1"]


def test_a_loss_is_repaired_before_other_moves() -> None:
    """An expert with one copy of two gets its second before the others that are called more."""
    a = placed([[0, 1, 2], [1, 2, 3], [2, 3]], [4, 4, 5], pairs=4)
    b = placed([[0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]], [4, 4, 5], pairs=4)
    calls = np.zeros((3, 1, 4))
    calls[:, 0, 1], calls[:, 0, 3] = 100, 50
    plan = migration_plan(a, b, min_replicas=2, priority=calls)
    on_last = [step.pair for step in plan.steps if step.gpu == 2]
    assert on_last == [0, 1]
