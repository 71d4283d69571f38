"""Exact sums against math.fsum, which is correctly rounded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from prism_plan.exact_sum import exact_row_sums, exact_sum

SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40)
FLOATS = st.floats(-(2.0**900), 2.0**900, allow_nan=False)


def ill_conditioned(seed: int, count: int) -> np.ndarray:
    """Values of all magnitudes whose sum is far smaller than they are."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=count // 2) * 2.0 ** rng.integers(-300, 300, count // 2)
    small = rng.normal(size=count - 2 * len(half) + 7) * 2.0**-320
    return rng.permutation(np.concatenate([half, -half, small]))


@settings(max_examples=200)
@given(values=arrays.arrays(np.float64, SHAPES, elements=FLOATS))
def test_equals_fsum(values: np.ndarray) -> None:
    """Zeros, subnormal numbers and cancellation included, every bit is that of math.fsum."""
    assert exact_sum(values) == math.fsum(values.ravel())
    assert exact_row_sums(values).tolist() == [math.fsum(row) for row in values]


@pytest.mark.parametrize("count", [2, 257, 16_384, 16_385, 100_001])
@pytest.mark.parametrize("seed", range(4))
def test_equals_fsum_where_almost_everything_cancels(seed: int, count: int) -> None:
    """Sums of all lengths around the size of a block, of values that cancel to 1e-180 of them."""
    values = ill_conditioned(seed, count)
    assert exact_sum(values) == math.fsum(values)
    assert exact_row_sums(np.stack([values, values[::-1]])).tolist() == [math.fsum(values)] * 2


@pytest.mark.parametrize("seed", range(4))
def test_equals_fsum_halfway_between_two_floats(seed: int) -> None:
    """A sum halfway between two floats, but for one value far below, is rounded to its side."""
    rng = np.random.default_rng(seed)
    for tiny in (-(2.0**-200), 0.0, 2.0**-200):
        values = rng.permutation(np.array([1.0, 2.0**-53, tiny] + [0.0] * 1000))
        assert exact_sum(values) == math.fsum(values)


def test_beyond_the_range_of_floats() -> None:
    """What math.fsum refuses is refused; infinity and not-a-number stay what they are."""
    assert exact_sum(np.full(1000, np.inf)) == math.inf
    assert math.isnan(exact_sum(np.full(1000, np.nan)))
    with pytest.raises(OverflowError):
        exact_sum(np.full(1000, 1e308))


def test_values_are_left_as_they_are() -> None:
    """The array may be read-only, and is not changed."""
    values = np.arange(1000.0)
    values.setflags(write=False)
    assert exact_sum(values) == 499_500.0
    assert exact_row_sums(values.reshape(2, 500)).tolist() == [124_750.0, 374_750.0]
