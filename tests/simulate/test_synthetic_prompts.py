"""Tests of tokens drawn from counts, against enumeration and closed forms."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError
from prism_plan.model_spec import ModelSpec
from prism_plan.simulate.synthetic_prompts import (
    UNIT,
    draw_prompts,
    draw_tokens,
    inclusion_units,
    systematic_sample,
    task_units,
)
from prism_plan.trace import Trace


def inclusion(counts: list[int], top_k: int) -> list[Fraction]:
    """Inclusion probabilities by their definition: cap at one, spread the rest, one at a time."""
    capped: set[int] = set()
    while True:
        total = sum(count for e, count in enumerate(counts) if e not in capped)
        rest = top_k - len(capped)
        probability = [
            Fraction(1) if e in capped else Fraction(count * rest, total) if total else Fraction(0)
            for e, count in enumerate(counts)
        ]
        over = [e for e, p in enumerate(probability) if p > 1]
        if not over:
            return probability
        capped.add(max(over, key=lambda e: probability[e]))


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[int], int]:
    """Counts of one layer, some zero and some huge, and a top-k that they allow."""
    top_k = draw(st.integers(1, 4))
    sizes = st.one_of(st.integers(1, 20), st.integers(10**9, 10**12))
    called = draw(st.lists(sizes, min_size=top_k, max_size=7))
    counts = called + [0] * draw(st.integers(0, 2))
    return draw(st.permutations(counts)), top_k


@given(layers())
@settings(max_examples=200)
def test_inclusion_units(case: tuple[list[int], int]) -> None:
    """Units sum to K exactly, none is beyond one, and each is within one unit of its definition."""
    counts, top_k = case
    units = inclusion_units(np.array(counts), top_k)
    assert units.sum() == top_k * UNIT
    assert units.min() >= 0
    assert units.max() <= UNIT
    for unit, probability in zip(units.tolist(), inclusion(counts, top_k), strict=True):
        assert abs(unit - probability * UNIT) < 1


@pytest.mark.parametrize(
    ("counts", "top_k", "expected"),
    [
        ([1, 1, 1, 1], 2, [6, 6, 6, 6]),
        ([100, 1, 1, 1], 2, [12, 4, 4, 4]),
        ([5, 5, 0, 0], 2, [12, 12, 0, 0]),
        ([1000, 100, 1, 1], 3, [12, 12, 6, 6]),
        ([1, 2, 3], 1, [2, 4, 6]),
        ([7, 7, 7], 3, [12, 12, 12]),
    ],
)
def test_inclusion_by_hand(counts: list[int], top_k: int, expected: list[int]) -> None:
    """Small cases in twelfths: equal, capped once, all capped, capped twice, top-1, all called."""
    assert inclusion_units(np.array(counts), top_k, unit=12).tolist() == expected


def test_too_few_experts() -> None:
    """A token cannot call two experts where one alone is called."""
    with pytest.raises(ValueError, match="fewer than 2"):
        inclusion_units(np.array([5, 0, 0]), 2)


@given(layers(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_inclusion_is_exact_in_any_order(case: tuple[list[int], int], random: object) -> None:
    """Over all starts of the comb, each expert is taken exactly as often as its units say."""
    counts, top_k = case
    unit = 60
    units = inclusion_units(np.array(counts), top_k, unit=unit)
    order = np.arange(len(counts))
    random.shuffle(order)  # type: ignore[attr-defined]
    rows = np.tile(units, (unit, 1))
    taken = systematic_sample(rows, np.tile(order, (unit, 1)), np.arange(unit), top_k, unit=unit)
    assert all(len(set(row)) == top_k for row in taken.tolist())
    np.testing.assert_array_equal(np.bincount(taken.ravel(), minlength=len(counts)), units)


def test_systematic_by_hand() -> None:
    """The comb lies over the experts in the given order: here 2, 0, 1 with lengths 1, 4, 3."""
    units = np.array([[4, 3, 1]] * 4)
    order = np.array([[2, 0, 1]] * 4)
    taken = systematic_sample(units, order, np.array([0, 1, 2, 3]), 2, unit=4)
    assert taken.tolist() == [[2, 0], [0, 1], [0, 1], [0, 1]]


def test_marginals_of_drawn_tokens() -> None:
    """Frequencies over 20,000 tokens are within five standard errors of the probabilities."""
    counts = np.array([[40, 30, 20, 10, 5, 0], [900, 10, 10, 10, 10, 10]])
    units = np.array([inclusion_units(layer, 2) for layer in counts])
    tokens = 20_000
    drawn = draw_tokens(np.random.default_rng(1), units, 2, tokens)
    assert drawn.shape == (tokens, 2, 2)
    assert (drawn[:, :, 0] != drawn[:, :, 1]).all()
    for layer in range(2):
        found = np.bincount(drawn[:, layer].ravel(), minlength=6) / tokens
        expected = units[layer] / UNIT
        error = np.sqrt(expected * (1 - expected) / tokens)
        assert (np.abs(found - expected) <= 5 * error).all()


def test_pairs_in_random_order() -> None:
    """Of four equal experts every pair is taken equally often: orders are random, not fixed."""
    tokens = 12_000
    units = inclusion_units(np.ones(4, np.int64), 2)[None, :]
    drawn = np.sort(draw_tokens(np.random.default_rng(2), units, 2, tokens)[:, 0], axis=1)
    number = tokens / 6
    chi_square = 0.0
    for pair in itertools.combinations(range(4), 2):
        found = int((drawn == pair).all(axis=1).sum())
        chi_square += (found - number) ** 2 / number
    assert chi_square < 25.7  # 1e-4 quantile of five degrees of freedom


def test_blocks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn in many small blocks, tokens still have K different experts and the marginals."""
    monkeypatch.setattr("prism_plan.simulate.synthetic_prompts.BLOCK", 50)
    units = inclusion_units(np.array([8, 4, 2, 2]), 2)[None, :]
    drawn = draw_tokens(np.random.default_rng(3), units, 2, 4_001)[:, 0]
    assert (drawn[:, 0] != drawn[:, 1]).all()
    found = np.bincount(drawn.ravel(), minlength=4) / 4_001
    np.testing.assert_allclose(found, [1, 0.5, 0.25, 0.25], atol=5 * math.sqrt(0.25 / 4_001))


def test_mixtral(mixtral_trace: Trace) -> None:
    """Drawn from Mixtral's real counts, calls of each layer and expert are as often as counted."""
    tokens = 4_000
    units = task_units(mixtral_trace, 0)
    drawn = draw_tokens(np.random.default_rng(4), units, 2, tokens)
    counts = mixtral_trace.counts[0]
    expected = 2 * counts / counts.sum(axis=1, keepdims=True)
    assert expected.max() < 1
    found = np.stack([np.bincount(drawn[:, layer].ravel(), minlength=8) for layer in range(32)])
    error = np.sqrt(expected * (1 - expected) / tokens)
    assert (np.abs(found / tokens - expected) <= 5 * error).all()
    assert (drawn[:, :, 0] != drawn[:, :, 1]).all()


def counted(counts: list[list[list[int]]]) -> Trace:
    """A counts-only trace of tasks a, b, ... and a top-2 model."""
    array = np.array(counts)
    model = ModelSpec(
        name="tiny",
        moe_layers=tuple(range(1, array.shape[1] + 1)),
        num_experts=array.shape[2],
        top_k=2,
        hidden_size=8,
        dtype_bytes=2,
        expert_bytes=100,
        dense_bytes=0,
        kv_bytes_per_token=0,
    )
    tokens = array.sum(axis=(1, 2))
    return Trace(model, tuple("abcdef"[: len(counts)]), array, tokens, name="counted")


def test_prompts() -> None:
    """Each prompt has its lengths, draws from its own task, and depends on its own number alone."""
    trace = counted([[[1, 1, 1, 0, 0, 0]], [[0, 0, 0, 1, 1, 1]]])

    def draw(task: list[int], number: list[int]) -> np.ndarray:
        prompts = draw_prompts(
            trace,
            np.array(task, np.int32),
            np.array(number, np.int32),
            prefill_tokens=5,
            decode_tokens=3,
            seed=7,
        )
        assert not prompts.co_activation
        assert prompts.prefill_tokens.tolist() == [5] * len(task)
        assert prompts.decode_tokens.tolist() == [3] * len(task)
        assert prompts.first_row.tolist() == [8 * at for at in range(len(task))]
        return prompts.experts.reshape(len(task), 8, 1, 2)

    three = draw([0, 0, 1], [0, 9, 9])
    assert three[:2].max() <= 2
    assert three[2].min() >= 3
    assert (three[0] != three[1]).any()
    np.testing.assert_array_equal(draw([0, 1], [9, 9]), three[1:])


def test_layer_with_too_few_experts() -> None:
    """A layer in which one expert alone was called is refused, with task and layer."""
    trace = counted([[[1, 1, 1], [3, 0, 0]]])
    with pytest.raises(InputError, match="calls of 1 experts") as caught:
        task_units(trace, 0)
    assert caught.value.place == "task 'a' layer 2"
