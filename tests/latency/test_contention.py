"""The delay of phases that are there together: its definition, integrated, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_plan.latency.contention import delay_s

SECONDS = st.floats(0.01, 100.0)


def delay(slowdown: float, own_s: float, their_s: float, there: float) -> float:
    """The delay of one pair of phases."""
    values = (np.array(value) for value in (slowdown, own_s, their_s, there))
    return float(delay_s(*values))


def one_delay_s(begins_s: float, slowdown: float, own_s: float, their_s: float) -> float:
    """Seconds by which another that begins at a time delays a phase that begins at zero.

    By the definition: work goes on at full speed alone, at 1 / (1 + slowdown) beside the other.
    """
    before = min(max(begins_s, 0.0), own_s)  # done before the other is there
    beside_s = begins_s + their_s - max(begins_s, 0.0)
    return slowdown * min(own_s - before, beside_s / (1 + slowdown))


@given(
    slowdown=st.floats(0.0, 20.0),
    own_s=SECONDS,
    their_s=SECONDS,
    there=st.sampled_from([0, 0.3, 1]),
)
def test_the_delay_is_the_integral_of_its_definition(
    slowdown: float, own_s: float, their_s: float, there: float
) -> None:
    """Over all times at which the other can begin, by the midpoint rule."""
    number = 2000
    middles = (np.arange(number) + 0.5) / number
    later, before = (
        length
        * np.mean([one_delay_s(t, slowdown, own_s, their_s) for t in length * middles - back])
        for length, back in ((own_s, 0.0), (their_s, their_s))
    )
    expected = later + there * before
    assert delay(slowdown, own_s, their_s, there) == pytest.approx(expected, rel=2e-3, abs=1e-9)


@given(slowdown=st.floats(0.0, 1e9), own_s=SECONDS, their_s=SECONDS)
def test_limits(slowdown: float, own_s: float, their_s: float) -> None:
    """No longer than the other lasts each time; slight slowdowns add up over the time together."""
    assert 0 <= delay(slowdown, own_s, their_s, 1.0) <= their_s * (own_s + their_s) * (1 + 1e-6)
    assert delay(1e-9, own_s, their_s, 1.0) == pytest.approx(1e-9 * own_s * their_s, rel=1e-5)
