"""The referee of small instances: its optimum beside enumeration, the measure, and HiGHS."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.simulate.routing_policies import cover
from prism_plan.solvers.paths import shortest_paths
from studies.small_instances.gap import gap_of
from studies.small_instances.instances import SmallInstance, draw
from studies.small_instances.integer_program import solve_integer_program
from studies.small_instances.layer_tables import layer_table, steps_of_layer
from studies.small_instances.optimum import Measure, Parts, optimum
from studies.small_instances.program import best_choices
from studies.small_instances.record import read_record

SEEDS = st.integers(0, 2**32 - 1)
#: Shape of instances in which all plans are enumerated: servers, layers, experts.
TINY = ((2, 2, 3), (2, 3, 2), (3, 2, 2), (3, 1, 3))


def drawn_holders(rng: np.random.Generator, small: SmallInstance) -> npt.NDArray[np.bool_]:
    """Every expert on one server or more, a layer within the slots, bool [N, L, E]."""
    servers, model = small.cluster.num_servers, small.trace.model
    while True:
        held = rng.random((servers, model.num_layers, model.num_experts)) < rng.uniform(0.1, 0.6)
        nowhere = ~held.any(axis=0)
        held[rng.integers(servers, size=int(nowhere.sum())), *np.nonzero(nowhere)] = True
        if (held.sum(axis=2) <= np.array(small.slots)[:, None]).all():
            return held


def tie_free(small: SmallInstance) -> bool:
    """Whether no choice of a server changes the measure: equal links, and decode steps only."""
    return small.cluster.num_servers == 2 or (small.equal_links and not small.prefill_tokens)


@pytest.mark.parametrize("number", [0, 1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("shape", TINY)
def test_no_plan_is_better(shape: tuple[int, int, int], number: int) -> None:
    """All placements of tiny instances, each with its best table, by the measure itself."""
    servers, layers, experts = shape
    small = draw(number, servers=servers, layers=layers, experts=experts)
    measure = Measure(small)
    best_s = np.inf
    ways = range(1, 1 << servers)
    for holders in itertools.product(ways, repeat=layers * experts):
        masks = np.array(holders).reshape(layers, experts)
        held = (masks >> np.arange(servers)[:, None, None]) & 1 == 1
        if (held.sum(axis=(1, 2)) <= small.slots).all():
            table = shortest_paths(measure.idle_time(held))
            best_s = min(best_s, measure.value_s(held, table))
    found = optimum(small)
    assert found.bound_s <= best_s * (1 + 1e-9)
    assert found.value_s >= best_s * (1 - 1e-9)
    if tie_free(small):
        assert found.value_s == pytest.approx(best_s, rel=1e-9)
        assert found.bound_s == pytest.approx(best_s, rel=1e-9)


def test_enumeration_meets_the_optimum_where_no_choice_matters() -> None:
    """The test above compares equal values in half of its cases, not bounds alone."""
    drawn = [draw(i, servers=s, layers=la, experts=e) for i in range(3) for s, la, e in TINY]
    assert sum(map(tie_free, drawn)) >= 6


@settings(max_examples=30)
@given(seed=SEEDS)
def test_tables_are_the_measure_of_any_plan(seed: int) -> None:
    """A plan's layers by their tables, where nothing else fits the counts, and its messages."""
    rng = np.random.default_rng(seed)
    small = draw(int(rng.integers(10_000)), experts=4, layers=2)
    measure = Measure(small)
    parts = Parts.of(small, measure)
    held = drawn_holders(rng, small)
    columns = rng.integers(len(parts.columns), size=2)
    table = parts.columns[columns].T
    assert parts.messages.hop_s.shape == (len(parts.columns),) * 2
    base = 5 ** np.arange(small.cluster.num_servers)
    index = (held.sum(axis=2).T * base).sum(axis=1)
    layers_s = sum(parts.tables[la].seconds[columns[la], index[la]] for la in range(2))
    messages = parts.messages
    messages_s = (
        messages.start_s[columns[0]]
        + messages.hop_s[columns[0], columns[1]]
        + messages.id_s[columns[1], columns[0]]
    )
    idle = measure.idle_time(held)
    assert messages_s == pytest.approx(measure.weights @ idle.messages_s(table), rel=1e-12)
    assert layers_s + messages_s <= measure.value_s(held, table) * (1 + 1e-12)
    # the plan that the tables have for these counts takes what they say
    local, _ = parts.plan(list(zip(columns.tolist(), index.tolist(), strict=True)))
    assert (local.sum(axis=2) == held.sum(axis=2)).all()
    assert local.any(axis=0).all()
    value_s = measure.value_s(local, table)
    assert layers_s + messages_s <= value_s * (1 + 1e-12)
    if tie_free(small):
        assert layers_s + messages_s == pytest.approx(value_s, rel=1e-9)
    # and no more than with every tie at the worse server
    worse = Parts.of(small, measure, ties="worse")
    local, _ = worse.plan(list(zip(columns.tolist(), index.tolist(), strict=True)))
    most_s = sum(worse.tables[la].seconds[columns[la], index[la]] for la in range(2))
    assert measure.value_s(local, table) <= (most_s + messages_s) * (1 + 1e-12)
    assert layers_s <= most_s * (1 + 1e-12)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_highs_proves_the_same_optimum(number: int) -> None:
    """An integer program of the same parts has the value of the dynamic programme as its bound."""
    small = draw(1000 + number, servers=2, layers=3, experts=4)
    measure = Measure(small)
    parts = Parts.of(small, measure)
    chosen, seconds = best_choices(parts.tables, parts.messages, parts.slots)
    also, objective_s, bound_s = solve_integer_program(
        parts.tables, parts.messages, parts.slots, time_limit_s=60.0
    )
    assert objective_s == pytest.approx(seconds, rel=1e-6)
    assert bound_s == pytest.approx(seconds, rel=1e-6)
    for choice in (chosen, also):
        assert measure.value_s(*parts.plan(choice)) == pytest.approx(seconds, rel=1e-6)
        assert (parts.plan(choice)[0].sum(axis=(1, 2)) <= small.slots).all()


@pytest.mark.parametrize("number", [52, pytest.param(61, marks=pytest.mark.long)])
def test_the_record_is_of_these_instances(number: int) -> None:
    """Instances are drawn as they were when the file was written, and their optima hold.

    No solver is below the bound; two of the quick instances are proven again.
    """
    recorded = read_record()["instances"][str(number)]
    small = draw(number)
    assert recorded["digest"] == small.digest()
    assert recorded["slots"] == list(small.slots)
    proven = optimum(small)
    assert proven.value_s == pytest.approx(recorded["optimum"]["value_s"], rel=1e-9)
    assert proven.bound_s == pytest.approx(recorded["optimum"]["bound_s"], rel=1e-9)
    gap = gap_of("layer-partition+paths", number)
    assert gap is not None
    assert gap.to_bound >= -1e-9


def test_a_step_to_two_servers() -> None:
    """Two experts on two other servers: messages leave in turn, answers share the way in."""
    small = next(
        s for i in range(50) if (s := draw(i, layers=1, experts=2)).trace.model.top_k == 2
        and not s.equal_links and not s.prefill_tokens
    )  # fmt: skip
    assert cover([[1], [2]], [0, 0, 0]) == [1, 2]
    measure = Measure(small)
    steps = steps_of_layer(measure.prompts, 3, 0)
    assert list(steps) == [((0, 1),)]
    held = np.zeros((3, 1, 2), bool)
    held[1, 0, 0] = held[2, 0, 1] = True
    counts = np.array([0, 1, 1]) @ 3 ** np.arange(3)
    columns = np.zeros((1, 3), np.int64)
    shares = measure.weights[:, None] * measure.anywhere.shares
    table = layer_table(steps, shares, columns, (2, 2, 2), small.trace.model, small.cluster)
    link, pairs = small.cluster.link, {(p.a, p.b): p for p in small.cluster.pair_links}
    state = small.trace.model.hidden_size * 2
    rate = [0.0, *(pairs[0, m].bandwidth_mbps / 8e-6 for m in (1, 2))]
    half_s = [0.0, *(pairs[0, m].rtt_ms / 2e3 for m in (1, 2))]
    left = [0.0, link.call_overhead_ms / 1e3 + (state + 4) / rate[1]]
    left.append(left[1] + (state + 4) / rate[2])
    ready = {m: left[m] + half_s[m] for m in (1, 2)}
    way_in, done = 0.0, 0.0
    for m in sorted(ready, key=ready.__getitem__):
        way_in = max(way_in, ready[m]) + state / rate[m]
        done = max(done, way_in + half_s[m])
    weight = float((shares @ steps[(0, 1),]).sum())
    assert table.seconds[0, counts] == pytest.approx(weight * done, rel=1e-9)
