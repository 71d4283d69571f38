"""Tests of Poisson arrivals, bursts, and fixed times from a file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.errors import InputError
from prism_plan.io.arrivals import parse_arrivals, read_arrivals
from prism_plan.seeds import RandomSource, random_stream
from prism_plan.simulate.arrival_trace import Arrival, ArrivalTrace
from prism_plan.simulate.poisson_arrivals import Intervals, arrivals_before, arrivals_by_number


def every(seconds: float) -> Intervals:
    """The same mean interval for all requests."""
    return lambda numbers: np.full(len(numbers), seconds)


def generator(seed: int = 0) -> np.random.Generator:
    return random_stream(seed, RandomSource.ARRIVALS, 0)


def test_gaps_are_exponential() -> None:
    """Mean, variance and tail of 50,000 gaps are those of the exponential distribution."""
    mean, number = 10.0, 50_000
    gaps = np.diff(arrivals_by_number(generator(), every(mean), number), prepend=0.0)
    assert abs(gaps.mean() - mean) < 5 * mean / math.sqrt(number)
    # the fourth central moment of an exponential is 9 m^4, so its variance has error sqrt(8) m^2
    assert abs(gaps.var() - mean**2) < 5 * math.sqrt(8) * mean**2 / math.sqrt(number)
    for multiple in (0.5, 1.0, 2.0, 4.0):
        tail = math.exp(-multiple)
        error = math.sqrt(tail * (1 - tail) / number)
        assert abs((gaps > multiple * mean).mean() - tail) < 5 * error


def test_counts_are_poisson() -> None:
    """Arrivals in 5,000 windows fit the Poisson distribution by a chi-square test."""
    windows = 5_000
    times = arrivals_before(generator(1), every(1.0), 2.0 * windows)
    found = np.bincount(np.histogram(times, windows, (0, 2.0 * windows))[0], minlength=8)
    chance = np.array([math.exp(-2) * 2**k / math.factorial(k) for k in range(7)])
    expected = windows * np.append(chance, 1 - chance.sum())
    observed = np.append(found[:7], found[7:].sum())
    assert ((observed - expected) ** 2 / expected).sum() < 29.9  # 1e-4 quantile, 7 degrees


@given(
    number=st.integers(1, 300),
    burst=st.integers(1, 9),
    duration_s=st.floats(0.1, 400.0),
    seed=st.integers(0, 5),
)
@settings(max_examples=80)
def test_one_stream_of_arrivals(number: int, burst: int, duration_s: float, seed: int) -> None:
    """By number and by duration arrivals are the same, and a longer run begins with a shorter."""
    short = arrivals_by_number(generator(seed), every(2.0), number, burst)
    long = arrivals_by_number(generator(seed), every(2.0), 2_000, burst)
    np.testing.assert_array_equal(short, long[:number])
    timed = arrivals_before(generator(seed), every(2.0), duration_s, burst)
    np.testing.assert_array_equal(timed, long[: len(timed)])
    assert (timed < duration_s).all()
    assert long[len(timed)] >= duration_s
    assert (np.diff(long) >= 0).all()
    assert long[0] > 0


@pytest.mark.parametrize("burst", [1, 3, 10])
def test_bursts_keep_the_rate(burst: int) -> None:
    """Bursts come together, their gaps are burst times as long, so the rate stays."""
    number = 30_000
    times = arrivals_by_number(generator(), every(4.0), number, burst)
    np.testing.assert_array_equal(times, np.repeat(times[::burst], burst))
    single = arrivals_by_number(generator(), every(4.0), number // burst)
    np.testing.assert_allclose(times[::burst], burst * single, rtol=1e-12)
    assert abs(times[-1] / number - 4.0) < 5 * 4.0 / math.sqrt(number / burst)


def test_last_burst_is_cut() -> None:
    """Seven requests in bursts of three are two bursts and one."""
    times = arrivals_by_number(generator(), every(1.0), 7, 3)
    assert np.unique(times, return_counts=True)[1].tolist() == [3, 3, 1]


def test_interval_of_each_request() -> None:
    """A gap has the interval of the request (of a burst: the first one) that ends it."""
    gaps = generator().standard_exponential(4)
    by_number = arrivals_by_number(generator(), lambda n: np.where(n < 2, 1.0, 100.0), 4)
    np.testing.assert_allclose(by_number, np.cumsum(gaps * [1, 1, 100, 100]), rtol=1e-15)
    bursts = arrivals_by_number(generator(), lambda n: np.where(n < 2, 1.0, 100.0), 4, 2)
    np.testing.assert_allclose(bursts[::2], np.cumsum(gaps[:2] * [2, 200]), rtol=1e-15)


def test_short_duration() -> None:
    """Before the first arrival there is none."""
    first = arrivals_by_number(generator(), every(1.0), 1)[0]
    assert len(arrivals_before(generator(), every(1.0), first)) == 0
    assert len(arrivals_before(generator(), every(1.0), math.nextafter(first, 9e9))) == 1


@pytest.mark.parametrize("burst", [1, 1_000_000])
def test_too_many(burst: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A duration of more requests than fit in memory is refused instead of filling it."""
    monkeypatch.setattr("prism_plan.simulate.poisson_arrivals.MAX_REQUESTS", 1_000)
    with pytest.raises(InputError, match="more than 1,000 requests") as caught:
        arrivals_before(generator(), every(1e-9), 1e9, burst)
    assert caught.value.parameter == "duration_s"


# ------------------------------------------------------------------------------------ the file


def test_read_arrivals(tmp_path: Path) -> None:
    """Every key is read, optional ones may be left out, blank lines are skipped."""
    path = tmp_path / "arrivals.jsonl"
    path.write_text(
        '{"server": "edge-0", "at_s": 1.5, "task": "law", "request": 17}\n\n'
        '{"at_s": 0, "server": "edge-1"}\r\n'
    )
    assert read_arrivals(path) == ArrivalTrace(
        (Arrival("edge-0", 1.5, "law", 17, 1), Arrival("edge-1", 0.0, None, None, 3)), str(path)
    )


GOOD = '{"server": "a", "at_s": 1}'


@pytest.mark.parametrize(
    ("line", "place", "message"),
    [
        ('{"server": "a", "at_s": -1}', "line 2: at_s", "-1; expected at least 0"),
        ('{"server": "a", "at_s": 1e999}', "line 2: at_s", "inf; expected a finite number"),
        ('{"server": "a", "at_s": 2e12}', "line 2: at_s", "at most 1e.12"),
        (
            '{"server": "a", "at_s": NaN}',
            "line 2",
            "NaN is not JSON, under key 'at_s'",
        ),
        ('{"server": "a", "at_s": Infinity}', "line 2", "Infinity is not JSON"),
        ('{"server": "a"}', "line 2", "key 'at_s' is missing"),
        ('{"at_s": 1}', "line 2", "key 'server' is missing"),
        ('{"server": 3, "at_s": 1}', "line 2: server", "3; expected a text"),
        ('{"server": "a", "at_s": 1, "task": ""}', "line 2: task", "''; expected a non-empty text"),
        ('{"server": "a", "at_s": 1, "request": -1}', "line 2: request", "at least 0"),
        (
            '{"server": "a", "at_s": 1, "request": 1.5}',
            "line 2: request",
            "expected a whole number",
        ),
        (
            '{"server": "a", "at_s": 1, "request": 2147483648}',
            "line 2: request",
            "expected less than 2,147",
        ),
        ('{"server": "a", "at_s": 1, "tusk": "b"}', "line 2", "did you mean 'task'"),
        ('{"server": "a", "server": "b", "at_s": 1}', "line 2", "is duplicated"),
        ('{"server": "a", "at_s": 1', "line 2", "not JSON"),
        ("[1]", "line 2", "expected an object"),
    ],
)
def test_bad_line(line: str, place: str, message: str) -> None:
    """Whatever is wrong in a line is told with file, line, value and expectation."""
    with pytest.raises(InputError, match=message) as caught:
        parse_arrivals(f"{GOOD}\n{line}\n{GOOD}", source="times.jsonl")
    assert caught.value.source == "times.jsonl"
    assert caught.value.place == place


@pytest.mark.parametrize("at_s", [-0.5, math.nan, math.inf])
def test_bad_time_in_a_call(at_s: float) -> None:
    """Arrivals made in Python are checked like those of a file."""
    with pytest.raises(InputError, match="expected seconds"):
        Arrival("a", at_s)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(text: str) -> None:
    """A file without arrivals is a mistake."""
    with pytest.raises(InputError, match="no arrivals"):
        parse_arrivals(text, source="times.jsonl")
