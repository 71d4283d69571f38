"""Ordered migrations: covered and within memory in every order that the needs allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prism_plan.errors import Infeasible, InputError, WrongModel
from prism_plan.migration.order.find_order import migration_plan
from prism_plan.migration.plan import LoadTime, MigrationPlan
from prism_plan.migration_step import MigrationStep
from prism_plan.placement import Placement
from tests.migration.moves_by_hand import (
    can_move,
    capacities,
    every_stage,
    flat,
    placed,
    random_extension,
    sizes_of,
    trouble_at,
)
from tests.migration.replay import check_plan


def story(plan: MigrationPlan) -> list[str]:
    """The steps in short: what, pair@GPU, needs, and a star on temporary ones."""
    return [
        f"{step.kind} {step.pair}@{step.gpu} {list(step.needs)}" + "*" * step.temporary
        for step in plan.steps
    ]


def assert_sound(plan: MigrationPlan, a: Placement, b: Placement, most: int = 400) -> None:
    """Every stage is safe, and the counts are what the placements differ by plus the extras."""
    assert check_plan(plan, a, b) == []
    for done in every_stage(plan, most):
        assert trouble_at(plan.steps, done, a, b) is None
    for seed in range(3):
        order = random_extension(plan, np.random.default_rng(seed))
        assert len(order) == len(plan.steps)
        for end in range(len(order) + 1):
            assert trouble_at(plan.steps, frozenset(order[:end]), a, b) is None
    assert plan.loads == (flat(b) & ~flat(a)).sum() + plan.extra_loads
    assert plan.drops == (flat(a) & ~flat(b)).sum() + plan.extra_loads
    assert plan.drops + plan.loads == len(plan.steps)


@st.composite
def fillings(draw: st.DrawFn, slots: Sequence[int], pairs: int, cover: bool = True) -> np.ndarray:
    """Who holds what within these slots, bool [G, J]; ``cover`` every pair, or maybe not."""
    held = np.zeros((len(slots), pairs), bool)
    seats = draw(st.permutations([g for g, n in enumerate(slots) for _ in range(min(n, pairs))]))
    free = list(slots)
    for j, g in zip(range(pairs), seats, strict=False):
        if cover or draw(st.integers(0, 3)):
            held[g, j] = True
            free[g] -= 1
    for g in range(len(slots)):
        wanted = draw(st.lists(st.integers(0, pairs - 1), max_size=free[g]))
        held[g, wanted] = True
    return held


@st.composite
def small_cases(
    draw: st.DrawFn, cover: bool = True, most_slack: int = 3, pairs: int = 5
) -> tuple[Placement, Placement]:
    """Two placements on two or three GPUs that are full, or nearly."""
    gpus = draw(st.integers(2, 3))
    pairs = draw(st.integers(2, pairs))
    slots = [0] * gpus
    for _ in range(pairs + draw(st.integers(0, most_slack))):
        slots[draw(st.integers(0, gpus - 1))] += 1
    assume(sum(min(n, pairs) for n in slots) >= pairs)
    a, b = (draw(fillings(slots, pairs, cover or which == "b")) for which in "ab")
    return (
        placed([np.flatnonzero(row) for row in a], slots, pairs=pairs),
        placed([np.flatnonzero(row) for row in b], slots, pairs=pairs),
    )


@settings(max_examples=150)
@given(case=small_cases())
def test_an_order_is_found_if_and_only_if_one_exists(case: tuple[Placement, Placement]) -> None:
    """Search over all states is the referee, on clusters of slack 0 to 3."""
    a, b = case
    if can_move(a, b):
        assert_sound(migration_plan(a, b), a, b)
    else:
        with pytest.raises(Infeasible):
            migration_plan(a, b)


@settings(max_examples=100)
@given(case=small_cases(cover=False))
def test_experts_that_nobody_holds_are_loaded_too(case: tuple[Placement, Placement]) -> None:
    """The same where the first placement leaves experts out: only the others are protected."""
    a, b = case
    if can_move(a, b):
        assert_sound(migration_plan(a, b), a, b)
    else:
        with pytest.raises(Infeasible):
            migration_plan(a, b)


@settings(max_examples=150)
@given(case=small_cases(), seed=st.integers(0, 2**32), share=st.floats(0.2, 1))
def test_forbidden_places_stay_free_of_temporary_copies(
    case: tuple[Placement, Placement], seed: int, share: float
) -> None:
    """No load goes to a forbidden place that is not a target, and nothing else gets worse.

    Not claimed: that an order is found whenever one exists, for the greedy part does not look
    ahead to what is forbidden.
    """
    a, b = case
    forbidden = np.random.default_rng(seed).random(flat(a).shape) < share
    try:
        plan = migration_plan(a, b, forbidden=forbidden.reshape(a.on_gpu.shape))
    except Infeasible:
        assert forbidden.any() or not can_move(a, b)
        return
    assert can_move(a, b, forbidden)
    assert_sound(plan, a, b)
    for step in plan.steps:
        if step.kind == "load" and not flat(b)[step.gpu, step.pair]:
            assert not forbidden[step.gpu, step.pair]


@settings(max_examples=25)
@given(data=st.data(), gpus=st.integers(3, 7), slack=st.integers(1, 4), each=st.integers(2, 7))
def test_full_clusters_with_a_little_slack(
    data: st.DataObject, gpus: int, slack: int, each: int
) -> None:
    """With slack of one or more an order exists, and costs at most two extra loads a GPU pair."""
    slots = [each] * gpus
    pairs = each * gpus - slack
    a, b = (
        placed(
            [np.flatnonzero(row) for row in data.draw(fillings(slots, pairs))], slots, pairs=pairs
        )
        for _ in "ab"
    )
    plan = migration_plan(a, b)
    assert_sound(plan, a, b, most=60)
    assert plan.extra_loads <= 2 * (gpus // 2)


def test_a_cycle_over_full_gpus_takes_one_temporary_copy() -> None:
    """Two sole copies change places over the free slot of a third GPU, and leave it free."""
    a = placed([[0], [1], []], [1, 1, 1], pairs=2)
    b = placed([[1], [0], []], [1, 1, 1], pairs=2)
    plan = migration_plan(a, b)
    assert story(plan) == [
        "load 0@2 []*",
        "drop 0@0 [0]",
        "load 1@0 [1]",
        "drop 1@1 [2]",
        "load 0@1 [3]",
        "drop 0@2 [0, 1, 4]*",
    ]
    assert (plan.loads, plan.drops, plan.extra_loads, plan.moved_bytes) == (3, 3, 1, 30)
    assert_sound(plan, a, b)


def test_a_kept_duplicate_lends_its_slot() -> None:
    """With no slot free anywhere, a GPU of the cycle drops a duplicate and reloads it later."""
    a = placed([[0, 2], [1], [2]], [2, 1, 1], pairs=3)
    b = placed([[1, 2], [0], [2]], [2, 1, 1], pairs=3)
    plan = migration_plan(a, b)
    assert story(plan) == [
        "drop 2@0 []*",
        "load 1@0 [0]",
        "drop 1@1 [1]",
        "load 0@1 [2]",
        "drop 0@0 [3]",
        "load 2@0 [0, 4]*",
    ]
    assert_sound(plan, a, b)


def test_a_duplicate_elsewhere_lends_its_slot() -> None:
    """Neither free slots nor a duplicate in the cycle: a third GPU takes a copy for the time."""
    a = placed([[0], [1], [2], [2]], [1] * 4, pairs=3)
    b = placed([[1], [0], [2], [2]], [1] * 4, pairs=3)
    plan = migration_plan(a, b)
    assert plan.extra_loads == 2
    assert [step.temporary for step in plan.steps].count(True) == 4
    assert_sound(plan, a, b)


def test_two_sole_copies_on_full_gpus_cannot_change_places() -> None:
    """Without slack nothing can move; the reason names the experts that wait for each other."""
    a = placed([[0], [1]], [1, 1], pairs=2)
    b = placed([[1], [0]], [1, 1], pairs=2)
    with pytest.raises(Infeasible) as caught:
        migration_plan(a, b)
    text = str(caught.value)
    assert "every GPU is full and every expert has one copy" in text
    assert "layer 3 expert 0 on server 's0' gpu[0]" in text
    assert "layer 3 expert 1 on server 's1' gpu[0]" in text
    assert "short by 1 slot" in text
    assert caught.value.exit_code == 3


def test_a_free_slot_that_may_hold_nothing_is_reached_over_a_third_gpu() -> None:
    """Forbidden next to the cycle, the free slot first moves on to a GPU where a copy may go."""
    a = placed([[0], [1], [2], []], [1] * 4, pairs=3)
    b = placed([[1], [0], [2], []], [1] * 4, pairs=3)
    forbidden = np.zeros((4, 1, 3), bool)
    forbidden[3, 0, :2] = True
    plan = migration_plan(a, b, forbidden=forbidden)
    assert story(plan)[:2] == ["load 2@3 []*", "drop 2@2 [0]*"]
    assert plan.extra_loads == 3
    assert_sound(plan, a, b)
    forbidden[3, 0, 2] = True
    with pytest.raises(Infeasible, match="no temporary copy may go where there is room"):
        migration_plan(a, b, forbidden=forbidden)


def test_a_shift_between_gpus_of_a_server_loads_before_it_drops() -> None:
    """The expert serves from its old GPU until it is loaded on the new one."""
    a = placed([[0], []], [1, 1], pairs=1, gpus=[2])
    b = placed([[], [0]], [1, 1], pairs=1, gpus=[2])
    assert story(migration_plan(a, b)) == ["load 0@1 []", "drop 0@0 [0]"]


def test_nothing_to_do() -> None:
    """Equal placements have an empty plan, also with neither slack nor duplicates."""
    a = placed([[0], [1]], [1, 1], pairs=2)
    plan = migration_plan(a, a)
    assert plan.steps == ()
    assert check_plan(plan, a, a) == []
    assert plan.load_seconds([1.0, 1.0]) == LoadTime(0.0, 0.0)


def test_loads_come_by_falling_priority_and_drops_late() -> None:
    """What is called most is loaded first, ties by index; a drop stands before its load."""
    a = placed([[0, 1, 2], [0, 1, 2, 3, 4, 5]], [3, 6], pairs=6)
    b = placed([[3, 4, 5], [0, 1, 2, 3, 4, 5]], [3, 6], pairs=6)
    rates = np.zeros((2, 1, 6))
    rates[0, 0] = [7.0, 5.0, 6.0, 1.0, 2.0, 1.0]
    words = [f"{step.kind} {step.pair}" for step in migration_plan(a, b, priority=rates).steps]
    assert words == ["drop 1", "load 4", "drop 2", "load 3", "drop 0", "load 5"]
    by_gpu = migration_plan(a, b, priority=rates.reshape(2, 6))
    assert [f"{step.kind} {step.pair}" for step in by_gpu.steps] == words


def test_servers_are_matched_by_name() -> None:
    """The first placement may list the servers in another order; GPUs count as in the second."""
    a = placed([[0], [1, 2]], [1, 2], pairs=3, names=["x", "y"])
    b = placed([[1, 2], [0]], [2, 1], pairs=3, names=["y", "x"])
    assert migration_plan(a, b).steps == ()


def test_more_capacity_makes_room() -> None:
    """A capacity that is given counts, not that of the second placement."""
    a = placed([[0], [1]], [1, 1], pairs=2)
    b = placed([[1], [0]], [1, 1], pairs=2)
    plan = migration_plan(a, b, gpu_capacity=((2,), (1,)))
    assert check_plan(plan, a, b, gpu_capacity=((2,), (1,))) == []
    assert plan.extra_loads == 0
    assert "over the capacity" in check_plan(plan, a, b)[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ["s0", "t"]}, "['t', 's0']; expected ['s1', 's0'] as in second placement"),
        ({"gpus": [2]}, "servers"),
        ({"slots": [1, 2]}, "second placement: server 's0' gpu[0] holds 2 slots of experts"),
    ],
)
def test_placements_that_do_not_fit_together(changes: dict[str, object], words: str) -> None:
    """Other servers, other GPUs or too little room are refused, with the place."""
    kind: dict[str, object] = {"slots": [2, 2], "pairs": 2}
    a = placed([[0], [1]], **(kind | {k: v for k, v in changes.items() if k != "slots"}))  # type: ignore[arg-type]
    slots = changes.get("slots", [2, 2])
    b = placed([[0, 1], [1]], slots, pairs=2)  # type: ignore[arg-type]
    with pytest.raises(InputError) as caught:
        migration_plan(a, b)
    assert words in str(caught.value)


def test_other_refusals() -> None:
    """Another model, an expert that gets lost, a wrong shape, NaN."""
    a = placed([[0], [1]], [2, 2], pairs=2)
    with pytest.raises(WrongModel):
        migration_plan(a, placed([[0], [1]], [2, 2], pairs=3))
    with pytest.raises(InputError, match="layer 3 expert 1 is held nowhere"):
        migration_plan(a, placed([[0], [0]], [2, 2], pairs=2))
    with pytest.raises(InputError, match="priority: shape"):
        migration_plan(a, a, priority=np.zeros((1, 2)))
    with pytest.raises(InputError, match="priority: NaN"):
        migration_plan(a, a, priority=np.full((2, 2), np.nan))
    with pytest.raises(InputError, match="forbidden: shape"):
        migration_plan(a, a, forbidden=np.zeros((3, 1, 2), bool))
    with pytest.raises(InputError, match="gpu_capacity"):
        migration_plan(a, a, gpu_capacity=((2, 2),))


# ------------------------------------------------------------------------------------ unequal sizes


@st.composite
def unequal_cases(draw: st.DrawFn) -> tuple[Placement, Placement]:
    """Two placements of up to five experts of sizes 1 to 4 on two or three GPUs."""
    gpus, pairs = draw(st.integers(2, 3)), draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 4), min_size=pairs, max_size=pairs))
    assume(len(set(sizes)) > 1)
    both = []
    for _ in "ab":
        held = np.zeros((gpus, pairs), bool)
        held[
            draw(st.lists(st.integers(0, gpus - 1), min_size=pairs, max_size=pairs)), range(pairs)
        ] = True
        for g, j in draw(
            st.lists(st.tuples(st.integers(0, gpus - 1), st.integers(0, pairs - 1)), max_size=3)
        ):
            held[g, j] = True
        both.append(held)
    slots = (
        np.maximum(*(held @ np.array(sizes) for held in both)) + draw(st.integers(0, 2))
    ).tolist()
    a, b = (
        placed([np.flatnonzero(row) for row in held], slots, pairs=pairs, sizes=sizes)
        for held in both
    )
    return a, b


@settings(max_examples=150)
@given(case=unequal_cases())
def test_unequal_sizes_are_sound(case: tuple[Placement, Placement]) -> None:
    """What is found is safe in every order; nothing is found where nothing exists."""
    a, b = case
    try:
        plan = migration_plan(a, b)
    except Infeasible:
        return
    assert can_move(a, b)
    assert_sound(plan, a, b, most=100)


@settings(max_examples=100)
@given(case=unequal_cases())
def test_unequal_sizes_with_room_always_move(case: tuple[Placement, Placement]) -> None:
    """Room for all of both placements on every GPU: no extra load, no refusal."""
    a, b = case
    both = ((flat(a) | flat(b)) @ sizes_of(a)).tolist()
    plan = migration_plan(a, b, gpu_capacity=tuple((int(n),) for n in both))
    assert plan.extra_loads == 0
    assert check_plan(plan, a, b, gpu_capacity=tuple((int(n),) for n in both)) == []


def test_unequal_sizes_use_temporary_copies_and_lent_room() -> None:
    """A swap over a third GPU's room, and one over the room of a duplicate."""
    a = placed([[0], [1], []], [4, 4, 3], pairs=2, sizes=[3, 4])
    b = placed([[1], [0], []], [4, 4, 3], pairs=2, sizes=[3, 4])
    plan = migration_plan(a, b)
    assert plan.extra_loads == 1
    assert_sound(plan, a, b)
    a = placed([[0, 2], [1], [2]], [5, 3, 3], pairs=3, sizes=[2, 3, 3])
    b = placed([[1, 0], [2], [2]], [5, 3, 3], pairs=3, sizes=[2, 3, 3])
    assert_sound(migration_plan(a, b), a, b)
    a = placed([[0, 2], [1], [2]], [5, 2, 3], pairs=3, sizes=[2, 2, 3])
    b = placed([[1, 2], [0], [2]], [5, 2, 3], pairs=3, sizes=[2, 2, 3])
    plan = migration_plan(a, b)
    assert plan.extra_loads == 1
    assert_sound(plan, a, b)


def test_unequal_sizes_tell_of_gaps() -> None:
    """Three bytes are free, but no GPU has room for any of the two: said with GPU and bytes."""
    a = placed([[0], [1], []], [4, 4, 2], pairs=2, sizes=[3, 4])
    b = placed([[1], [0], []], [4, 4, 2], pairs=2, sizes=[3, 4])
    assert not can_move(a, b)
    with pytest.raises(Infeasible) as caught:
        migration_plan(a, b)
    assert "server 's0' gpu[0] has 1 bytes free for layer 1 expert 0 of 4 bytes" in str(
        caught.value
    )
    assert "short by 3 bytes" in str(caught.value)


# -------------------------------------------------------------------------------- time, and replay


def test_load_seconds_by_hand() -> None:
    """GPUs load side by side, one at a time each; a load waits for the drops that it needs."""
    a = placed([[0, 1], [2, 3], []], [2, 2, 2], pairs=4)
    b = placed([[0, 1], [2, 3], [0, 2]], [2, 2, 2], pairs=4)
    second = [10e-9] * 3  # 10 bytes at 10 bytes per second
    plan = migration_plan(a, b)
    assert plan.load_seconds(second) == LoadTime(2.0, 2.0)
    assert plan.loading_s(second) == [0.0, 0.0, 2.0]
    swap_a = placed([[0], [1], []], [1, 1, 1], pairs=2)
    swap_b = placed([[1], [0], []], [1, 1, 1], pairs=2)
    swap = migration_plan(swap_a, swap_b)
    assert swap.load_seconds([10e-9, 5e-9, 20e-9]) == LoadTime(3.5, 3.5)  # a chain: 0.5 + 1 + 2
    side = placed([[0, 1, 2], [0, 1, 2]], [4, 4], pairs=4)
    more = placed([[0, 1, 2, 3], [0, 1, 2, 3]], [4, 4], pairs=4)
    assert migration_plan(side, more).load_seconds([10e-9, 10e-9]) == LoadTime(2.0, 1.0)
    with pytest.raises(ValueError, match="2 load bandwidths for 3 GPUs"):
        plan.load_seconds([1.0, 1.0])


@settings(max_examples=50)
@given(case=small_cases(most_slack=3), rates=st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_makespan_lies_between_its_bounds(
    case: tuple[Placement, Placement], rates: list[int]
) -> None:
    """At least the slowest GPU's own loads and the longest chain, at most the sum."""
    a, b = case
    try:
        plan = migration_plan(a, b)
    except Infeasible:
        assume(False)
    gbs = [rate * 1e-9 for rate in rates[: len(flat(a))]]
    time = plan.load_seconds(gbs)
    end: list[float] = []
    for step in plan.steps:
        own = 10 / rates[step.gpu] if step.kind == "load" else 0.0
        end.append(own + max((end[need] for need in step.needs), default=0.0))
    least = max([*plan.loading_s(gbs), *end, 0.0])
    assert least - 1e-9 <= time.makespan_s <= time.sum_s + 1e-9
    assert time.sum_s == pytest.approx(sum(plan.loading_s(gbs)))


def test_replay_finds_what_is_wrong() -> None:
    """Each kind of broken plan is told: order, double steps, lost experts, memory, the end."""
    a = placed([[0], [1], []], [1, 1, 1], pairs=2)
    b = placed([[1], [0], []], [1, 1, 1], pairs=2)
    good = migration_plan(a, b)
    cases = {
        "needs a step that is not before it": (MigrationStep("load", 2, 0, (0,)), *good.steps[1:]),
        "already there": (good.steps[0], good.steps[0], *good.steps[1:]),
        "not there": (MigrationStep("drop", 2, 0), *good.steps),
        "no copy is left": good.steps[1:],
        "over the capacity by 1": (MigrationStep("load", 0, 1), *good.steps),
        "differs from the second placement in 4 places": (),
    }
    for words, steps in cases.items():
        assert any(words in problem for problem in check_plan(good.replace(steps=steps), a, b))


def test_the_graph_is_that_of_the_needs() -> None:
    """Nodes are step numbers, edges lead from what is needed, and there is no cycle."""
    import networkx as nx

    a = placed([[0], [1], []], [1, 1, 1], pairs=2)
    b = placed([[1], [0], []], [1, 1, 1], pairs=2)
    plan = migration_plan(a, b)
    graph = plan.graph()
    assert nx.is_directed_acyclic_graph(graph)
    assert set(graph.edges) == {(n, i) for i, s in enumerate(plan.steps) for n in s.needs}
    assert list(nx.lexicographical_topological_sort(graph)) == list(range(len(plan.steps)))
    assert capacities(b).tolist() == [1, 1, 1]
