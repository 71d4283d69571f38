"""The two stages of Prism and Lemma 1."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from prism_plan.errors import InputError
from prism_plan.instance import Instance
from prism_plan.model_spec import ModelShape
from prism_plan.solvers import solve
from prism_plan.solvers.entropy import (
    entropy_counts,
    layer_entropy,
    lemma1_bound,
    repair_counts,
)
from prism_plan.solvers.greedy import greedy_with_coverage


def instance_of(activations: object, slots: list[int]) -> Instance:
    """An instance with one GPU a server."""
    array = np.asarray(activations, float)
    model = ModelShape("m", tuple(range(array.shape[1])), array.shape[2], 1, 1)
    return Instance(
        model, tuple(f"s{n}" for n in range(len(array))), array, tuple((s,) for s in slots)
    )


@settings(max_examples=100)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_entropy_is_scipys(values: list[float]) -> None:
    """Entropy in nats equals scipy's; no calls have no entropy."""
    array = np.array(values)
    want = scipy_entropy(array) if array.sum() > 0 else 0.0
    assert layer_entropy(array) == pytest.approx(want, abs=1e-9)


def test_counts_follow_entropy() -> None:
    """K = C·H/ΣH: even use gets the slots, a layer of one expert only what repair gives it."""
    instance = instance_of([[[1, 1, 1, 1], [9, 0, 0, 0]]], [8])
    assert entropy_counts(instance).tolist() == [[4, 4]]  # capped at E, the rest to the other
    pair = instance_of([[[1, 1, 1, 1], [9, 0, 0, 0]]] * 2, [4, 4])
    counts = entropy_counts(pair)
    assert counts.sum(axis=1).tolist() == [4, 4]
    assert counts.sum(axis=0).tolist() == [4, 4]  # repair took from the surplus of layer 0


def test_largest_remainders() -> None:
    """Entropies 1:1:2 on 6 slots give quotas 1.5, 1.5, 3: the lowest tied layer gets the rest."""
    uniform = {1: [1, 1, 0, 0], 2: [1, 1, 1, 1]}
    instance = instance_of([[uniform[1], uniform[1], uniform[2]]] * 3, [6, 6, 12])
    counts = entropy_counts(instance)
    assert counts[0].tolist() == [2, 1, 3]
    assert counts[2].tolist() == [4, 4, 4]


def test_a_server_without_calls_gets_uniform_counts() -> None:
    """No activations: the slots are spread over the layers, remainders to the lowest."""
    instance = instance_of(np.stack([np.zeros((3, 4)), np.ones((3, 4))]), [7, 12])
    assert entropy_counts(instance)[0].tolist() == [3, 2, 2]


@pytest.mark.parametrize("seed", range(60))
def test_counts_are_sound(seed: int) -> None:
    """Counts use every slot, never exceed E, and leave room for all experts of every layer."""
    rng = np.random.default_rng(seed)
    servers, layers, experts = (int(rng.integers(1, 6)) for _ in range(3))
    activations = rng.gamma(0.3, size=(servers, layers, experts)).round(int(rng.integers(0, 3)))
    slots = rng.integers(0, layers * experts + 2, servers)
    slots[-1] += max(0, layers * experts - int(slots.sum()))
    instance = instance_of(activations, slots.tolist())
    counts = entropy_counts(instance)
    assert counts.sum(axis=1).tolist() == instance.slots.tolist()
    assert counts.min() >= 0
    assert counts.max() <= experts
    assert counts.sum(axis=0).min() >= experts
    local = greedy_with_coverage(instance, counts)
    assert (local.sum(axis=2) == counts).all()
    assert local.any(axis=0).all()


def test_repair_takes_from_the_largest_server_first() -> None:
    """The server with the largest capacity gives up a slot of the layer with most surplus."""
    counts = np.array([[4, 0, 2], [4, 1, 3]])
    repaired = repair_counts(counts, np.array([6, 8]), 3)
    # layer 1 is short of two: server 1 has more slots and gives twice, first from layer 0
    assert repaired.tolist() == [[4, 0, 2], [2, 3, 3]]


def test_greedy_takes_the_most_used() -> None:
    """Without coverage to repair each server holds its most used experts, ties to the lowest."""
    instance = instance_of([[[3, 9, 3, 1]], [[1, 1, 5, 2]]], [2, 3])
    local = greedy_with_coverage(instance, np.array([[2], [3]]))
    assert local[0, 0].tolist() == [True, True, False, False]
    assert local[1, 0].tolist() == [True, False, True, True]


def test_greedy_repairs_coverage() -> None:
    """The server with most duplicates drops its least used one for the uncovered it uses most."""
    use = [[[9, 8, 1, 2]], [[9, 8, 0, 0]]]
    local = greedy_with_coverage(instance_of(use, [2, 2]), np.array([[2], [2]]))
    # both hold 0 and 1; server 0 drops 1 for 3; then server 0 and 1 share only 0: 0 drops it for 2
    assert local[0, 0].tolist() == [False, False, True, True]
    assert local[1, 0].tolist() == [True, True, False, False]


def test_halves_make_the_solver() -> None:
    """`prism` is greedy on entropy counts, nothing else."""
    rng = np.random.default_rng(1)
    instance = instance_of(rng.gamma(0.5, size=(3, 4, 8)), [14, 12, 20])
    local = greedy_with_coverage(instance, entropy_counts(instance))
    assert (solve(instance, "prism").local == local).all()


def test_greedy_needs_room() -> None:
    """Counts that leave no room for some expert are refused."""
    with pytest.raises(ValueError, match="fewer slots"):
        greedy_with_coverage(instance_of(np.ones((1, 1, 3)), [2]), np.array([[2]]))


@settings(max_examples=200)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(lambda v: sum(v) > 1e-6),
    st.floats(0, 0.5),
)
def test_lemma1_against_brute_force(values: list[float], delta: float) -> None:
    """No set of experts smaller than the bound covers 1 − δ of the calls."""
    p = np.array(values) / np.sum(values)
    size = next(
        k
        for k in range(1, len(p) + 1)
        if any(math.fsum(subset) >= 1 - delta - 1e-12 for subset in itertools.combinations(p, k))
    )
    assert size >= lemma1_bound(p, delta) - 1e-6


def test_lemma1_is_tight_for_uniform_use() -> None:
    """With δ = 0 and uniform use all E experts are needed, and the bound says so."""
    assert lemma1_bound(np.full(64, 1 / 64), 0.0) == pytest.approx(64)


@pytest.mark.parametrize(
    ("p", "delta"), [([0.5, 0.4], 0.1), ([0.5, 0.5], 0.6), ([1.5, -0.5], 0.1), ([math.nan], 0.1)]
)
def test_lemma1_refuses_nonsense(p: list[float], delta: float) -> None:
    """Not a distribution, or δ above one half."""
    with pytest.raises(InputError):
        lemma1_bound(np.array(p), delta)
