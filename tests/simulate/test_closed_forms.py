"""Where the answer is a formula: sums of table entries, M/D/1, Little's law."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.requests import Requests
from prism_plan.simulate.scenario import Scenario
from tests.simulate.builders import (
    ENGINES,
    Ask,
    drawn_asks,
    drawn_scenario,
    finished,
    holding,
    make_cluster,
    make_model,
    make_scenario,
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(5))
def test_one_server(engine: Any, seed: int) -> None:
    """All experts on one GPU: a lone request takes the sum of its table entries.

    One dense entry a layer and step; one entry for each expert that the step calls, by its tokens.
    """
    rng = np.random.default_rng(seed)
    model = make_model(3, 6, 2)
    asks = [drawn_asks(rng, model, 1, most=1)[0]._replace(arrival_s=2.0)]
    scenario = make_scenario(model, make_cluster([1]), np.ones((1, 3, 6)), asks, curves=None)
    outcome = finished(engine(scenario))
    table = scenario.timing
    ask = asks[0]
    steps = [list(ask.prefill)] * bool(ask.prefill) + [[token] for token in ask.decode]
    total, before = 0.0, 0
    for step in steps:
        context = None if ask.prefill and not before else before
        before += len(step)
        for layer in range(3):
            called = np.bincount([e for token in step for e in token[layer]])
            total += table.dense_s(0, layer, len(step), context)
            total += sum(table.expert_s[0, 0, tokens] for tokens in called if tokens)
    assert outcome.done_s[0] - 2.0 == pytest.approx(total, rel=1e-12)
    assert outcome.gpu_busy_s[0] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_remote_expert(engine: Any) -> None:
    """A decode step with one call away: dense + overhead + out + rtt + expert + back, a layer."""
    model = make_model(4, 2, hidden_size=2048)
    held = holding(4, 2, [(layer, 0) for layer in range(4)], [(layer, 1) for layer in range(4)])
    cluster = make_cluster([1, 1])
    link = dataclasses.replace(cluster.link, bandwidth_mbps=500, rtt_ms=1.0, call_overhead_ms=0.2)
    cluster = dataclasses.replace(cluster, link=link)
    scenario = make_scenario(model, cluster, held, [Ask(0, 0.0, [], [[[1]] * 4] * 3)], curves=None)
    outcome = finished(engine(scenario))
    table = scenario.timing
    wire = (4096 + 4) / 62.5e6 + 4096 / 62.5e6
    layer = table.dense_s(0, 0, 1, 0) + 0.2e-3 + wire + 1e-3 + table.expert_s[0, 0, 1]
    assert outcome.done_s[0] == pytest.approx(12 * layer, rel=1e-12)
    assert outcome.layer_steps.tolist() == [0, 12]
    assert outcome.layer_s[1] == pytest.approx(12 * layer, rel=1e-12)


# ---------------------------------------------------------------------------------------- queueing


def queue(rho: float, number: int, seed: int) -> Scenario:
    """M/D/1: one server, one place, one layer; Poisson arrivals; service of 1/4 s + 3/4 s."""
    model = make_model(1, 1)
    cluster = make_cluster([1])
    asked = make_scenario(model, cluster, [[[True]]], [Ask(0, 0.0, [], [[[0]]])])
    arrival_s = np.random.default_rng(seed).exponential(1 / rho, number).cumsum()
    requests = Requests(
        servers=("s0",),
        prompts=asked.requests.prompts,
        home=np.zeros(number, np.int32),
        arrival_s=arrival_s,
        prompt=np.zeros(number, np.int32),
    )
    table = dataclasses.replace(
        asked.timing, decode_s=np.array([[[0.25, 0.25]]]), expert_s=np.array([[[0.0, 0.75]]])
    )
    return dataclasses.replace(asked, requests=requests, timing=table)


# The standard error of the mean wait of R requests. For a queue in heavy traffic it is that of a
# reflected Brownian motion, whose asymptotic variance goes with the third power of the variation of
# arrivals and service, 2 in M/M/1 and 1 in M/D/1. In M/M/1 (service 1) it is exactly
# rho (2 + 5 rho - 4 rho^2 + rho^3) / (1 - rho)^4, at rho = 0.8 1976; an eighth of that, 247, leaves
# sqrt(247 / 2e6) = 0.011 for R = 2,000,000: 0.56 % of the mean of 2. At 0.6 and 0.3 the same gives
# 0.3 % and 0.6 % of the means 0.75 and 0.214 for R = 1,000,000 and 500,000. The 2 % that are
# asked for are more than three standard errors; seeds are fixed. The test measures the error too.
@pytest.mark.parametrize(("rho", "number"), [(0.3, 500_000), (0.6, 1_000_000), (0.8, 2_000_000)])
def test_mean_wait_of_an_md1_queue(rho: float, number: int) -> None:
    """Pollaczek and Khinchine: rho / (2 (1 - rho)) services, within 2 % over a long run.

    Also request by request against Lindley's recursion on the same arrivals, and the mean number
    in the system is the arrival rate times the mean time in it.
    """
    scenario = queue(rho, number, seed=11)
    outcome = finished(CompiledEngine(scenario))
    arrival_s = scenario.requests.arrival_s
    wait_s = outcome.start_s - arrival_s
    # W[i+1] = max(0, W[i] + 1 - gap): a random walk minus its running minimum
    walk = np.concatenate([[0.0], np.cumsum(1.0 - np.diff(arrival_s))])
    lindley_s = walk - np.minimum.accumulate(walk)
    np.testing.assert_allclose(wait_s, lindley_s, atol=1e-6)
    expected = rho / (2 * (1 - rho))
    batches = wait_s.reshape(100, -1).mean(axis=1)
    assert batches.std(ddof=1) / 10 < 0.008 * expected
    assert wait_s.mean() == pytest.approx(expected, rel=0.02)
    in_system = outcome.present_s[0] / outcome.now_s
    rate = number / outcome.now_s
    mean_time_s = (outcome.done_s - arrival_s).mean()
    assert in_system == pytest.approx(rate * mean_time_s, rel=1e-9)
    assert in_system == pytest.approx(rho + rho * expected, rel=0.02)
    assert outcome.gpu_busy_s[0] / outcome.now_s == pytest.approx(rho, rel=0.005)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    offload=st.booleans(),
    cut=st.floats(0, 1.2) | st.just(math.inf),
)
def test_littles_law_in_every_run(seed: int, offload: bool, cut: float) -> None:
    """The time that requests were present is the sum of their times, open ones until now.

    By server, at any time at which a run is stopped, hence also divided by that time: the mean
    number present is the arrival rate times the mean time in the system.
    """
    scenario = drawn_scenario(np.random.default_rng(seed), offload=offload)
    whole = finished(CompiledEngine(scenario))
    until_s = whole.now_s * cut
    home, arrival_s = scenario.requests.home, scenario.requests.arrival_s
    for engine in ENGINES:
        run = engine(scenario)
        run.advance(until_s)
        outcome = run.outcome()
        here = arrival_s <= outcome.now_s
        end_s = np.where(np.isnan(outcome.done_s), outcome.now_s, outcome.done_s)
        spent = np.bincount(home[here], (end_s - arrival_s)[here], minlength=len(outcome.calls))
        np.testing.assert_allclose(outcome.present_s, spent, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), offload=st.booleans())
def test_times_are_in_order(seed: int, offload: bool) -> None:
    """Arrival <= start < first token <= done; no GPU or port is busy longer than the run."""
    scenario = drawn_scenario(np.random.default_rng(seed), offload=offload)
    outcome = finished(CompiledEngine(scenario))
    assert np.all(scenario.requests.arrival_s <= outcome.start_s)
    assert np.all(outcome.start_s < outcome.first_token_s)
    assert np.all(outcome.first_token_s <= outcome.done_s)
    steps = scenario.requests.prompts.decode_tokens + (scenario.requests.prompts.prefill_tokens > 0)
    assert np.all((steps == 1) == (outcome.first_token_s == outcome.done_s))
    for busy_s in (outcome.gpu_busy_s, outcome.up_busy_s, outcome.down_busy_s):
        assert busy_s.max() <= outcome.now_s * (1 + 1e-12)
