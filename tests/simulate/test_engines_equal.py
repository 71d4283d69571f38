"""The compiled engine equals the reference: every event, every figure, to the last bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_plan.execution_table import TableChange
from prism_plan.instance import Instance
from prism_plan.io.cluster import read_cluster
from prism_plan.migration_step import MigrationStep
from prism_plan.simulate.compiled.compiled_engine import CompiledEngine
from prism_plan.simulate.engine_interface import Engine
from prism_plan.simulate.reference_engine import ReferenceEngine
from prism_plan.simulate.routing_policies import ROUTES, Route
from prism_plan.simulate.sampling import sample_requests
from prism_plan.simulate.scenario import Scenario
from prism_plan.solvers import solve
from prism_plan.trace import Trace
from tests.conftest import ROOT
from tests.simulate.builders import (
    LINK,
    Ask,
    contended_scenario,
    differing,
    drawn_scenario,
    finished,
    holding,
    make_cluster,
    make_model,
    make_scenario,
)

SEEDS = st.integers(0, 2**32 - 1)


def both(scenario: Scenario) -> tuple[ReferenceEngine, CompiledEngine]:
    return ReferenceEngine(scenario, log=True), CompiledEngine(scenario, log=True)


def assert_equal(a: Engine, b: Engine) -> None:
    """Equal logs, figures, calls taken, placements and execution tables."""
    assert a.log() == b.log()
    assert differing(a.outcome(), b.outcome()) == []
    np.testing.assert_array_equal(a.take_calls(), b.take_calls())
    np.testing.assert_array_equal(a.on_gpu(), b.on_gpu())
    np.testing.assert_array_equal(a.tables_in_use(), b.tables_in_use())
    assert (a.all_finished, a.migrating) == (b.all_finished, b.migrating)


@settings(max_examples=200)
@given(seed=SEEDS, ties=st.booleans(), offload=st.booleans())
def test_engines_are_equal(seed: int, ties: bool, offload: bool) -> None:
    """All routes, offload, bursts, copies, concurrency, other execution servers, equal times."""
    reference, compiled = both(
        drawn_scenario(np.random.default_rng(seed), ties=ties, offload=offload)
    )
    finished(reference)
    finished(compiled)
    assert_equal(reference, compiled)


@settings(max_examples=25)
@given(
    seed=SEEDS,
    ties=st.booleans(),
    burst_kb=st.sampled_from([0.3, 2.0]),
    short_kb=st.sampled_from([0.0, 0.262, 0.6, 99.0]),
)
def test_engines_are_equal_under_contention(
    seed: int, ties: bool, burst_kb: float, short_kb: float
) -> None:
    """Full links, and bursts: transfers of no length among those that queue (see test_links).

    Where messages of one token are short, also of several, also all of them.
    """
    reference, compiled = both(
        contended_scenario(
            np.random.default_rng(seed), ties=ties, burst_kb=burst_kb, short_kb=short_kb
        )
    )
    finished(reference)
    finished(compiled)
    assert_equal(reference, compiled)


def drawn_steps(rng: np.random.Generator, held: np.ndarray) -> list[MigrationStep]:
    """Loads and drops with needs among the earlier ones; now and then one loses a last copy."""
    gpus, pairs = held.shape
    steps: list[MigrationStep] = []
    for _ in range(int(rng.integers(0, 12))):
        needs = tuple(i for i in range(len(steps)) if rng.random() < 0.3)
        pair = int(rng.integers(pairs))
        if rng.random() < 0.6:
            steps.append(MigrationStep("load", int(rng.integers(gpus)), pair, needs))
            continue
        copies = np.flatnonzero(held[:, pair])
        again = [i for i, step in enumerate(steps) if step.kind == "load" and step.pair == pair]
        if len(copies) > 1 or rng.random() < 0.1:
            steps.append(MigrationStep("drop", int(rng.choice(copies)), pair, needs))
            held[steps[-1].gpu, pair] = len(copies) == 1
        elif again and steps[again[0]].gpu != copies[0]:
            steps.append(MigrationStep("drop", int(copies[0]), pair, (*needs, again[0], again[0])))
    return steps


def drawn_change(rng: np.random.Generator, engine: Engine, num_steps: int) -> TableChange | None:
    """A new table or, now and then, the same one, that begins at once or after some steps."""
    servers, layers = engine.tables_in_use()[0].shape
    table = engine.tables_in_use()[-1]
    if rng.random() < 0.8:
        table = rng.integers(0, servers, (servers, layers)).astype(np.int32)
    waits_from = int(rng.integers(0, num_steps + 1))
    return TableChange(table, int(rng.choice([0, waits_from])), waits_from)


def taken(engine: Engine, seed: int, *, tables: bool = False) -> str:
    """Advance in pieces, with migrations between; the message if a last copy was dropped.

    ``tables``: most migrations change the execution table too.
    """
    rng = np.random.default_rng(seed)
    until_s = 0.0
    try:
        for _ in range(int(rng.integers(1, 8))):
            most = None if rng.random() < 0.5 else int(rng.integers(0, 40))
            until_s += float(rng.choice([0.0, 0.5, 2.0, rng.random()]))
            engine.advance(until_s, most)
            if not engine.migrating and rng.random() < 0.6:
                held = engine.on_gpu()
                steps = drawn_steps(rng, held.reshape(len(held), -1))
                change = None
                if tables and rng.random() < 0.8:
                    change = drawn_change(rng, engine, len(steps))
                engine.migrate(steps, change)
            if rng.random() < 0.3:
                engine.outcome()
        engine.advance()
    except ValueError as error:
        return str(error)
    return ""


@settings(max_examples=200)
@given(seed=SEEDS, ties=st.booleans())
def test_engines_are_equal_while_experts_move(seed: int, ties: bool) -> None:
    """Migrations with needs, begun between pieces of a run, on GPUs that loads block or not."""
    reference, compiled = both(drawn_scenario(np.random.default_rng(seed), ties=ties))
    ended = taken(reference, seed)
    assert taken(compiled, seed) == ended
    if not ended:
        assert_equal(reference, compiled)
    else:
        assert "drops the only copy" in ended


@settings(max_examples=300)
@given(seed=SEEDS, ties=st.booleans())
def test_engines_are_equal_while_tables_change(seed: int, ties: bool) -> None:
    """New tables that begin at once or after steps, and steps that wait for older requests."""
    scenario = drawn_scenario(np.random.default_rng(seed), ties=ties, most=25)
    reference, compiled = both(scenario)
    ended = taken(reference, seed, tables=True)
    assert taken(compiled, seed, tables=True) == ended
    if not ended:
        assert_equal(reference, compiled)
        assert reference.all_finished
        assert not reference.migrating
    else:
        assert "drops the only copy" in ended


@settings(max_examples=60)
@given(seed=SEEDS, offload=st.booleans(), piece=st.integers(1, 17))
def test_a_run_in_pieces_is_the_same_run(seed: int, offload: bool, piece: int) -> None:
    """However often it is stopped, by number of events or by time, a run gives the same."""
    scenario = drawn_scenario(np.random.default_rng(seed), offload=offload)
    whole = ReferenceEngine(scenario, log=True)
    outcome = finished(whole)
    for engine in both(scenario):
        while not engine.advance(max_events=piece):
            assert engine.outcome().events % piece == 0
        assert engine.log() == whole.log()
        # asking in between splits the sums of present_s, which may round otherwise
        assert set(differing(engine.outcome(), outcome)) <= {"present_s"}
        np.testing.assert_allclose(engine.outcome().present_s, outcome.present_s, rtol=1e-12)
    for engine in both(scenario):
        for at_s in np.linspace(0.0, outcome.now_s, 5):
            assert engine.advance(at_s)
            assert engine.outcome().now_s == at_s
            assert all(event.time_s <= at_s for event in engine.log())
        assert engine.advance()
        assert engine.log() == whole.log()
        assert set(differing(engine.outcome(), outcome)) <= {"present_s"}


def test_room_grows_where_it_runs_out() -> None:
    """300 requests at once at 3 servers: more events, messages and lines than at first.

    Calls are computed on the second GPUs; on the first ones dense work waits all the time, which a
    message without work for them must not wait for.
    """
    model = make_model(layers=3, experts=3, top_k=2)
    third = [(0, 2), (1, 0), (1, 2), (2, 2), (2, 0)]
    held = holding(3, 3, [(0, 0)], [], [], [(0, 1), (1, 1), (2, 1)], [], third)
    asks = [Ask(n % 2, float(n % 3), [], [[[1, 2], [0, 1], [2, 1]]] * 2) for n in range(300)]
    far = dataclasses.replace(LINK, rtt_ms=1e6)
    scenario = make_scenario(model, make_cluster([2, 2, 2], far, concurrency=400), held, asks)
    reference, compiled = both(scenario)

    def room() -> tuple[int, int, int]:
        state = compiled._state
        return len(state.heap.entries), len(state.messages), len(state.log)

    before = room()
    finished(reference)
    finished(compiled)
    assert all(after >= 4 * first for after, first in zip(room(), before, strict=True))
    assert_equal(reference, compiled)


def test_room_grows_for_a_migration() -> None:
    """A plan of more loads than the event queue had room for."""
    model = make_model(layers=1, experts=200)
    held = np.zeros((2, 1, 200), bool)
    held[0] = True
    scenario = make_scenario(model, make_cluster([1, 1]), held, [Ask(1, 0.0, [], [[[7]]])])
    reference, compiled = both(scenario)
    steps = [MigrationStep("load", 1, pair) for pair in range(200)]
    for engine in (reference, compiled):
        engine.migrate(steps)
        finished(engine)
        assert engine.on_gpu().all()
    assert_equal(reference, compiled)


def test_nothing_to_do() -> None:
    """No requests: no events, and the time is what was asked for."""
    model = make_model(layers=1, experts=1)
    scenario = make_scenario(model, make_cluster([1]), holding(1, 1, [(0, 0)]), [])
    for engine in both(scenario):
        assert engine.advance(3.0)
        assert engine.all_finished
        outcome = engine.outcome()
        assert (outcome.now_s, outcome.events, outcome.present_s.tolist()) == (3.0, 0, [0.0])


@pytest.mark.traces
@pytest.mark.parametrize("route", ROUTES)
def test_engines_are_equal_on_the_real_trace(v2_trace: Trace, route: Route) -> None:
    """A few requests of DeepSeek-V2-Lite on the paper's cluster, all 26 layers, with copies."""
    cluster = read_cluster(ROOT / "traces" / "paper-v2lite.toml")
    cluster = dataclasses.replace(cluster, link=dataclasses.replace(cluster.link, burst_kb=64))
    placement = solve(Instance.build(v2_trace, cluster), "redundance")
    requests = sample_requests(v2_trace, cluster, requests_per_server=1, decode_tokens=8)
    scenario = Scenario.build(placement, requests, cluster, v2_trace.model, route=route)
    reference, compiled = both(scenario)
    outcome = finished(reference)
    finished(compiled)
    assert_equal(reference, compiled)
    assert outcome.remote_calls.min() > 0
    assert outcome.events > 5_000
