"""Means and percentiles in which homes count by their rates."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from prism_plan.simulate.requests import Requests
from prism_plan.simulate.user_means import request_weights, users_mean, users_percentile


def requests_of(homes: list[int], rate: list[float] | None) -> Requests:
    nothing, prompts = np.zeros(len(homes)), None
    known: Any = None if rate is None else np.array(rate)
    no_prompts: Any = prompts
    return Requests(
        ("a", "b", "c"), no_prompts, np.array(homes, np.int32), nothing,
        nothing.astype(np.int32), known,
    )  # fmt: skip


def test_equal_rates_weigh_nothing() -> None:
    """Where all requests weigh the same, and where rates change, plain means are taken."""
    assert request_weights(requests_of([0, 1, 2, 0, 1, 2], [0.3, 0.3, 0.3])) is None
    assert request_weights(requests_of([0, 1, 0, 1], [0.3, 0.3, 0.0])) is None
    assert request_weights(requests_of([0, 0, 1], [2.0, 1.0, 0.0])) is None
    assert request_weights(requests_of([0, 1], None)) is None


@given(
    rates=st.tuples(*[st.integers(1, 5)] * 3),
    seconds=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    percent=st.sampled_from([1, 50, 90, 99, 100]),
)
def test_a_weight_stands_for_that_many_requests(
    rates: tuple[int, ...], seconds: list[int], percent: int
) -> None:
    """Weighted figures are those of requests written out as often as their home's rate says."""
    homes = [0, 1, 2, 2, 1, 0]
    weights = request_weights(requests_of(homes, [float(rate) for rate in rates]))
    assert (weights is None) == (len(set(rates)) == 1)
    values = np.array(seconds, np.float64)
    written_out = np.repeat(values, [rates[home] for home in homes])
    assert users_mean(values, weights) == pytest.approx(float(written_out.mean()))
    if weights is not None:
        wanted = np.percentile(written_out, percent, method="inverted_cdf")
        assert users_percentile(values, weights, percent) == wanted
    else:
        assert users_percentile(values, None, percent) == np.percentile(values, percent)
