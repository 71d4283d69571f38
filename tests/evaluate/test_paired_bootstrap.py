"""Intervals of differences of means: coverage, pairs, and what is certain."""

from __future__ import annotations

import numpy as np
import pytest

from prism_plan.evaluate.paired_bootstrap import relative_difference


def test_intervals_hold_the_true_difference() -> None:
    """Of 200 drawn comparisons with a known difference of 10 % about 95 % of the intervals hold it.

    The ratio of two paired means, within samples that share a level of their own.
    """
    rng = np.random.default_rng(0)
    held = 0
    for number in range(200):
        level = rng.gamma(50, 0.02, (3, 1))
        other = level * rng.gamma(4, 0.25, (3, 60))
        one = 1.1 * other * rng.normal(1, 0.1, other.shape)
        low, high = relative_difference(one, other, number)
        held += low <= 0.1 <= high
    assert held >= 0.88 * 200


def test_what_is_equal_or_always_slower_is_certain() -> None:
    """Equal times differ by nothing; times that are all a tenth longer by a tenth."""
    other = np.random.default_rng(1).gamma(2, 1, (3, 40))
    assert relative_difference(other, other) == (0.0, 0.0)
    assert not relative_difference(other, other).significant
    slower = relative_difference(1.1 * other, other)
    assert slower == pytest.approx((0.1, 0.1))
    assert slower.significant


def test_noise_is_not_significant() -> None:
    """Two placements that differ in noise alone: no difference, in most of 50 cases."""
    rng = np.random.default_rng(2)
    told = 0
    for number in range(50):
        other = rng.gamma(2, 1, (3, 40))
        told += relative_difference(other[:, rng.permutation(40)], other, number).significant
    assert told <= 6


def test_the_seed_decides() -> None:
    """One seed gives one interval."""
    rng = np.random.default_rng(3)
    one, other = rng.gamma(2, 1, (2, 3, 20))
    assert relative_difference(one, other, 5) == relative_difference(one, other, 5)
    assert relative_difference(one, other, 5) != relative_difference(one, other, 6)
