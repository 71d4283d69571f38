"""Execution servers (DESIGN section 4, rule 6): hidden states travel where they change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prism_plan.simulate.scenario import home_execution
from tests.simulate.builders import (
    ENGINES,
    HALF_RTT_S,
    OVERHEAD_S,
    TOKEN_BYTES,
    Ask,
    back_s,
    dense_s,
    expert_s,
    finished,
    holding,
    lines,
    make_cluster,
    make_model,
    make_scenario,
)

pytestmark = pytest.mark.parametrize("engine", ENGINES)

D, E = dense_s(1), expert_s(1)
HOP = OVERHEAD_S + back_s(1) + HALF_RTT_S  # a hidden state without names, one way
HELD = holding(3, 1, [(0, 0), (2, 0)], [(1, 0)])


def test_a_layer_elsewhere(engine: Any) -> None:
    """Layer 1 executes at server 1, where its expert is: one hop there and one back, no call."""
    execution = np.array([[0, 1, 0], [1, 1, 1]], np.int32)
    scenario = make_scenario(
        make_model(3, 1), make_cluster([1, 1]), HELD, [Ask(0, 0.0, [], [[[0]] * 3])],
        execution=execution,
    )  # fmt: skip
    run = engine(scenario, log=True)
    outcome = finished(run)
    a = D + E
    b = a + HOP + D + E
    c = b + HOP + D + E
    assert run.log() == lines(
        (0.0, "arrival", 0, -1, 0, 0),
        (D, "dense", 0, 0, 0, 0),
        (a, "local", 0, 0, 0, 0),
        (a + OVERHEAD_S, "send", 0, 1, 0, 1),
        (a + OVERHEAD_S + back_s(1), "freed", 0, 1, 0, 1),
        (a + HOP, "arrived", 0, 1, 0, 1),
        (a + HOP + D, "dense", 0, 1, 1, 1),
        (b, "local", 0, 1, 1, 1),
        (b + OVERHEAD_S, "send", 0, 2, 1, 0),
        (b + OVERHEAD_S + back_s(1), "freed", 0, 2, 1, 0),
        (b + HOP, "arrived", 0, 2, 1, 0),
        (b + HOP + D, "dense", 0, 2, 0, 0),
        (c, "local", 0, 2, 0, 0),
    )
    assert outcome.done_s.tolist() == [3 * (D + E) + 2 * HOP]
    assert outcome.bytes_out.tolist() == outcome.bytes_in.tolist() == [TOKEN_BYTES, TOKEN_BYTES]
    assert outcome.messages.sum() == outcome.remote_calls.sum() == outcome.waiting.sum() == 0
    # the time of a layer counts the way to it
    assert outcome.layer_s.tolist() == [3 * (D + E) + 2 * HOP, 0.0]


def test_home_at_the_end(engine: Any) -> None:
    """All layers elsewhere: a step goes there once and comes home once, a prompt's tokens together.

    The way home is layer L in the log, and no layer's time.
    """
    execution = np.array([[1, 1, 1], [1, 1, 1]], np.int32)
    held = holding(3, 1, [], [(0, 0), (1, 0), (2, 0)])
    token = [[0]] * 3
    scenario = make_scenario(
        make_model(3, 1), make_cluster([1, 1]), held, [Ask(0, 0.0, [token] * 4, [token])],
        execution=execution,
    )  # fmt: skip
    run = engine(scenario, log=True)
    outcome = finished(run)
    prompt = 2 * (OVERHEAD_S + back_s(4) + HALF_RTT_S) + 3 * (dense_s(4) + expert_s(4))
    step = 2 * HOP + 3 * (D + E)
    assert outcome.first_token_s.tolist() == [prompt]
    assert outcome.done_s.tolist() == [prompt + step]
    hops = [(event.layer, event.at, event.to) for event in run.log() if event.kind == 3]
    assert hops == [(0, 0, 1), (3, 1, 0)] * 2
    assert outcome.layer_s.tolist() == [HOP + 3 * (D + E), 0.0]
    assert outcome.bytes_out.tolist() == [5 * TOKEN_BYTES] * 2
    assert outcome.calls.tolist() == [15, 0]  # they stay the home's calls
    assert outcome.gpu_busy_s[0] == 0.0


def test_calls_from_the_execution_server(engine: Any) -> None:
    """What the execution server lacks it calls itself, and the answer comes back to it."""
    execution = np.array([[1], [1], [2]], np.int32)
    held = holding(1, 1, [], [], [(0, 0)])
    scenario = make_scenario(
        make_model(1, 1), make_cluster([1, 1, 1]), held, [Ask(0, 0.0, [], [[[0]]])],
        execution=execution,
    )  # fmt: skip
    outcome = finished(engine(scenario))
    assert outcome.messages.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert outcome.bytes_out.tolist() == [256, 260 + 256, 256]
    assert outcome.remote_calls.tolist() == outcome.waiting.tolist() == [1, 0, 0]


def test_at_home_nothing_hops(engine: Any) -> None:
    """The home table is the default: the same run, and only calls on the links."""
    asks = [Ask(n % 2, 0.1 * n, [[[0]] * 3] * 2, [[[0]] * 3]) for n in range(4)]
    model, cluster = make_model(3, 1), make_cluster([1, 1])
    runs = [
        engine(make_scenario(model, cluster, HELD, asks, execution=execution), log=True)
        for execution in (None, home_execution(2, 3))
    ]
    outcomes = [finished(run) for run in runs]
    assert runs[0].log() == runs[1].log()
    sends = [event for event in runs[0].log() if event.kind == 3]
    assert len(sends) == outcomes[0].messages.sum() > 0
    assert home_execution(2, 3).tolist() == [[0, 0, 0], [1, 1, 1]]
