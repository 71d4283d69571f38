"""Estimated rates against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError
from prism_plan.migration.statistics import Cumulative, Statistics, StatisticsOptions, Window

SHAPE = (2, 3, 4)
BOTH = [Window(50.0), Cumulative()]


def fed(counting: StatisticsOptions, periods: list[tuple[float, float]]) -> Statistics:
    """Statistics of periods given by (calls per second of every expert, seconds)."""
    statistics = counting.start(SHAPE)
    for rate, seconds in periods:
        statistics.add(np.full(SHAPE, round(rate * seconds)), seconds)
    return statistics


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    seconds=st.lists(st.integers(1, 5000), min_size=1, max_size=20),
    half_life_s=st.floats(0.5, 1e6),
)
def test_a_constant_rate_has_no_bias(seed: int, seconds: list[int], half_life_s: float) -> None:
    """Whatever the periods and the half-life, a constant rate is estimated as it is, always."""
    rate = np.random.default_rng(seed).integers(0, 50, SHAPE)
    for counting in (Window(half_life_s), Cumulative()):
        statistics = counting.start(SHAPE)
        for elapsed_s in seconds:
            statistics.add(rate * elapsed_s, elapsed_s)
            assert statistics.rates() == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("half_life_s", [25.0, 50.0, 400.0])
def test_an_old_rate_halves_every_half_life(half_life_s: float) -> None:
    """Of M old periods and m new ones the old have the share q^m (1-q^M) / (1-q^(M+m))."""
    q = 2.0 ** (-50 / half_life_s)
    before = 7
    statistics = fed(Window(half_life_s), [(100, 50)] * before)
    for after in range(1, 12):
        statistics.add(np.zeros(SHAPE, int), 50)
        share = q**after * (1 - q**before) / (1 - q ** (before + after))
        assert statistics.rates() == pytest.approx(np.full(SHAPE, 100 * share), rel=1e-12)


def test_a_long_history_halves_exactly() -> None:
    """After very many half-lives of the old rate each further half-life leaves half of it."""
    statistics = fed(Window(50.0), [(64, 50)] * 200)
    for left in (32, 16, 8, 4):
        statistics.add(np.zeros(SHAPE, int), 50)
        assert statistics.rates() == pytest.approx(np.full(SHAPE, left), rel=1e-12)


def test_calls_are_kept_apart() -> None:
    """Each expert of each server has the rate of its own calls."""
    calls = np.arange(24).reshape(SHAPE)
    for counting in BOTH:
        statistics = counting.start(SHAPE)
        statistics.add(calls, 10.0)
        assert (statistics.rates() == calls / 10).all()


def test_cumulative_is_the_mean_since_the_last_move() -> None:
    """Calls of all periods over all seconds; a move starts anew."""
    statistics = fed(Cumulative(), [(4, 30), (1, 60)])
    assert statistics.rates() == pytest.approx(np.full(SHAPE, (4 * 30 + 60) / 90))
    statistics.moved()
    assert (statistics.rates() == 0).all()
    statistics.add(np.full(SHAPE, 70), 10.0)
    assert (statistics.rates() == 7).all()


def test_a_window_does_not_forget_at_a_move() -> None:
    """Where experts are does not change who calls them."""
    statistics = fed(Window(50.0), [(4, 30), (1, 60)])
    before = statistics.rates()
    statistics.moved()
    assert (statistics.rates() == before).all()


@pytest.mark.parametrize("history", [5, 20, 80])
def test_old_data_lingers_in_cumulative_statistics(history: int) -> None:
    """The new rate outweighs the old one after one half-life, or only after as long a history."""

    def periods_until_half(counting: StatisticsOptions) -> int:
        statistics = fed(counting, [(0, 50)] * history)
        for periods in range(1, 1000):
            statistics.add(np.full(SHAPE, 50), 50.0)
            if statistics.rates()[0, 0, 0] >= 0.5:
                return periods
        raise AssertionError

    assert periods_until_half(Window(50.0)) == 1
    assert periods_until_half(Cumulative()) == history


@pytest.mark.parametrize("counting", BOTH)
def test_nothing_has_happened_yet(counting: StatisticsOptions) -> None:
    """No time, no rates: zeros, not NaN; a period of no length adds nothing to divide by."""
    statistics = counting.start(SHAPE)
    assert (statistics.rates() == np.zeros(SHAPE)).all()
    statistics.add(np.zeros(SHAPE, int), 0.0)
    assert (statistics.rates() == np.zeros(SHAPE)).all()


@pytest.mark.parametrize("counting", BOTH)
def test_runs_share_nothing(counting: StatisticsOptions) -> None:
    """Options serve two runs; neither sees the other's calls, nor who writes into its rates."""
    first, second = counting.start(SHAPE), counting.start(SHAPE)
    first.add(np.full(SHAPE, 5), 1.0)
    assert (second.rates() == 0).all()
    first.rates()[:] = 9
    assert (first.rates() == 5).all()


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_half_lives_that_are_none(wrong: float) -> None:
    """A half-life is a number of seconds above 0."""
    with pytest.raises(InputError, match="half_life_s"):
        Window(wrong)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_periods_that_are_none(wrong: float) -> None:
    """Time does not run backwards."""
    with pytest.raises(ValueError, match="period"):
        Cumulative().start(SHAPE).add(np.zeros(SHAPE, int), wrong)


def test_calls_of_another_shape() -> None:
    """Calls that would broadcast are refused."""
    with pytest.raises(ValueError, match="shape"):
        Cumulative().start(SHAPE).add(np.zeros((1, 3, 4), int), 1.0)
