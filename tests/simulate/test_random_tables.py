"""Random execution tables: engines equal, Little's law, and bytes counted again by section 10.

A short version runs always, thousands of scenarios with ``make test-long``.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.engine_interface import Outcome
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.simulate.scenario import Scenario
from tests.simulate.builders import differing, finished
from tests.simulate.drawn_tables import drawn_table_scenario
from tests.simulate.test_accounting import counted

#: Scenarios of the long test, in so many parts.
NUM_SCENARIOS, NUM_PARTS = 10_000, 8


def hops_by_formula(scenario: Scenario) -> tuple[int, int]:
    """Messages that are no calls, and their bytes: section 10, rules 1-3, request by request.

    Of a request with home h, first span at f and driver d: the prompt's ids to f; each pass sends
    all its tokens once for every change of server; each token but the last makes an id to f, and
    one home where that is another server; the last one's id goes home only.
    """
    requests, prompts = scenario.requests, scenario.requests.prompts
    hops = sent = 0
    for home, prompt in zip(requests.home.tolist(), requests.prompt.tolist(), strict=True):
        row = scenario.execution[home].tolist()
        first, driver = row[0], row[-1]
        changes = sum(a != b for a, b in itertools.pairwise(row))
        prefill = int(prompts.prefill_tokens[prompt])
        decode = int(prompts.decode_tokens[prompt])
        passes = decode + (prefill > 0)
        ids = (passes - 1) * ((driver != first) + (driver != home and home != first))
        ids += driver != home
        hops += (first != home) + passes * changes + ids
        sent += 4 * (prefill or 1) * (first != home)
        sent += (prefill + decode) * changes * scenario.network.token_bytes + 4 * ids
    return hops, sent


def check_scenario(scenario: Scenario) -> None:
    """Run both engines; they are equal, and what they count is what is counted here."""
    reference, compiled = ReferenceEngine(scenario, log=True), CompiledEngine(scenario, log=True)
    outcome = finished(reference)
    assert differing(outcome, finished(compiled)) == []
    assert reference.log() == compiled.log()
    called = reference.take_calls()
    np.testing.assert_array_equal(called, compiled.take_calls())
    check_times(scenario, outcome)
    check_traffic(scenario, outcome, called)


def check_times(scenario: Scenario, outcome: Outcome) -> None:
    """Little's law at each home: times in system sum to the integral of the number in system."""
    requests = scenario.requests
    in_system = np.zeros(len(outcome.present_s))
    np.add.at(in_system, requests.home, outcome.done_s - requests.arrival_s)
    np.testing.assert_allclose(outcome.present_s, in_system, rtol=1e-9, atol=1e-9)
    assert (outcome.start_s >= requests.arrival_s).all()
    assert (outcome.first_token_s >= outcome.start_s).all()
    assert (outcome.done_s >= outcome.first_token_s).all()
    for home, places in enumerate(scenario.concurrency):  # a place is held until the last id
        own = requests.home == home
        for at_s in outcome.start_s[own]:
            started, done = outcome.start_s[own], outcome.done_s[own]
            assert np.count_nonzero((started <= at_s) & (done > at_s)) <= places


def check_traffic(scenario: Scenario, outcome: Outcome, called: np.ndarray) -> None:
    """Hops, calls and bytes are those of a direct count from table, prompts and placement."""
    hops, hop_bytes = hops_by_formula(scenario)
    assert outcome.hops.sum() == hops
    expected = counted(scenario)
    np.testing.assert_array_equal(called, expected.pop("called"))
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(outcome, name), value, err_msg=name)
    states = 2 * int(np.sum(expected["destinations"])) * scenario.network.token_bytes
    call_bytes = states + 4 * int(np.sum(expected["remote_calls"]))
    assert outcome.bytes_out.sum() == outcome.bytes_in.sum() == hop_bytes + call_bytes


def drawn(seed: int) -> Scenario:
    """The scenario of a seed; every third without calls, every second with coinciding events."""
    rng = np.random.default_rng(seed)
    return drawn_table_scenario(rng, ties=seed % 2 == 0, everywhere=seed % 3 == 0)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_tables(seed: int) -> None:
    """Both engines agree event for event, with Little's law and a direct count of what is sent."""
    check_scenario(drawn(seed))


@pytest.mark.long
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_thousands_of_random_tables(part: int) -> None:
    """The same of thousands of scenarios, each named by its seed."""
    tables = calls = waits = 0
    for seed in range(part, NUM_SCENARIOS, NUM_PARTS):
        scenario = drawn(seed)
        try:
            check_scenario(scenario)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        tables += scenario.has_table
        calls += not scenario.placement.local_to_execution.all()
        waits += max(scenario.concurrency) < len(scenario.requests)
    each = NUM_SCENARIOS // NUM_PARTS
    assert tables > each / 2  # what is drawn is what the test is about
    assert calls > each / 3
    assert waits > each / 4


def test_without_calls_nothing_but_hops_is_sent() -> None:
    """Where every server holds every expert no message is a call, and bytes are those of hops."""
    sent = 0
    for seed in range(0, 60, 3):
        scenario = drawn(seed)
        outcome = finished(CompiledEngine(scenario))
        assert outcome.messages.sum() == outcome.remote_calls.sum() == 0
        hops, hop_bytes = hops_by_formula(scenario)
        assert (outcome.hops.sum(), outcome.bytes_out.sum()) == (hops, hop_bytes)
        sent += hop_bytes
    assert sent > 0


def test_the_formula_gives_the_worked_example() -> None:
    """Hops and bytes of the four tables of section 10, whose numbers stand there."""
    from tests.simulate.test_execution import example

    for rows, home, expected in (
        ([[0, 1, 1], [1, 1, 1]], 0, (6, 24_588)),
        ([[1, 1, 0], [1, 1, 1]], 0, (6, 24_600)),
        ([[1, 1, 1], [1, 1, 1]], 0, (4, 28)),
        ([[0, 0, 0], [0, 1, 2], [2, 2, 2]], 1, (12, 49_188)),
    ):
        assert hops_by_formula(example(rows, home)) == expected
